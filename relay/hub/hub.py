"""All sessions of this worker, by channel and by user.

The hub does no I/O. It sends requests to `StreamReads` and writes to each `Outbox`. Everything that
one turn of the loop offers to a client is sent in one write at the end of that turn.
"""

from __future__ import annotations

import heapq
import itertools
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from relay.core.errors import BadRequest, LimitExceeded, Unauthorized
from relay.core.model import Channel, Position, Principal
from relay.core.reasons import Reason
from relay.core.slices import for_each
from relay.hub.feed import BatchObserver, Feed, FeedObserver, Rights
from relay.hub.recovery import Notice
from relay.hub.session import Session, SessionObserver, Subscription

if TYPE_CHECKING:
    from relay.core.connection import ConnectionInfo
    from relay.core.metrics import Metrics
    from relay.core.model import Broken
    from relay.core.stream_interface import StreamReads
    from relay.hub.session import Client, Encoder


T = TypeVar("T")


class Hub:
    """The sessions of this worker."""

    def __init__(
        self,
        *,
        rights: Rights,
        metrics: Metrics,
        call_soon: Callable[[Callable[[], None]], object],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        connections_per_user: int = 0,
        on_broken: Callable[[Channel, Broken], None] = lambda *_: None,
    ) -> None:
        """`spawn` starts a task for work that takes more than one turn of the loop. `on_broken`
        receives entries that cannot be decoded."""
        # Set before the first client subscribes; the reader needs the hub first.
        self.reads: StreamReads
        self.on_broken = on_broken
        self.rights = rights
        self.metrics = metrics
        self.dirty: list[Session] = []
        self.observer = SessionObserver()
        # Set while an operator watches the live tap.
        self.tap: FeedObserver | None = None
        # None if traces are disabled.
        self.trace: BatchObserver | None = None
        self.connections_per_user = connections_per_user
        # Called with a user whose number of sessions has changed.
        self.on_count: list[Callable[[str], None]] = []
        # By protocol: called if a user is unsubscribed from a channel, for each of the user's
        # sessions that is not subscribed. Some protocols confirm to these as well.
        self.on_not_subscribed: dict[str, Callable[[Session, Channel], None]] = {}
        self.total = 0
        # Number of sessions since the start.
        self.opened = 0
        # Subscriptions that receive pages. The feeds change it: to add up all of them takes long.
        self.behind_count = 0
        self._call_soon = call_soon
        self._spawn = spawn
        self._feeds: dict[Channel, Feed] = {}
        self._by_user: dict[str, set[Session]] = {}
        self._flush_planned = False
        self._expiries: list[tuple[float, int, weakref.ref[Session]]] = []
        self._numbers = itertools.count()

    # ---- sessions ---------------------------------------------------------------------------

    def open(
        self,
        principal: Principal,
        encoder: Encoder,
        client: Client,
        info: ConnectionInfo | None = None,
    ) -> Session:
        """Create a session, without a socket yet. LimitExceeded if the user has too many."""
        user = principal.user
        mine = self._by_user.get(user)
        if user and mine and 0 < self.connections_per_user <= len(mine):
            raise LimitExceeded(f"more than {self.connections_per_user} connections of one user")
        session = Session(self, principal, encoder, client, info)
        self._by_user.setdefault(user, set()).add(session)
        self.total += 1
        self.opened += 1
        for on_count in self.on_count:
            on_count(user)
        self._watch_expiry(session)
        return session

    def close(self, session: Session) -> None:
        """Remove a session and its subscriptions. Many subscriptions are removed in slices."""
        if session.closed:
            return
        session.closed = session.paused = True
        session.reserved.clear()
        left = list(session.subscriptions.values())
        self.observer.disconnected(session, left)
        session.subscriptions.clear()
        self.metrics.subscriptions.dec(len(left))
        self.for_each(left, _leave)
        user = session.principal.user
        mine = self._by_user.get(user, set())
        mine.discard(session)
        self.total -= 1
        if not mine:
            self._by_user.pop(user, None)
        for on_count in self.on_count:
            on_count(user)

    def count(self, user: str, door: str | None = None) -> int:
        """Return the user's number of sessions on this worker, in one protocol or in all."""
        mine = self._by_user.get(user, ())
        return len(mine) if door is None else len(self.sessions_of(user, door))

    def users(self) -> list[str]:
        """Return the users that have sessions on this worker. Anonymous ones are ''."""
        return list(self._by_user)

    def sessions(self) -> list[Session]:
        """Return all sessions, in no order."""
        return [session for mine in self._by_user.values() for session in mine]

    def change_principal(self, session: Session, principal: Principal) -> None:
        """Use a refreshed credential of the same user, and check its rights."""
        if principal.user != session.principal.user:
            raise Unauthorized("the new token is another user's")
        session.principal = principal
        session.selectors = principal.selectors()
        self._watch_expiry(session)
        for subscription in session.subscriptions.values():
            subscription.feed.on_rights_changed()

    # ---- subscriptions ----------------------------------------------------------------------

    def subscribe(self, session: Session, channel: Channel, start: Position | None) -> None:
        """Subscribe. The client's `subscribed` or `refused` is called in a later turn."""
        self._check_new(session, channel)
        feed = self._feeds.get(channel)
        if feed is None:
            feed = self._feeds[channel] = Feed(self, channel)
            self.metrics.streams.set(len(self._feeds))
            self.reads.follow(feed)
        subscription = session.subscriptions[channel] = Subscription(session, feed, start)
        self.metrics.subscriptions.inc()
        feed.join(subscription)

    def reserve(self, session: Session, channel: Channel) -> None:
        """Record that the client waits for an answer about its rights."""
        self._check_new(session, channel)
        session.reserved[channel] = None

    def subscribe_reserved(
        self, session: Session, channel: Channel, start: Position | None
    ) -> None:
        """End the wait and subscribe, unless the client has unsubscribed or disconnected."""
        if channel not in session.reserved:
            return
        deferred = session.reserved.pop(channel)
        self.subscribe(session, channel, start)
        if deferred is not None:
            session.defer(channel, deferred)

    @staticmethod
    def _check_new(session: Session, channel: Channel) -> None:
        if channel in session.subscriptions or channel in session.reserved:
            raise BadRequest(f"already subscribed to {channel}")

    def unsubscribe(self, session: Session, channel: Channel) -> None:
        """End a subscription. BadRequest if there is none."""
        if channel in session.reserved:
            del session.reserved[channel]
            return
        subscription = session.subscriptions.pop(channel, None)
        if subscription is None:
            raise BadRequest(f"not subscribed to {channel}")
        self.observer.unsubscribed(subscription, None)
        self.metrics.subscriptions.dec()
        subscription.feed.leave(subscription)

    def remove_feed(self, feed: Feed) -> None:
        """Remove a feed whose last client has left. The feed calls it."""
        if self._feeds.get(feed.channel) is feed:
            del self._feeds[feed.channel]
            feed.alive = False
            self.metrics.streams.set(len(self._feeds))
            self.reads.release(feed)

    def feed(self, channel: Channel) -> Feed | None:
        """Return the channel's feed, or None if no client of this worker follows the channel."""
        return self._feeds.get(channel)

    def feeds(self) -> list[Feed]:
        """Return the feeds of all followed channels."""
        return list(self._feeds.values())

    # ---- commands and expiry ----------------------------------------------------------------

    def disconnect_user(
        self, user: str, reason: Reason, door: str | None = None, count: int | None = None
    ) -> int:
        """Disconnect the user's sessions on this worker, in one protocol or in all.

        With `count`, disconnect only so many of them. Return their number.
        """

        def disconnect(session: Session) -> None:
            if not session.closed:
                session.disconnect(reason)

        concerned = self.sessions_of(user, door)[:count]
        self.for_each(concerned, disconnect)
        return len(concerned)

    def drop_subscription(
        self, channel: Channel | None, user: str, reason: Reason, door: str | None = None
    ) -> None:
        """Unsubscribe the user's sessions on this worker from a channel, or from all channels."""

        def drop(subscription: Subscription) -> None:
            at = subscription.feed.position
            subscription.feed.drop(subscription, Notice("revoked", reason, at, at))

        def drop_from(session: Session) -> None:
            if session.closed:
                return
            if channel is None:
                self.for_each(list(session.subscriptions.values()), drop)
            elif subscription := session.subscriptions.get(channel):
                drop(subscription)
            elif on_not_subscribed := self.on_not_subscribed.get(session.principal.door):
                on_not_subscribed(session, channel)

        self.for_each(self.sessions_of(user, door), drop_from)

    def subscriptions_of(
        self, user: str, door: str | None = None, channel: Channel | None = None
    ) -> list[Subscription]:
        """Return the user's subscriptions on this worker, to one channel or to all."""
        found: list[Subscription] = []
        for session in self.sessions_of(user, door):
            if channel is None:
                found += session.subscriptions.values()
            elif subscription := session.subscriptions.get(channel):
                found.append(subscription)
        return found

    def sessions_of(self, user: str, door: str | None = None) -> list[Session]:
        """Return the user's sessions on this worker, in one protocol or in all."""
        mine = self._by_user.get(user, ())
        return [session for session in mine if door in (None, session.principal.door)]

    def recheck(self, channel: Channel | None) -> None:
        """Check rights again, for one channel or for all."""
        feed = self._feeds.get(channel) if channel else None
        feeds = self.feeds() if channel is None else [feed] if feed else []
        self.for_each(feeds, lambda each: each.on_rights_changed())

    def for_each(self, items: Sequence[T], act: Callable[[T], object]) -> None:
        """Call `act` for each of the items: of a few at once, of many in slices."""
        for_each(items, act, self._spawn)

    def _watch_expiry(self, session: Session) -> None:
        expires_at = session.principal.expires_at
        if expires_at is not None:
            entry = (expires_at, next(self._numbers), weakref.ref(session))
            heapq.heappush(self._expiries, entry)

    def sessions_expiring(self, now: float) -> list[Session]:
        """Return the sessions whose credential has expired and was not refreshed."""
        found = []
        while self._expiries and self._expiries[0][0] <= now:
            _, _, reference = heapq.heappop(self._expiries)
            session = reference()
            if session is None or session.closed:
                continue
            expires_at = session.principal.expires_at
            if expires_at is not None and expires_at <= now:
                found.append(session)
        return found

    def expire(self, session: Session) -> None:
        """End all subscriptions of a session whose credential has expired."""
        for subscription in list(session.subscriptions.values()):
            at = subscription.feed.position
            subscription.feed.drop(subscription, Notice("revoked", Reason.EXPIRED, at, at))
        session.ending = Reason.EXPIRED
        session.client.expired()

    # ---- the turn ---------------------------------------------------------------------------

    def flush(self) -> None:
        """Write what this turn has offered, once per client."""
        self._flush_planned = False
        dirty, self.dirty = self.dirty, []
        for session in dirty:
            session.write_out()

    def flush_soon(self) -> None:
        """Call `flush` at the end of this turn. For offers outside of the reader's own turn."""
        if not self._flush_planned:
            self._flush_planned = True
            self._call_soon(self.flush)


def _leave(subscription: Subscription) -> None:
    subscription.feed.leave(subscription)
