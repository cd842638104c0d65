"""One browser, whichever kind: at most one workspace at a time, and what is for everybody.

A workspace that may not be read leaves everything as it was (ws-server.php, `onMessage`). What a
browser could not be told in time becomes the instruction to read its folder again, since its
protocol has no other words for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relay.core.errors import ClientError, RelayError, Unavailable
from relay.core.reasons import Reason
from relay.protocols.pydio import codec
from relay.protocols.pydio.private_messages import EVERYBODY, workspace

if TYPE_CHECKING:
    import asyncio

    from relay.core.model import Channel, Position
    from relay.hub.recovery import Notice
    from relay.hub.session import Encoder, Session, Subscription
    from relay.protocols.pydio.accounts import Account

# A page sends one message for each workspace that its user opens.
_MESSAGES_PER_S = 5.0
_MESSAGES_BURST = 50.0
_TRY_AGAIN_S = 1.0
# A subscription that took longer to stand has passed over what the page may not have listed.
_LATE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a browser needs of the door; one object for all."""

    subscribe: Callable[[Session, Channel, Position | None], None]
    refused: Callable[[Reason], None]
    ask_again: Callable[[Account, Callable[[], None]], None]
    loop: asyncio.AbstractEventLoop


class Registration:
    """The state machine; see `relay.hub.session.Client` and `accounts.Member`."""

    __slots__ = (
        "_allowance",
        "_around",
        "_asked_at",
        "_seen_at",
        "_wish",
        "account",
        "repository",
        "session",
    )

    def __init__(self, account: Account, around: Surroundings) -> None:
        self.session: Session | None = None
        self.account = account
        # Where it is registered, or shall be as soon as streams can be read.
        self.repository: str | None = None
        self._around = around
        # What it has asked for last and may not read; it may be granted yet.
        self._wish: str | None = None
        # Since when it waits for subscriptions that do not stand yet.
        self._asked_at: dict[Channel, float] = {}
        self._allowance = _MESSAGES_BURST
        self._seen_at = around.loop.time()

    # ---- what the kinds do differently ------------------------------------------------------

    def encoder(self, masked: frozenset[str]) -> Encoder:
        """The format for somebody with masks on these workspaces."""
        raise NotImplementedError

    def say(self, content: bytes) -> None:
        """A content that is the relay's own."""
        raise NotImplementedError

    def shut_out(self, reason: str) -> None:
        """See `accounts.Member`."""
        raise NotImplementedError

    def disconnect(self, reason: Reason) -> None:
        """See `relay.hub.session.Client`."""
        raise NotImplementedError

    def decided(self, repository: str, *, granted: bool) -> None:
        """What came of a wish to register."""

    def settled(self) -> None:
        """It is in other streams now, or in a known place of one."""

    # ---- from the browser -------------------------------------------------------------------

    def begin(self) -> None:
        """What is for everybody is for it, registered or not."""
        self.join(EVERYBODY)

    def register(self, repository: str) -> None:
        """It wants events of this workspace, in the place of any other."""
        self._wish = repository
        if not self._grant_wish():
            # It may have been granted a moment ago: a page asks for what its own Pydio shows it.
            self._around.ask_again(self.account, self._wish_decided)

    def unregister(self) -> None:
        """It wants events of none."""
        self._wish = None
        self._move_to(None)

    def _wish_decided(self) -> None:
        wish = self._wish
        if wish is not None and not self._grant_wish() and self.alive:
            self._around.refused(Reason.FORBIDDEN)
            self.decided(wish, granted=False)

    def _grant_wish(self) -> bool:
        wish = self._wish
        if wish is None or not self.alive or not self.account.may_read(wish):
            return False
        self._wish = None
        self._move_to(wish)
        return True

    def _move_to(self, repository: str | None) -> None:
        if repository == self.repository:
            self._told_where_it_is()
            return
        if self.repository is not None:
            self._leave(workspace(self.repository))
        self.repository = repository
        if repository is None:
            self.settled()
        else:
            self.join(workspace(repository))

    def within_rate(self) -> bool:
        """Counts one message; False where there have been too many."""
        now = self._around.loop.time()
        earned = (now - self._seen_at) * _MESSAGES_PER_S
        self._seen_at = now
        self._allowance = min(_MESSAGES_BURST, self._allowance + earned) - 1
        return self._allowance >= 0

    # ---- subscriptions ----------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the hub still knows it."""
        return self.session is not None and not self.session.closed

    def join(self, channel: Channel, position: Position | None = None) -> None:
        """Follow a stream that it still wants."""
        session = self.session
        if session is None or session.closed or not self._wants(channel):
            return
        if channel in session.subscriptions or channel in session.reserved:
            return
        if position is None:
            self._asked_at.setdefault(channel, self._around.loop.time())
        try:
            self._around.subscribe(session, channel, position)
        except Unavailable:
            self._join_later(channel)
        except ClientError as exc:
            self._around.refused(exc.code)

    def _join_later(self, channel: Channel) -> None:
        self._around.loop.call_later(_TRY_AGAIN_S, self.join, channel)

    def _leave(self, channel: Channel) -> None:
        session = self.session
        self._asked_at.pop(channel, None)
        if session is not None and (
            channel in session.subscriptions or channel in session.reserved
        ):
            session.hub.unsubscribe(session, channel)

    def _wants(self, channel: Channel) -> bool:
        if channel == EVERYBODY:
            return True
        return self.repository is not None and channel == workspace(self.repository)

    def _told_where_it_is(self) -> None:
        session, repository = self.session, self.repository
        if session is not None and repository and workspace(repository) in session.subscriptions:
            self.decided(repository, granted=True)

    # ---- from the hub (relay.hub.session.Client) --------------------------------------------

    def subscribed(self, subscription: Subscription) -> None:
        """See `relay.hub.session.Client`."""
        channel = subscription.feed.channel
        now = self._around.loop.time()
        if now - self._asked_at.pop(channel, now) > _LATE_S:
            self.say(codec.RELOAD_FOLDER)
        self.settled()
        if channel != EVERYBODY:
            self._told_where_it_is()

    def refused(self, channel: Channel, error: RelayError) -> None:
        """Where streams cannot be read now, it is tried again."""
        if isinstance(error, Unavailable):
            if self._wants(channel):
                self._join_later(channel)
            return
        if isinstance(error, ClientError):
            self._around.refused(error.code)
        repository = self.repository
        self._end_registration(channel)
        if repository is not None and channel == workspace(repository):
            self.decided(repository, granted=False)

    def dropped(self, channel: Channel, notice: Notice) -> None:
        """The registration is over; the notice has made the page read its workspaces again."""
        del notice
        self._end_registration(channel)

    def _end_registration(self, channel: Channel) -> None:
        self._asked_at.pop(channel, None)
        if channel != EVERYBODY and self._wants(channel):
            # Pydio may still grant it: only the site's rights were lost, which may come back.
            self._wish, self.repository = self.repository, None
            self.settled()

    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        """Never called: the formats have words for every notice."""

    def expired(self) -> None:
        """Never called: an account has its own clock."""

    # ---- from the account (relay.protocols.pydio.accounts.Member) ---------------------------

    def rights_changed(self) -> None:
        """See `accounts.Member`."""
        wish = self._wish
        if wish is not None:
            # The page has not seen what happened meanwhile: it reads its folder then.
            self._asked_at[workspace(wish)] = -math.inf
            if not self._grant_wish():
                del self._asked_at[workspace(wish)]

    def identity_changed(self, account: Account) -> None:
        """See `accounts.Member`."""
        session = self.session
        if session is None or session.closed:
            return
        if session.principal.groups != account.principal.groups:
            session.hub.change_principal(session, account.principal)
        encoder = self.encoder(account.identity.masked)
        if encoder is not session.encoder:
            # Its place in each stream stays, so that nothing is missed or said twice.
            places = [(channel, _place(each)) for channel, each in session.subscriptions.items()]
            for channel, _ in places:
                session.hub.unsubscribe(session, channel)
            session.encoder = encoder
            for channel, position in places:
                self.join(channel, position)
        self._grant_wish()


def _place(subscription: Subscription) -> Position | None:
    """Where it goes on; None where it has not begun."""
    begun = subscription.live or subscription.cursor is not None
    return subscription.position if begun else subscription.asked
