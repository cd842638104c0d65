"""The door's encoders: one object for all clients of one format.

A format is a way to frame JSON text: a websocket's text frame, plain or compressed, or a SockJS
message. The text itself is made once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from relay.core.go_json import compact_in_slices
from relay.core.model import Channel, Event
from relay.core.slices import in_slices
from relay.hub.encoding import SharedEncoder
from relay.hub.recovery import Notice
from relay.protocols.centrifugo import codec
from relay.transports.socket.websocket import frame_compressed, frame_text
from relay.transports.sockjs.frames import element

if TYPE_CHECKING:
    from relay.protocols.centrifugo.settings import CentrifugoSettings

DOOR = "centrifugo"
# Events of the ephemeral kind of this door: who came, who left.
PRESENCE_TYPES = ("join", "leave")
# Keys of `Event.frames` for what all formats share.
_PUSH = "centrifugo push"
_MESSAGE = "centrifugo message"


class CentrifugoEncoder(SharedEncoder):
    """How JSON text becomes bytes for one kind of client; `frame` does it."""

    door = DOOR

    def __init__(self, frame: Callable[[bytes], bytes]) -> None:
        self.frame = frame

    def event(self, event: Event) -> bytes:
        """A `message`, `join` or `leave` push."""
        payload = event.frames.get(_PUSH)
        if payload is None:
            payload = event.frames[_PUSH] = _push(event)
        return self.frame(payload)

    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        """An `unsubscribe` push for a subscription that is over. v1 has no words for a gap: then
        the connection is closed, and the client is told `recovered: false` when it comes back."""
        if notice.kind != "revoked":
            return None
        # Whose token has expired is closed in the same turn. An unsubscribe push would keep
        # centrifuge-js from subscribing again once it has a new one.
        return b"" if notice.reason == "expired" else self.frame(codec.unsubscribe_push(channel))


def _push(event: Event) -> bytes:
    if event.id is None and event.door == DOOR and event.type in PRESENCE_TYPES:
        return codec.presence_push(event.type, event.channel, event.data)
    return codec.message_push(event)


def message(event: Event) -> bytes:
    """The event as history has it: made once, however many ask in the same moment."""
    data = event.frames.get(_MESSAGE)
    if data is None:
        data = event.frames[_MESSAGE] = codec.message(event)
    return data


async def encode_messages(events: Iterable[Event]) -> None:
    """Encode events for `message` in slices of time: a history may have many large ones."""
    async for event in in_slices(events):
        if event.is_json and _MESSAGE not in event.frames:
            compacted = await compact_in_slices(event.data)
            event.frames[_MESSAGE] = codec.message(event, compacted)


WEBSOCKET = CentrifugoEncoder(frame_text)
SOCKJS = CentrifugoEncoder(element)


def compressed(settings: CentrifugoSettings) -> CentrifugoEncoder:
    """For websockets that have agreed to permessage-deflate."""
    smallest, level = (
        settings.websocket_compression_min_size,
        settings.websocket_compression_level,
    )

    def frame(text: bytes) -> bytes:
        return frame_compressed(text, level) if len(text) >= smallest else frame_text(text)

    return CentrifugoEncoder(frame)
