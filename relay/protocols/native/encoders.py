"""Encoders of the native protocol: one object for all clients of one format.

* WebSocket: one text frame per event, the same for all clients
* SSE with one channel: a block with the entry's ID, the same for all clients
* SSE with several channels: the `id:` of the block is the client's cursor; the rest is shared
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from typing_extensions import override

from relay.core.model import Channel, EntryID, Event, Position
from relay.hub.cursor import encode as encode_cursor
from relay.hub.encoding import SharedEncoder
from relay.hub.recovery import Notice
from relay.protocols.native import codec
from relay.transports.socket.websocket import frame_text

if TYPE_CHECKING:
    from relay.hub.session import Subscription


def _text(entry_id: EntryID | None) -> str | None:
    return None if entry_id is None else str(entry_id)


class WebSocketEncoder(SharedEncoder):
    """Encodes events as WebSocket text frames."""

    door = "native"

    @override
    def event(self, event: Event) -> bytes:
        return frame_text(codec.event_object(event))

    @override
    def notice(self, channel: Channel, notice: Notice) -> bytes:
        return frame_text(
            codec.notice_object(
                notice.kind,
                channel=channel,
                from_=_text(notice.from_id),
                to=_text(notice.to_id),
                reason=notice.reason,
            )
        )


class SseEncoder(SharedEncoder):
    """Encodes SSE blocks with stream IDs, for connections with one channel."""

    door = "native"

    def __init__(self, tail: Callable[[Event], bytes]) -> None:
        self._tail = tail

    @override
    def event(self, event: Event) -> bytes:
        # Ephemeral events have no ID.
        tail = self._tail(event)
        return tail if event.id is None else codec.sse_id(str(event.id)) + tail

    @override
    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        # The ID is a cursor after the notice. A client that resumed from an entry ID would receive
        # the same notice again.
        if notice.position is None:
            return notice_block(channel, notice)
        return notice_block(channel, notice, [(channel, notice.position)])


def notice_block(
    channel: Channel, notice: Notice, positions: Iterable[tuple[Channel, Position]] = ()
) -> bytes:
    """Return the block of a notice, with a cursor as ID if there are positions."""
    tail = codec.sse_notice(
        notice.kind,
        channel=channel,
        from_=_text(notice.from_id),
        to=_text(notice.to_id),
        reason=notice.reason,
    )
    return codec.sse_id(encode_cursor(positions)) + tail if positions else tail


class SseCursorEncoder(SseEncoder):
    """Encodes SSE blocks with the client's cursor over all its channels as ID."""

    personal = True

    @override
    def event(self, event: Event) -> bytes:
        # Without the ID, which differs for each client.
        return self._tail(event)

    @override
    def notice(self, channel: Channel, notice: Notice) -> bytes:
        # Without an ID: the cursor of each client over all its channels would have to be made for
        # each notice, and after a restart of Redis there is one for every channel.
        return notice_block(channel, notice)

    @override
    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        if position is None:
            return shared
        cursor = subscription.session.cursor(event.channel, position)
        return codec.sse_id(encode_cursor(cursor)) + shared


WEBSOCKET = WebSocketEncoder()
SSE = SseEncoder(codec.sse_tail)
SSE_ENVELOPE = SseEncoder(codec.envelope_tail)
SSE_CURSOR = SseCursorEncoder(codec.sse_tail)
SSE_CURSOR_ENVELOPE = SseCursorEncoder(codec.envelope_tail)


def sse_encoder(*, several: bool, envelope: bool) -> SseEncoder:
    """Return the encoder for a request."""
    if several:
        return SSE_CURSOR_ENVELOPE if envelope else SSE_CURSOR
    return SSE_ENVELOPE if envelope else SSE
