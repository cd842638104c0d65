"""Verification of the clients' connection tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from relay.core.model import Channel, Principal
from relay.core.reasons import Reason
from relay.protocols.centrifugo import codec, tokens
from relay.protocols.centrifugo.clients.interfaces import FatalError
from relay.protocols.centrifugo.encoders import DOOR

if TYPE_CHECKING:
    from relay.protocols.centrifugo.server_state import ServerState


class TokenLifetime(NamedTuple):
    """Validity of a token.

    `closes_at` is when the client is closed unless it refreshes, or None if the token does not
    expire. `expired` is True if the token has already expired.
    """

    closes_at: float | None
    expired: bool = False


def authenticate(
    server: ServerState,
    params: codec.ConnectParams,
    client: str,
    grant: Callable[[Channel], bool],
) -> tuple[Principal, bool]:
    """Return the principal, and whether its token has expired.

    In insecure mode the token is not checked and does not expire. Raise FatalError if it is
    invalid.
    """
    insecure = server.settings.insecure
    lifetime = TokenLifetime(None) if insecure else check_token(server, params)
    principal = Principal(
        user=params.user, client=client, door=DOOR, grant=grant, expires_at=lifetime.closes_at
    )
    return principal, lifetime.expired


def check_token(server: ServerState, params: codec.ConnectParams) -> TokenLifetime:
    """Verify a token and return its lifetime. Raise FatalError if it is invalid."""
    if not tokens.is_signed(
        server.secret, params.token, params.user, params.timestamp, params.info
    ):
        raise FatalError(Reason.INVALID_TOKEN)
    timestamp = tokens.parse_timestamp(params.timestamp)
    if timestamp is None:
        raise FatalError(Reason.BAD_MESSAGE)
    settings = server.settings
    if not settings.connection_lifetime:
        return TokenLifetime(None)
    ends = timestamp + settings.connection_lifetime
    return TokenLifetime(ends + settings.expired_connection_close_delay, ends <= server.clock())
