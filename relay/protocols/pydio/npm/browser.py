"""The Socket.IO side of a registration: acknowledgements and the saved session."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from relay.core.errors import RelayError, Unavailable
from relay.core.reasons import Reason
from relay.hub import cursor
from relay.protocols.pydio import codec
from relay.protocols.pydio.private_messages import EVERYBODY, workspace
from relay.protocols.pydio.registration import Registration

if TYPE_CHECKING:
    from relay.core.model import Channel, Position
    from relay.hub.recovery import Notice
    from relay.hub.session import Subscription
    from relay.protocols.pydio.accounts import Account
    from relay.protocols.pydio.npm.encoders import NpmEncoder
    from relay.protocols.pydio.registration import Surroundings
    from relay.transports.socketio.connection import Acknowledge


class BrowserConnection(Protocol):
    """The Socket.IO connection of a browser."""

    def encoder(self, masked: frozenset[str]) -> NpmEncoder:
        """Return the encoder for a user with path masks on these workspaces."""

    def moved(self) -> None:
        """Save the session again, because its channels or positions have changed."""

    def server_disconnect(self) -> None:
        """Disconnect the client for good."""

    def stop(self) -> None:
        """Close the connection, so that the client reconnects to another worker."""


class NpmBrowser(Registration):
    """The Socket.IO side of a registration."""

    __slots__ = ("_admitted", "_awaited", "_connection", "_expected", "_positions", "_start")

    def __init__(
        self, account: Account, around: Surroundings, connection: BrowserConnection
    ) -> None:
        super().__init__(account, around)
        self._connection = connection
        self._awaited: tuple[str, Acknowledge] | None = None
        self._admitted: asyncio.Future[None] = around.loop.create_future()
        self._expected: set[Channel] = set()
        self._start: dict[Channel, bytes] = {}

    async def enter(self, repository: str | None, positions: Mapping[Channel, Position]) -> None:
        """Subscribe to broadcast events and to the workspace of a resumed session.

        Returns once the subscriptions are confirmed. Raises Unavailable.
        """
        self.repository = repository
        self._expected = set(channels_of(repository))
        for channel in channels_of(repository):
            self.join(channel, positions.get(channel))
        await self._admitted

    def asks(self, repository: str | None, acknowledge: Acknowledge | None) -> None:
        """Register for a workspace, or unregister if it is None."""
        if self._awaited is not None:
            self._awaited[1]({"ok": False})
        self._awaited = None
        if repository is None:
            self.unregister()
            if acknowledge is not None:
                acknowledge({"ok": True})
            return
        if acknowledge is not None:
            self._awaited = (repository, acknowledge)
        self.register(repository)

    def gone(self) -> None:
        """End the registration, because the connection is closed or another one has the session."""
        self.account.members.discard(self)
        if not self._admitted.done():
            self._admitted.set_exception(Unavailable("the client has gone"))
            # Retrieve the exception, because no task may be waiting for it yet.
            self._admitted.exception()

    def start(self) -> str:
        """Return a cursor of the positions where the browser's subscriptions began."""
        return cursor.join(self._start.values()).decode()

    # ---- see `Registration` -----------------------------------------------------------------

    def encoder(self, masked: frozenset[str]) -> NpmEncoder:
        """See `Registration`."""
        return self._connection.encoder(masked)

    def say(self, content: bytes) -> None:
        """See `Registration`."""
        session = self.session
        if session is not None:
            encoder = self.encoder(self.account.identity.masked)
            session.reply(encoder.content(content, session.subscriptions))

    def shut_out(self, reason: str) -> None:
        """See `Registration`."""
        del reason
        self._connection.server_disconnect()

    def disconnect(self, reason: Reason) -> None:
        """See `Registration`."""
        if reason == Reason.STOPPING:
            self._connection.stop()
        else:
            self._connection.server_disconnect()

    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        """See `relay.hub.session.Client`; with the client's own cursor."""
        del subscription
        self.say(codec.content_of(notice))

    def decided(self, repository: str, *, granted: bool) -> None:
        """See `Registration`."""
        if self._awaited is not None and self._awaited[0] == repository:
            awaited, self._awaited = self._awaited, None
            awaited[1]({"ok": granted})

    def subscribed(self, subscription: Subscription) -> None:
        """See `relay.hub.session.Client`."""
        channel = subscription.feed.channel
        self._start[channel] = cursor.part(channel, subscription.position)
        super().subscribed(subscription)
        self._stands(channel)

    def refused(self, channel: Channel, error: RelayError) -> None:
        """See `relay.hub.session.Client`."""
        if isinstance(error, Unavailable) and not self._admitted.done():
            # The connection will be closed, and the client reconnects by itself.
            self._admitted.set_exception(error)
            return
        super().refused(channel, error)
        self._stands(channel)

    def settled(self) -> None:
        """See `Registration`."""
        wanted = set(channels_of(self.repository))
        self._start = {name: part for name, part in self._start.items() if name in wanted}
        self._connection.moved()

    def _stands(self, channel: Channel) -> None:
        self._expected.discard(channel)
        if not self._expected and not self._admitted.done():
            self._admitted.set_result(None)


def channels_of(repository: str | None) -> list[Channel]:
    """Return the channels of a browser that is registered for this workspace."""
    return [EVERYBODY] if repository is None else [EVERYBODY, workspace(repository)]
