"""Encode events, notices and replies of the native protocol. No I/O.

An event is encoded once for all clients of one format, by one object:

* WebSocket: one text frame per event, the same for all clients
* SSE with one channel: a block with the entry's ID, the same for all clients
* SSE with several channels: the `id:` of the block is the client's cursor; the rest is shared

JSON `data` is inserted as the producer wrote it: the notation of numbers and the order of keys do
not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

import orjson
from typing_extensions import override

from relay.core.client_libraries import comment, event_source_type, one_line
from relay.core.errors import ClientError, Unavailable
from relay.core.model import Channel, EntryID, Event, Position
from relay.hub.cursor import encode as encode_cursor
from relay.hub.encoding import SharedEncoder
from relay.hub.recovery import Notice, NoticeKind
from relay.protocols.native.commands import Ref
from relay.transports.socket.websocket import frame_text

if TYPE_CHECKING:
    from relay.hub.session import Subscription

ReplyName = Literal["subscribe", "unsubscribe", "refresh", "ping"]

# Prefix of relay's own SSE events. The type of an entry must not begin with it, because it could
# imitate a notice.
NOTICE_PREFIX = "relay:"

# --- bytes ----------------------------------------------------------------------------------


def event_object(event: Event) -> bytes:
    """Encode `{"channel","id","type","data","client"}` for WebSocket and the SSE envelope."""
    out = [b'{"channel":', orjson.dumps(event.channel)]
    if event.id is not None:
        out.append(b',"id":"%d-%d"' % event.id)
    if event.type is not None:
        out += (b',"type":', orjson.dumps(event.type))
    out += (b',"data":', event.data if event.is_json else orjson.dumps(event.data.decode()))
    if event.client is not None:
        out += (b',"client":', orjson.dumps(event.client))
    out.append(b"}")
    return b"".join(out)


class NoticeFields(TypedDict, total=False):
    """Fields of a notice. Those that are missing or None are omitted."""

    channel: Channel | None
    from_: str | None
    to: str | None
    reason: str | None


def notice_object(name: NoticeKind, **fields: Unpack[NoticeFields]) -> bytes:
    """Encode a notice for WebSocket."""
    return _dump({"notice": name, **_notice_fields(**fields)})


def reply_object(
    name: ReplyName, ref: Ref, *, channel: Channel | None = None, position: str | None = None
) -> bytes:
    """Encode the reply to a successful command."""
    return _dump({"reply": name, "ref": ref} | _known(channel=channel, id=position))


def error_object(
    error: ClientError | Unavailable, ref: Ref = None, channel: str | None = None
) -> bytes:
    """Encode the reply to a rejected command."""
    return _dump({"error": _error_fields(error), "ref": ref} | _known(channel=channel))


def refusal(error: ClientError | Unavailable, channel: str | None = None) -> bytes:
    """Encode the body of an HTTP error response."""
    return _dump({"error": _error_fields(error) | _known(channel=channel)})


# An SSE event consists of `id: <id>\n` and a tail. The tail is the same for all clients. The ID is
# not, because a connection with several channels has its own cursor as ID.


def sse_id(position: bytes | str) -> bytes:
    """Encode the `id:` line. Browsers send its value as Last-Event-ID when they reconnect."""
    return b"id: " + (position.encode() if isinstance(position, str) else position) + b"\n"


def sse_tail(event: Event) -> bytes:
    """Encode type and data of an event for a browser's `EventSource`.

    An event whose type the library reserves arrives as `message`.
    """
    kind = None
    if event.type and not event.type.startswith(NOTICE_PREFIX):
        kind = event_source_type(event.type)
    data = one_line(event.data) if event.is_json else event.data
    return (b"event: " + kind.encode() + b"\n" if kind else b"") + _sse_data(data)


def envelope_tail(event: Event) -> bytes:
    """Encode the event with channel, ID, type and client in its data (`?envelope=1`).

    There is no `event:` line, because a page cannot listen to types that it does not know.
    """
    return _sse_data(one_line(event_object(event)))


def sse_notice(name: NoticeKind, **fields: Unpack[NoticeFields]) -> bytes:
    """Encode the tail of a notice."""
    return _named(name, _dump(_notice_fields(**fields)))


def retry(retry_ms: int) -> bytes:
    """Encode the time after which the client reconnects when the stream ends."""
    return b"retry: %d\n" % retry_ms


def sse_error(error: ClientError | Unavailable, channel: str | None = None) -> bytes:
    """Encode the tail of the error that ends a stream."""
    return _named("error", _dump(_error_fields(error) | _known(channel=channel)))


def first_block(
    position: bytes | str, retry_ms: int, positions: Iterable[tuple[Channel, str]]
) -> bytes:
    """Encode the beginning of a stream as an event.

    Its ID lets a client resume that receives no event. It has data, because some libraries pass a
    block without data to the application, and browsers do not pass its ID to scripts.
    """
    opened = {
        "retry_ms": retry_ms,
        "channels": [{"channel": channel, "id": at} for channel, at in positions],
    }
    return retry(retry_ms) + sse_id(position) + _named("open", _dump(opened))


def empty_stream(retry_ms: int, reason: str) -> bytes:
    """Encode a complete stream without events. The client reconnects after `retry_ms`.

    The reason is a comment, which clients ignore.
    """
    return retry(retry_ms) + comment(reason)


HEARTBEAT = comment()


def _sse_data(data: bytes) -> bytes:
    """Encode `data` as lines. A client joins them with LF, so that CR LF and CR become LF.

    This does not change JSON, because its strings contain no line breaks.
    """
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return b"data: " + lines.replace(b"\n", b"\ndata: ") + b"\n\n"


def _named(name: str, data: bytes) -> bytes:
    return b"event: " + (NOTICE_PREFIX + name).encode() + b"\n" + _sse_data(data)


def _notice_fields(
    channel: Channel | None = None,
    from_: str | None = None,
    to: str | None = None,
    reason: str | None = None,
) -> dict[str, object]:
    return _known(channel=channel) | _known(**{"from": from_, "to": to, "reason": reason})


def _error_fields(error: ClientError | Unavailable) -> dict[str, object]:
    return {"code": error.code, "message": str(error)}


def _known(**fields: str | None) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _dump(fields: Mapping[str, object]) -> bytes:
    return orjson.dumps(fields)


# --- encoders -------------------------------------------------------------------------------


def _fields_of(channel: Channel, notice: Notice) -> NoticeFields:
    return {
        "channel": channel,
        "from_": _text(notice.from_id),
        "to": _text(notice.to_id),
        "reason": notice.reason,
    }


def _text(entry_id: EntryID | None) -> str | None:
    return None if entry_id is None else str(entry_id)


class WebSocketEncoder(SharedEncoder):
    """Encodes events as WebSocket text frames."""

    door = "native"

    @override
    def event(self, event: Event) -> bytes:
        return frame_text(event_object(event))

    @override
    def notice(self, channel: Channel, notice: Notice) -> bytes:
        return frame_text(notice_object(notice.kind, **_fields_of(channel, notice)))


class SseEncoder(SharedEncoder):
    """Encodes SSE blocks with stream IDs, for connections with one channel."""

    door = "native"

    def __init__(self, tail: Callable[[Event], bytes]) -> None:
        self._tail = tail

    @override
    def event(self, event: Event) -> bytes:
        # Ephemeral events have no ID.
        tail = self._tail(event)
        return tail if event.id is None else b"id: %d-%d\n" % event.id + tail

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
    tail = sse_notice(notice.kind, **_fields_of(channel, notice))
    return sse_id(encode_cursor(positions)) + tail if positions else tail


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
        return sse_id(encode_cursor(cursor)) + shared


WEBSOCKET = WebSocketEncoder()
SSE = SseEncoder(sse_tail)
SSE_ENVELOPE = SseEncoder(envelope_tail)
SSE_CURSOR = SseCursorEncoder(sse_tail)
SSE_CURSOR_ENVELOPE = SseCursorEncoder(envelope_tail)


def sse_encoder(*, several: bool, envelope: bool) -> SseEncoder:
    """Return the encoder for a request."""
    if several:
        return SSE_CURSOR_ENVELOPE if envelope else SSE_CURSOR
    return SSE_ENVELOPE if envelope else SSE
