"""How events become bytes of one protocol: the interface that doors implement.

An encoder is one object for all sessions of one format, and its identity is the cache key: an
event is encoded and framed once for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from relay.core.model import Channel, Event, Position
from relay.hub.recovery import Notice

if TYPE_CHECKING:
    from relay.hub.session import Subscription


class Encoder(Protocol):
    """Bytes on the wire, framed, for what the hub has to say."""

    # Whose clients speak this format: `Event.door`.
    door: str
    # True where a frame differs from client to client, as one that carries the whole cursor.
    personal: bool

    def event(self, event: Event) -> bytes:
        """One event's frame, the same for every client (for a personal encoder: all of the frame
        that is the same)."""

    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        """What one client gets, b"" for nothing; `shared` is what `event` gave. `position` is where
        the client is in the event's channel with it, None for the ephemeral kind."""

    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        """What a client may have missed, or that it lost a channel; None where the protocol has no
        words for it: then each client's `noticed` is called."""


class SharedEncoder:
    """The part of an `Encoder` whose frames are the same for every client."""

    personal = False

    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        """Nothing here is personal."""
        del event, position, subscription
        return shared


def frame(encoder: Encoder, event: Event) -> bytes:
    """`event` in `encoder`'s format, made once."""
    data = event.frames.get(encoder)
    if data is None:
        data = event.frames[encoder] = encoder.event(event)
    return data
