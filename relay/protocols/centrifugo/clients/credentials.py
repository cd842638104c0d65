"""What a client's token says: who it is, and until when."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from relay.core.model import Channel, Principal
from relay.protocols.centrifugo import codec
from relay.protocols.centrifugo.encoders import DOOR

if TYPE_CHECKING:
    from relay.protocols.centrifugo.server_state import ServerState


class TokenLifetime(NamedTuple):
    """When the client is closed unless it refreshes, None for never; `expired`: it is too late."""

    closes_at: float | None
    expired: bool = False


def principal(
    door: ServerState, given: codec.ConnectParams, client: str, grant: Callable[[Channel], bool]
) -> tuple[Principal, bool]:
    """Whoever connects, and whether the token's time is over. Fatal where it is wrong; in insecure
    mode it is not looked at, and holds for ever."""
    term = TokenLifetime(None) if door.settings.insecure else renewed(door, given)
    who = Principal(
        user=given.user, client=client, door=DOOR, grant=grant, expires_at=term.closes_at
    )
    return who, term.expired


def renewed(door: ServerState, given: codec.ConnectParams) -> TokenLifetime:
    """Until when a token holds. Fatal where it is wrong."""
    settings, timestamp = door.settings, door.timestamp(given)
    if not settings.connection_lifetime:
        return TokenLifetime(None)
    ends = timestamp + settings.connection_lifetime
    return TokenLifetime(ends + settings.expired_connection_close_delay, ends <= door.clock())
