"""The Socket.IO side of a registration: acknowledgements and the saved session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from typing_extensions import override

from relay.core.errors import RelayError, Unavailable
from relay.core.reasons import Reason
from relay.doorkit.first_subscriptions import FirstSubscriptions
from relay.hub import cursor
from relay.protocols.pydio import codec
from relay.protocols.pydio.private_messages import BROADCAST, workspace
from relay.protocols.pydio.registration import Registration

if TYPE_CHECKING:
    from relay.core.model import Channel, Position
    from relay.hub.recovery import Notice
    from relay.hub.session import Subscription
    from relay.protocols.pydio.accounts import Account
    from relay.protocols.pydio.npm.encoders import NpmEncoder
    from relay.protocols.pydio.registration import BrowserServices
    from relay.transports.socketio.connection import Acknowledge


class BrowserConnection(Protocol):
    """The Socket.IO connection of a browser."""

    def encoder(self, masked: frozenset[str]) -> NpmEncoder:
        """Return the encoder for a user with path masks on these workspaces."""

    def subscriptions_changed(self) -> None:
        """Save the session again, because its channels or positions have changed."""

    def server_disconnect(self) -> None:
        """Disconnect the client for good."""

    def stop(self) -> None:
        """Close the connection, so that the client reconnects to another worker."""


class NpmBrowser(Registration):
    """The Socket.IO side of a registration."""

    __slots__ = ("_acknowledge", "_connection", "_first", "_start")

    def __init__(
        self, account: Account, services: BrowserServices, connection: BrowserConnection
    ) -> None:
        super().__init__(account, services)
        self._connection = connection
        self._acknowledge: tuple[str, Acknowledge] | None = None
        self._first = FirstSubscriptions(services.not_reading, services.clock)
        self._start: dict[Channel, bytes] = {}

    async def enter(self, repository: str | None, positions: Mapping[Channel, Position]) -> None:
        """Subscribe to broadcast events and to the workspace of a resumed session.

        Returns once the subscriptions are confirmed. Raises Unavailable.
        """
        self.repository = repository
        channels = channels_of(repository)
        self._first.expect(channels)
        for channel in channels:
            self.join(channel, positions.get(channel))
        if (session := self.session) is not None:
            # A browser without broadcasts can still register for a workspace.
            await self._first.wait(session, needs_one=False)
        self._services.deferred.report(self._first.away)

    def request(self, repository: str | None, acknowledge: Acknowledge | None) -> None:
        """Register for a workspace, or unregister if it is None."""
        if self._acknowledge is not None:
            self._acknowledge[1]({"ok": False})
        self._acknowledge = None
        if repository is None:
            self.unregister()
            if acknowledge is not None:
                acknowledge({"ok": True})
            return
        if acknowledge is not None:
            self._acknowledge = (repository, acknowledge)
        self.register(repository)

    def close(self) -> None:
        """End the registration, because the connection is closed or another one has the session."""
        self.account.members.discard(self)
        self._first.fail(Unavailable("the client has disconnected"))

    def start(self) -> str:
        """Return a cursor of the positions where the browser's subscriptions began."""
        return cursor.join(self._start.values()).decode()

    # ---- of `Registration` ------------------------------------------------------------------

    @override
    def encoder(self, masked: frozenset[str]) -> NpmEncoder:
        return self._connection.encoder(masked)

    @override
    def send_content(self, content: bytes) -> None:
        session = self.session
        if session is not None:
            encoder = self.encoder(self.account.identity.masked)
            session.reply(encoder.content(content, session.subscriptions))

    @override
    def disconnect(self, reason: Reason) -> None:
        if reason == Reason.STOPPING:
            self._connection.stop()
        else:
            self._connection.server_disconnect()

    @override
    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        # The frame contains the client's own cursor, so that the encoder cannot build it.
        del subscription
        self.send_content(codec.content_of(notice))

    @override
    def decided(self, repository: str, *, granted: bool) -> None:
        if self._acknowledge is not None and self._acknowledge[0] == repository:
            pending, self._acknowledge = self._acknowledge, None
            pending[1]({"ok": granted})

    @override
    def subscribed(self, subscription: Subscription) -> None:
        channel = subscription.feed.channel
        self._start[channel] = cursor.part(channel, subscription.position)
        super().subscribed(subscription)
        self._first.decide(channel)

    @override
    def refused(self, channel: Channel, error: RelayError) -> None:
        if isinstance(error, Unavailable) and self._first.is_waiting:
            # The connection will be closed, and the client reconnects by itself.
            self._first.fail(error)
            return
        super().refused(channel, error)
        self._first.decide(channel)

    @override
    def subscriptions_changed(self) -> None:
        wanted = set(channels_of(self.repository))
        self._start = {name: part for name, part in self._start.items() if name in wanted}
        self._connection.subscriptions_changed()


def channels_of(repository: str | None) -> list[Channel]:
    """Return the channels of a browser that is registered for this workspace."""
    return [BROADCAST] if repository is None else [BROADCAST, workspace(repository)]
