"""Encoders of events for clients.

There is one encoder per framing: WebSocket text frames, compressed or not, and SockJS messages. The
JSON text of an event is encoded once and shared by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from typing_extensions import override

from relay.core.go_json import compact_in_slices
from relay.core.model import Channel, Event
from relay.core.reasons import Reason
from relay.core.slices import in_slices
from relay.hub.encoding import SharedEncoder
from relay.hub.recovery import Notice
from relay.protocols.centrifugo import codec
from relay.transports.socket.websocket import frame_compressed, frame_text
from relay.transports.sockjs.frames import element

if TYPE_CHECKING:
    from relay.hub.session import Session
    from relay.protocols.centrifugo.settings import CentrifugoSettings

DOOR = "centrifugo"
# Types of ephemeral events.
PRESENCE_TYPES = ("join", "leave")
# Keys of `Event.frames` for JSON text that all encoders share.
_PUSH = "centrifugo push"
_MESSAGE = "centrifugo message"


class CentrifugoEncoder(SharedEncoder):
    """Encodes events for one kind of client. `frame` converts JSON text to bytes on the wire."""

    door = DOOR

    def __init__(self, frame: Callable[[bytes], bytes]) -> None:
        self.frame = frame

    @override
    def event(self, event: Event) -> bytes:
        payload = event.frames.get(_PUSH)
        if payload is None:
            payload = event.frames[_PUSH] = _push(event)
        return self.frame(payload)

    @override
    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        # v1 has no message for a gap: the connection is closed, and the client receives
        # `recovered: false` when it reconnects.
        if notice.kind != "revoked":
            return None
        # A client with an expired token is closed in the same turn. After an unsubscribe push,
        # centrifuge-js would not subscribe again when it has a new token.
        if notice.reason == Reason.EXPIRED:
            return b""
        return self.frame(codec.unsubscribe_push(channel))


def _push(event: Event) -> bytes:
    if event.id is None and event.door == DOOR and event.type in PRESENCE_TYPES:
        return codec.presence_push(event.type, event.channel, event.data)
    return codec.message_push(event)


def message(event: Event) -> bytes:
    """Return the event as an element of history, encoded once per event."""
    data = event.frames.get(_MESSAGE)
    if data is None:
        data = event.frames[_MESSAGE] = codec.message(event)
    return data


async def encode_messages(events: Iterable[Event]) -> None:
    """Encode events for `message` in slices of time, because a history may be large."""
    async for event in in_slices(events):
        if event.is_json and _MESSAGE not in event.frames:
            compacted = await compact_in_slices(event.data)
            event.frames[_MESSAGE] = codec.message(event, compacted)


def visible_messages(session: Session, events: Iterable[Event]) -> list[bytes]:
    """Return the events that are addressed to this client, as elements of history."""
    return [
        message(event)
        for event in events
        if event.to is None or not event.to.isdisjoint(session.selectors)
    ]


WEBSOCKET = CentrifugoEncoder(frame_text)
SOCKJS = CentrifugoEncoder(element)


def compressed(settings: CentrifugoSettings) -> CentrifugoEncoder:
    """Return the encoder for WebSockets with permessage-deflate."""
    smallest, level = (
        settings.websocket_compression_min_size,
        settings.websocket_compression_level,
    )

    def frame(text: bytes) -> bytes:
        return frame_compressed(text, level) if len(text) >= smallest else frame_text(text)

    return CentrifugoEncoder(frame)
