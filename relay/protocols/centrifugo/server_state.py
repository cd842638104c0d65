"""What all connections of the door share: its settings, its clock, what it is given and needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

from relay.protocols.centrifugo import codec, tokens
from relay.protocols.centrifugo.channels import ChannelNames
from relay.protocols.centrifugo.encoders import DOOR, CentrifugoEncoder
from relay.protocols.centrifugo.presence import ChannelPresence
from relay.protocols.centrifugo.publisher import ChannelPublisher
from relay.protocols.centrifugo.stats import Stats

if TYPE_CHECKING:
    import asyncio

    from relay.core.model import Channel
    from relay.doorkit.contract import DoorContext
    from relay.hub.session import Session
    from relay.protocols.centrifugo.clients.connection import CentrifugoConnection
    from relay.protocols.centrifugo.settings import CentrifugoSettings


class FatalError(Exception):
    """The connection is over: close code 3000, and why, in v1's words."""

    def __init__(self, reason: str, *, reconnect: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reconnect = reconnect


class ClientTransport(Protocol):
    """The client's socket: a websocket or a SockJS session."""

    full: bool

    def write(self, data: bytes) -> None:
        """Framed bytes."""

    def close(self, last: bytes = b"") -> None:
        """After everything is out."""

    def close_with(self, code: int, reason: str = "") -> None:
        """Close with a code and a reason."""

    def abort(self) -> None:
        """Close now."""

    def waiting_bytes(self) -> int:
        """What is held for the client."""


class ReadControl(Protocol):
    """Where the client is read from."""

    def pause_reading(self) -> None:
        """Nothing more for now."""

    def resume_reading(self) -> None:
        """Go on."""


class ServerState:
    """`clock` is seconds since the epoch; `call_later` is the loop's."""

    def __init__(
        self,
        context: DoorContext,
        settings: CentrifugoSettings,
        *,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle],
    ) -> None:
        self.context = context
        self.clock = clock
        self.call_later = call_later
        # Connections that are in no hub yet; a stop cuts them.
        self.unauthenticated: set[CentrifugoConnection] = set()
        self._use(settings)
        context.hub.on_not_subscribed[DOOR] = _tell_unsubscribed
        self.stats = Stats()
        self.presence = ChannelPresence(
            context, lambda channel: self.names.rules(channel), self.stats
        )
        self.publisher = ChannelPublisher(
            context, lambda channel: self.names.rules(channel), clock, self.stats
        )

    def reload(self, settings: CentrifugoSettings) -> None:
        """From now on these count, for open connections too."""
        before = self.names
        self._use(settings)
        sessions = self.context.hub.sessions()
        connections = [
            cast("CentrifugoConnection", session.client).subscriptions
            for session in sessions
            if session.principal.door == DOOR
        ]
        reloaded = self.presence.reloaded(before, connections)
        _ = self.context.spawn(reloaded, name="centrifugo presence")

    def _use(self, settings: CentrifugoSettings) -> None:
        self.settings = settings
        self.names = ChannelNames(settings)
        self._secret = settings.secret.get_secret_value().encode()

    def authenticated(self, connection: CentrifugoConnection) -> None:
        """It is in the hub from now on."""
        self.unauthenticated.discard(connection)
        self.stats.count("client_num_connect", "node_num_add_client_conn")

    def may_be_published_to(self, channel: str) -> bool:
        """By the API. Where no namespace is configured, a channel may have any but another door's:
        such a site has the rules of [namespace]."""
        return not self.settings.namespaces or self.names.rules(channel) is not None

    def timestamp(self, given: codec.ConnectParams) -> int:
        """Of credentials whose token is right; Fatal otherwise, the token first."""
        signed = given.user, given.timestamp, given.info
        if not tokens.is_signed(self._secret, given.token, *signed):
            raise FatalError(codec.INVALID_TOKEN)
        timestamp = tokens.parse_timestamp(given.timestamp)
        if timestamp is None:
            raise FatalError(codec.INVALID_MESSAGE)
        return timestamp


def _tell_unsubscribed(session: Session, channel: Channel) -> None:
    # v1 pushes it to all of the user's connections, whatever they are subscribed to.
    if isinstance(session.encoder, CentrifugoEncoder):
        session.reply(session.encoder.frame(codec.unsubscribe_push(channel)))
