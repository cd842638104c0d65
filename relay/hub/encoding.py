"""Helpers to encode events as frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from relay.hub.session import Encoder

if TYPE_CHECKING:
    from relay.core.model import Event, Position
    from relay.hub.session import Subscription


class SharedEncoder(Encoder):
    """Base of an `Encoder` whose frames are the same for all clients."""

    personal = False

    @override
    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        del event, position, subscription
        return shared


def frame(encoder: Encoder, event: Event) -> bytes:
    """Return the frame of an event in the encoder's format. It is encoded once."""
    data = event.frames.get(encoder)
    if data is None:
        data = event.frames[encoder] = encoder.event(event)
    return data
