"""One browser of either kind, and the workspace that it has registered for.

A browser receives broadcasts, and the events of at most one workspace. A request for a workspace
that it may not read changes nothing (ws-server.php, `onMessage`). Pydio's protocol has no message
for missed events: a browser that may have missed some is instructed to read its folder again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from relay.core.errors import ClientError, RelayError, Unavailable
from relay.core.reasons import Reason
from relay.doorkit.rate_limit import RateLimit
from relay.hub.session import Client, SubscriptionMode
from relay.protocols.pydio import codec
from relay.protocols.pydio.accounts import AccountMember
from relay.protocols.pydio.private_messages import BROADCAST, workspace

if TYPE_CHECKING:
    import asyncio

    from relay.core.clock import RedisClock
    from relay.core.model import Channel, Position
    from relay.doorkit.first_subscriptions import DeferredLog
    from relay.hub.recovery import Notice
    from relay.hub.session import Encoder, Session, Subscription
    from relay.protocols.pydio.accounts import Account

# A page sends one message for each workspace that its user opens.
_MESSAGES_PER_S = 5.0
_MESSAGES_BURST = 50.0
_RETRY_S = 1.0
# If a subscription takes longer than this, the page may have listed its folder before events that
# it did not receive.
_LATE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BrowserServices:
    """The functions that all browsers share."""

    subscribe: Callable[[Session, Channel, Position | None], None]
    count_rejection: Callable[[Reason], None]
    # Ask Pydio again about the account, then call the function.
    renew: Callable[[Account, Callable[[], None]], None]
    loop: asyncio.AbstractEventLoop
    # As in `DoorContext`.
    not_reading: Callable[[Sequence[Channel]], str]
    clock: RedisClock
    deferred: DeferredLog


class Registration(Client, AccountMember):
    """State of one browser. Subclasses implement the two transports."""

    __slots__ = (
        "_rate",
        "_requested",
        "_requested_at",
        "_services",
        "account",
        "repository",
        "session",
    )

    def __init__(self, account: Account, services: BrowserServices) -> None:
        self.session: Session | None = None
        self.account = account
        # The workspace that the browser is registered for. The subscription may still be pending.
        self.repository: str | None = None
        self._services = services
        # The last requested workspace, if the user may not read it. It may be granted later.
        self._requested: str | None = None
        # Times at which pending subscriptions were requested.
        self._requested_at: dict[Channel, float] = {}
        self._rate = RateLimit(_MESSAGES_PER_S, _MESSAGES_BURST, services.loop.time)

    # ---- implemented by subclasses ----------------------------------------------------------

    def encoder(self, masked: frozenset[str]) -> Encoder:
        """Return the encoder for a user with path masks on these workspaces."""
        raise NotImplementedError

    def send_content(self, content: bytes) -> None:
        """Send an instruction of relay."""
        raise NotImplementedError

    def decided(self, repository: str, *, granted: bool) -> None:
        """Handle the result of a request to register."""

    def subscriptions_changed(self) -> None:
        """Handle a change of the channels, or of the positions at which they began."""

    # ---- requests of the browser ------------------------------------------------------------

    def join_broadcast(self) -> None:
        """Deliver broadcast events, even if the browser has not registered for a workspace."""
        self.join(BROADCAST)

    def register(self, repository: str) -> None:
        """Deliver events of this workspace, and of no other."""
        self._requested = repository
        if not self._grant_requested():
            # Pydio may have granted it a moment ago: a page requests what Pydio shows to its user.
            self._services.renew(self.account, self._on_renewed)

    def unregister(self) -> None:
        """Deliver events of no workspace."""
        self._requested = None
        self._move_to(None)

    def _on_renewed(self) -> None:
        requested = self._requested
        if requested is not None and not self._grant_requested() and self.is_open:
            self._services.count_rejection(Reason.FORBIDDEN)
            self.decided(requested, granted=False)

    def _grant_requested(self) -> bool:
        requested = self._requested
        if requested is None or not self.is_open or not self.account.may_read(requested):
            return False
        self._requested = None
        self._move_to(requested)
        return True

    def _move_to(self, repository: str | None) -> None:
        if repository == self.repository:
            self._confirm_registration()
            return
        if self.repository is not None:
            self._leave(workspace(self.repository))
        self.repository = repository
        if repository is None:
            self.subscriptions_changed()
        else:
            self.join(workspace(repository))

    def within_rate(self) -> bool:
        """Count one message. Return False if there were too many."""
        return self._rate.accept()

    # ---- subscriptions ----------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Return True if the session has not ended."""
        return self.session is not None and not self.session.closed

    def join(self, channel: Channel, position: Position | None = None) -> None:
        """Subscribe to a channel, unless the browser has left it meanwhile."""
        session = self.session
        if session is None or session.closed or not self._wants(channel):
            return
        if channel in session.subscriptions or channel in session.reserved:
            return
        if position is None:
            self._requested_at.setdefault(channel, self._services.loop.time())
        try:
            self._services.subscribe(session, channel, position)
        except Unavailable:
            self._join_later(channel)
        except ClientError as exc:
            self._services.count_rejection(exc.code)

    def _join_later(self, channel: Channel) -> None:
        self._services.loop.call_later(_RETRY_S, self.join, channel)

    def _leave(self, channel: Channel) -> None:
        session = self.session
        self._requested_at.pop(channel, None)
        if session is not None and (
            channel in session.subscriptions or channel in session.reserved
        ):
            session.hub.unsubscribe(session, channel)

    def _wants(self, channel: Channel) -> bool:
        if channel == BROADCAST:
            return True
        return self.repository is not None and channel == workspace(self.repository)

    def _confirm_registration(self) -> None:
        session, repository = self.session, self.repository
        if session is not None and repository and workspace(repository) in session.subscriptions:
            self.decided(repository, granted=True)

    # ---- callbacks of the hub ---------------------------------------------------------------

    @override
    def subscribed(self, subscription: Subscription) -> None:
        channel = subscription.feed.channel
        now = self._services.loop.time()
        if now - self._requested_at.pop(channel, now) > _LATE_S:
            self.send_content(codec.RELOAD_FOLDER)
        self.subscriptions_changed()
        if channel != BROADCAST:
            self._confirm_registration()

    @override
    def refused(self, channel: Channel, error: RelayError) -> None:
        if isinstance(error, Unavailable):
            # Streams cannot be read now.
            if self._wants(channel):
                self._join_later(channel)
            return
        if isinstance(error, ClientError):
            self._services.count_rejection(error.code)
        repository = self.repository
        self._end_registration(channel)
        if repository is not None and channel == workspace(repository):
            self.decided(repository, granted=False)

    @override
    def dropped(self, channel: Channel, notice: Notice) -> None:
        # The notice has already instructed the page to read its workspaces again.
        del notice
        self._end_registration(channel)

    def _end_registration(self, channel: Channel) -> None:
        self._requested_at.pop(channel, None)
        if channel != BROADCAST and self._wants(channel):
            # The user has lost the right that relay stores, but may get it back. Pydio's own rights
            # have not changed.
            self._requested, self.repository = self.repository, None
            self.subscriptions_changed()

    @override
    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        # The hub does not call this: the encoders express every notice.
        pass

    @override
    def expired(self) -> None:
        # The hub does not call this: principals of Pydio have no expiry time.
        pass

    # ---- callbacks of the account -----------------------------------------------------------

    @override
    def rights_changed(self) -> None:
        requested = self._requested
        if requested is not None:
            # If the workspace is granted now, the page must read its folder: it has received no
            # events since its request.
            self._requested_at[workspace(requested)] = -math.inf
            if not self._grant_requested():
                del self._requested_at[workspace(requested)]

    @override
    def identity_changed(self, account: Account) -> None:
        session = self.session
        if session is None or session.closed:
            return
        if session.principal.groups != account.principal.groups:
            session.hub.change_principal(session, account.principal)
        encoder = self.encoder(account.identity.masked)
        if encoder is not session.encoder:
            # Subscribe again at the same positions, so that no event is missed or sent twice.
            positions = [(name, _position(each)) for name, each in session.subscriptions.items()]
            for channel, _ in positions:
                session.hub.unsubscribe(session, channel)
            session.encoder = encoder
            for channel, position in positions:
                self.join(channel, position)
        self._grant_requested()


def _position(subscription: Subscription) -> Position | None:
    """Return the position to continue from, or None if delivery has not begun."""
    begun = subscription.mode is not SubscriptionMode.NEW
    return subscription.position if begun else subscription.start
