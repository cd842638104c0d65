"""What a client's token says: who it is, and until when."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from relay.core.model import Channel, Principal
from relay.protocols.centrifugo import codec
from relay.protocols.centrifugo.encoders import DOOR

if TYPE_CHECKING:
    from relay.protocols.centrifugo.server_state import Door


class Term(NamedTuple):
    """When the client is closed unless it refreshes, None for never; `expired`: it is too late."""

    closes_at: float | None
    expired: bool = False


def principal(
    door: Door, given: codec.Credentials, client: str, grant: Callable[[Channel], bool]
) -> tuple[Principal, bool]:
    """Whoever connects, and whether the token's time is over. Fatal where it is wrong; in insecure
    mode it is not looked at, and holds for ever."""
    term = Term(None) if door.settings.insecure else renewed(door, given)
    who = Principal(
        user=given.user, client=client, door=DOOR, grant=grant, expires_at=term.closes_at
    )
    return who, term.expired


def renewed(door: Door, given: codec.Credentials) -> Term:
    """Until when a token holds. Fatal where it is wrong."""
    settings, timestamp = door.settings, door.timestamp(given)
    if not settings.connection_lifetime:
        return Term(None)
    ends = timestamp + settings.connection_lifetime
    return Term(ends + settings.expired_connection_close_delay, ends <= door.clock())
