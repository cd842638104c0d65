"""One channel's stream and its local clients: live delivery, catch-up and resume.

The feed has one position W: all entries up to it were offered to all live clients. A subscription
is in one mode:

* *new*: it waits for an examination that starts after it joined. The examination reads rights and
  stream in one transaction, so that no revocation can fall between them.
* *behind*: it resumes, or its socket was full. It has its own cursor, and nothing is buffered for
  it. It receives pages, which all subscriptions that are behind on this stream share. It becomes
  live in the turn in which its cursor reaches W.
* *live*: its cursor is W. Entries go straight to its socket in the turn in which W advances.

A feed is *settled* while its position is known to belong to the current stream. After a lost
connection, a lost group or a gap, the stream is examined first: clients receive a notice of what
may be missing, and all rights are checked again, before delivery continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, cast

from relay.core.errors import Forbidden, RelayError, StreamRefused
from relay.core.model import ZERO_ID, Broken, EntryID, Event, Position, Revocation
from relay.core.reasons import Reason
from relay.core.stream_interface import ExamineRequest, PageRequest
from relay.hub import catch_up
from relay.hub.delivery import Batch
from relay.hub.live import LiveClients
from relay.hub.recovery import Notice, added_before_first, before, gap, judge, untrimmed
from relay.hub.session import SubscriptionMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.core.metrics import Metrics
    from relay.core.model import Channel, Principal, Record, StreamState
    from relay.core.stream_interface import Examined, Page, StreamReads
    from relay.hub.session import SessionObserver, Subscription


class Rights(Protocol):
    """Access control for reading."""

    def allowed(
        self, principal: Principal, channel: Channel, hash_value: bytes | None, *, admitted: bool
    ) -> bool:
        """Return True if the principal may read the channel now.

        `hash_value` is the user's field in the rights hash. `admitted`: the client had the right
        until now, so an answer that is being renewed is still valid.
        """

    def asks_again(self, principal: Principal, channel: Channel) -> bool:
        """Request the application's answer if it is missing. Return False if it is not.

        An answer may have expired while the client waited for the stream. `Feed.examine_waiting` is
        called after the new one.
        """


class BatchObserver(Protocol):
    """Is notified of each batch of entries."""

    def read(self, feed: Feed, records: Sequence[Record], offered: int) -> None:
        """Entries were offered to the live clients, `offered` times in all."""


class FeedObserver(BatchObserver, Protocol):
    """Is notified of each event while an operator watches."""

    def ephemeral(self, feed: Feed, event: Event) -> None:
        """An ephemeral event was offered to the live clients."""


class FeedHub(Protocol):
    """The hub as its feeds see it."""

    # None while no operator watches.
    tap: FeedObserver | None
    # None if traces are disabled.
    trace: BatchObserver | None
    reads: StreamReads
    on_broken: Callable[[Channel, Broken], None]
    observer: SessionObserver
    # Subscriptions of all feeds that receive pages.
    behind_count: int

    @property
    def rights(self) -> Rights:
        """Access control for reading channels."""

    @property
    def metrics(self) -> Metrics:
        """The worker's metrics."""

    def remove_feed(self, feed: Feed) -> None:
        """Remove a feed whose last client has left."""

    def flush_soon(self) -> None:
        """Write all offered data at the end of this turn of the loop."""


class _Hold:
    """A subscription that receives no entry after `stop`, until it is released."""

    __slots__ = ("reached", "stop", "was_read")

    def __init__(self, stop: EntryID, reached: Callable[[], None]) -> None:
        self.stop = stop
        self.reached = reached
        # The stream has been read to its end since the hold began.
        self.was_read = False


class Feed:
    """A followed stream. It does no I/O: it sends requests to `hub.reads` and receives replies."""

    def __init__(self, hub: FeedHub, channel: Channel) -> None:
        self.hub = hub
        self.channel = channel
        self.key = b""
        self.alive = True
        self.settled = False
        self.misaligned = True  # the group in Redis is not at `position`
        # Large until the entries' sizes are known. Reading too few small entries costs a second
        # read; reading too many large ones fills the memory.
        self.average_bytes = 8192.0
        self.position = ZERO_ID
        self.added: int | None = None
        self.digest: int | None = None
        self.incarnation: int | None = None
        # The highest deletion of which live clients were notified. It may be after the position.
        self._known_deleted = ZERO_ID
        self._examined = False
        self._new: dict[Subscription, None] = {}
        self._behind: dict[Subscription, None] = {}
        # Subscriptions that wait for a command, see `hold`. None of them is live.
        self._held: dict[Subscription, _Hold] = {}
        self._live = LiveClients(channel, hub.metrics)
        self._recheck = False
        # Live subscriptions whose right was revoked, until the next entries have been read.
        self._revoked: dict[Subscription, Notice] = {}
        # The next examination creates the stream's marker group.
        self._mark = False
        # The stream was found in Redis or created.
        self.exists = False
        # It has a marker group. If not, Redis refused to create one.
        self.marked = True
        self._members = 0

    @property
    def known(self) -> Position | None:
        """The position, or None if the stream was never examined."""
        if not self._examined:
            return None
        return Position(self.position, self.added, self.incarnation, self.digest)

    # ---- subscriptions ----------------------------------------------------------------------

    def join(self, subscription: Subscription) -> None:
        """Add a subscription. The next examination accepts or rejects it."""
        self._members += 1
        self._new[subscription] = None
        self.hub.reads.want_join(self)

    def leave(self, subscription: Subscription) -> None:
        """Remove a subscription in any mode. Called once for each that joined."""
        self._new.pop(subscription, None)
        self._remove_behind(subscription)
        if subscription.mode is SubscriptionMode.LIVE:
            self._live.remove(subscription)
        if self._held and (held := self._held.pop(subscription, None)):
            held.reached()
        self._members -= 1
        if not self._members:
            self.hub.remove_feed(self)

    def hold(self, subscription: Subscription, stop: EntryID, reached: Callable[[], None]) -> None:
        """Deliver no entry after `stop` to the subscription until `release` is called.

        `reached` is called once, when it has received all entries up to `stop` that exist at this
        moment, or when it has ended. The stream is read once more to find them.
        """
        if subscription.mode is SubscriptionMode.LIVE:
            self.stall(subscription)
        self._held[subscription] = _Hold(stop, reached)
        self.hub.reads.want_read(self)
        self.catch_up(subscription)

    def release(self, subscription: Subscription) -> None:
        """Continue delivery after `hold`."""
        if self._held.pop(subscription, None) is not None:
            self.catch_up(subscription)
            self.hub.flush_soon()

    def on_read_to_end(self) -> None:
        """Continue the held subscriptions: all entries that they wait for are known now."""
        for subscription, held in list(self._held.items()):
            if not held.was_read:
                held.was_read = True
                held.stop = min(held.stop, self.position)
                self.catch_up(subscription)

    def subscriptions(self) -> Iterator[Subscription]:
        """Yield the subscriptions that were accepted."""
        yield from self._live
        yield from self._behind

    def waiting(self) -> Iterator[Subscription]:
        """Yield the subscriptions that wait for the next examination."""
        yield from self._new

    @property
    def has_waiting(self) -> bool:
        """Return True if a client waits for the next examination."""
        return bool(self._new)

    @property
    def live_count(self) -> int:
        """Number of subscriptions that receive new entries at once."""
        return self._live.count

    @property
    def behind_count(self) -> int:
        """Number of subscriptions that receive pages."""
        return len(self._behind)

    # ---- examinations -----------------------------------------------------------------------

    def examine_request(self) -> ExamineRequest:
        """Return a request for all new subscriptions. Later ones wait for the next examination."""
        taken = tuple(self._new)
        self._new = {}
        users = {subscription.session.principal.user for subscription in taken}
        recheck, self._recheck = self._recheck, False
        mark, self._mark = self._mark, False
        if recheck:
            users |= {sub.session.principal.user for sub in self.subscriptions()}
        own = {
            sub.start.id
            for sub in taken
            if sub.start and not (self.settled and self._is_of_this_incarnation(sub.start))
        }
        if not self.settled and self._examined:
            own.add(self.position)
        own.discard(ZERO_ID)
        users.discard("")
        return ExamineRequest(tuple(users), tuple(own), (taken, recheck), mark)

    def _is_of_this_incarnation(self, position: Position) -> bool:
        return position.incarnation is not None and position.incarnation == self.incarnation

    def on_examine_failed(self, request: ExamineRequest, reason: str) -> None:
        """Reject the new subscriptions. The others continue, and deferred ones wait."""
        taken, recheck = _context_of(request)
        self._recheck |= recheck
        for subscription in taken:
            if subscription.has_ended:
                continue
            if subscription.is_deferred:
                self._new[subscription] = None
            else:
                self._refuse(subscription, StreamRefused(reason))

    def on_examine_lost(self, request: ExamineRequest) -> None:
        """Add the new subscriptions to the next examination."""
        taken, recheck = _context_of(request)
        self._recheck |= recheck
        for subscription in taken:
            if not subscription.has_ended:
                self._new[subscription] = None
        if self.alive:
            self.hub.reads.want_examine(self)

    def on_unsettled(self) -> None:
        """Stop delivery until an examination has checked the position."""
        if self.alive:
            self.settled = False
            self._recheck = True
            self.hub.reads.want_examine(self)

    def on_rights_changed(self) -> None:
        """Read the rights of all subscriptions again."""
        if self.alive:
            self._recheck = True
            self.hub.reads.want_examine(self)

    def examine_waiting(self) -> None:
        """Examine the stream for the waiting clients, because the application has answered."""
        if self._new:
            self.hub.reads.want_join(self)

    def on_examined(self, request: ExamineRequest, examined: Examined) -> None:
        """Settle the position, check rights, then place new subscriptions."""
        taken, recheck = _context_of(request)
        if examined.state.incarnation is None and not request.mark:
            self._request_marker(taken, recheck=recheck, examined=examined)
            return
        if not self.settled or examined.state.incarnation != self.incarnation:
            # A revocation may have been lost with the previous incarnation.
            if self._examined and not recheck:
                for subscription in taken:
                    if not subscription.has_ended:
                        self._new[subscription] = None
                self.on_unsettled()
                return
            self._settle(examined)
        if recheck:
            self._check_rights(examined)
        for subscription in taken:
            if not subscription.has_ended:
                self._place(subscription, examined)
        if self.alive:
            for subscription in list(self._behind):
                self.catch_up(subscription)

    def _request_marker(
        self, taken: Sequence[Subscription], *, recheck: bool, examined: Examined
    ) -> None:
        """Reject clients without a right, then request an examination that creates the marker.

        So nothing is written to Redis for a client before its right is confirmed. The second
        examination reads rights and stream together again: a revocation in between is seen.
        """
        self._recheck |= recheck
        is_confirmed = self._examined
        for subscription in taken:
            if subscription.has_ended:
                continue
            if self._may_join(subscription, examined):
                self._new[subscription] = None
                is_confirmed = True
            else:
                self._reject(subscription, examined)
        if not (self.alive and is_confirmed):
            return
        self._mark = self.exists = True
        if self._examined:
            self.on_unsettled()
        else:
            self.hub.reads.want_examine(self)

    def _may_join(self, subscription: Subscription, examined: Examined) -> bool:
        principal = subscription.session.principal
        value = examined.rights.get(principal.user)
        return self.hub.rights.allowed(principal, self.channel, value, admitted=False)

    def _reject(self, subscription: Subscription, examined: Examined) -> None:
        """Reject a client that may not join, unless the application must be asked again."""
        principal = subscription.session.principal
        value = examined.rights.get(principal.user)
        if value != b"-" and self.hub.rights.asks_again(principal, self.channel):
            self._new[subscription] = None
            return
        rule = "revoked" if value == b"-" else "not granted"
        self._refuse(subscription, Forbidden(f"no right to read {self.channel}"), rule)

    def _settle(self, examined: Examined) -> None:
        state = examined.state
        self.exists = self.exists or state.exists
        self.marked = state.incarnation is not None
        old, self.incarnation = self.incarnation, state.incarnation
        self.settled = self.misaligned = True
        if not self._examined:
            self._examined = True
            self.position, self.added, self.digest = state.last, state.added, None
            return
        at = self.position
        mine = Position(at, self.added, old, self.digest)
        judged = state
        if old == self.incarnation and at < state.max_deleted == self._known_deleted:
            judged = replace(state, max_deleted=ZERO_ID)
        verdict = judge(mine, judged, examined.own.get(at))
        notice = verdict.notice
        self.position = verdict.resume
        if verdict.resume == ZERO_ID:
            self.added, self.digest = 0, None
        elif not verdict.counted:
            self.added = self.digest = None
            if state.first is None or verdict.resume < state.first:
                # No entry is left before the first one. New subscriptions begin there too.
                self.position = before(state.first) if state.first else state.last
                self.added = added_before_first(state)
        if verdict.notice is not None:
            self._known_deleted = state.max_deleted
        if notice is None:
            return
        now = Position(self.position, self.added, self.incarnation, self.digest)
        self._notify_live(replace(notice, position=now))
        for subscription in self._behind:
            subscription.notify_later(notice, old)

    def _check_rights(self, examined: Examined) -> None:
        for subscription in list(self.subscriptions()):
            principal = subscription.session.principal
            value = examined.rights.get(principal.user)
            if self.hub.rights.allowed(principal, self.channel, value, admitted=True):
                subscription.rights_as_of = examined.state.last
                self._revoked.pop(subscription, None)
                continue
            reason = Reason.REVOKED if value == b"-" else Reason.RIGHTS_CHANGED
            at = examined.state.last
            notice = Notice("revoked", reason, subscription.at, at)
            is_live = subscription.mode is SubscriptionMode.LIVE
            if value == b"-" and is_live and self.position < at:
                # The revocation may have an entry, which is read next.
                self._revoked[subscription] = notice
                self.hub.reads.want_read(self)
            else:
                self.drop(subscription, notice)

    def _drop_revoked(self, records: Sequence[Record]) -> None:
        """Drop the subscriptions whose right was revoked without an entry in `records`.

        The others receive the events before the entry, which ends them.
        """
        revoked, self._revoked = self._revoked, {}
        bodies = [record.body for record in records if isinstance(record.body, Revocation)]
        for subscription, notice in revoked.items():
            if not any(_is_revoked(subscription, body) for body in bodies):
                self.drop(subscription, notice)

    def _place(self, subscription: Subscription, examined: Examined) -> None:
        session, state, start = subscription.session, examined.state, subscription.start
        if not self._may_join(subscription, examined):
            self._reject(subscription, examined)
            return
        subscription.rights_as_of = state.last
        subscription.known_deleted = state.max_deleted
        if start is None:
            subscription.behind_at(state.last, state.added, None)
        else:
            verdict = judge(start, state, examined.own.get(start.id))
            self.hub.metrics.resumed(verdict.notice)
            subscription.pending_notice = verdict.notice
            subscription.before_notice = None if verdict.notice is None else start
            if verdict.notice is not None:
                # The notice covers what has been trimmed so far.
                subscription.known_trimmed = added_before_first(state)
            if verdict.resume == ZERO_ID:
                subscription.behind_at(ZERO_ID, 0, None)
            else:
                kept = start.added if verdict.counted else None
                subscription.behind_at(verdict.resume, kept, start.digest)
        subscription.began = subscription.cursor
        self._add_behind(subscription)
        self.hub.observer.subscribed(subscription)
        session.client.subscribed(subscription)

    # ---- live -------------------------------------------------------------------------------

    def on_records(self, records: Sequence[Record]) -> None:
        """Offer the entries directly after `position` to all live clients, and advance it."""
        if self._revoked:
            self._drop_revoked(records)
        batch = Batch(self.channel, records, self._position_at)
        live, begin, offered = self._live, 0, 0
        for end in (*batch.stops, len(records)):
            for encoder, subscriptions in live.by_encoder.items():
                offered += batch.deliver(encoder, subscriptions, begin, end)
            if end < len(records):
                # A revocation must take effect before the entries that follow it.
                self._apply(records[end].body)
            begin = end + 1
        before, last = self.position, records[-1]
        self.position, self.digest = last.id, last.digest
        if self.added is not None:
            self.added += len(records)
        self.hub.metrics.read_live(len(records), offered, last.id.ms, batch.sizes)
        if self.hub.tap is not None:
            self.hub.tap.read(self, records, offered)
        if self.hub.trace is not None:
            self.hub.trace.read(self, records, offered)
        if self._behind:
            self._passed(before)

    def on_end(self, last: EntryID) -> None:
        """Advance to `last`, an entry that may have been removed: all before it was read or
        reported as missing."""
        if self._revoked:
            self._drop_revoked(())
        before = self.position
        self.position, self.digest = last, None
        if self._behind:
            self._passed(before)

    def _passed(self, before: EntryID) -> None:
        """Continue subscriptions that were ahead of this worker, and no longer are."""
        for subscription in list(self._behind):
            cursor = subscription.cursor
            if cursor is not None and cursor > before:
                self.catch_up(subscription)

    def _position_at(self, record: Record, index: int) -> Position:
        """Return a live client's position after record number `index` of the batch."""
        added = None if self.added is None else self.added + index + 1
        return Position(record.id, added, self.incarnation, record.digest)

    def _apply(self, body: object) -> None:
        """Apply an entry that is not an event."""
        if isinstance(body, Revocation):
            self._revoke(body)
        elif isinstance(body, Broken):
            self.hub.on_broken(self.channel, body)

    def _revoke(self, body: Revocation) -> None:
        for subscription in list(self.subscriptions()):
            if _is_revoked(subscription, body):
                is_live = subscription.mode is SubscriptionMode.LIVE
                at = body.id if is_live else subscription.at
                self.drop(subscription, Notice("revoked", Reason.REVOKED, at, body.id))

    def on_ephemeral(self, event: Event) -> None:
        """Deliver to live clients only. The others have no history to read it from."""
        event.after = self.position
        self._live.offer(event)
        if self.hub.tap is not None:
            self.hub.tap.ephemeral(self, event)

    def has_same_incarnation(self, state: StreamState) -> bool:
        """Return True if the state is of the incarnation that was examined."""
        return state.incarnation == self.incarnation

    def has_gap(self, state: StreamState, following: int | None) -> bool:
        """Return True if unread entries after `position` were removed.

        If both are counted, the entries that were added after it must be those that follow it now.
        """
        if following is not None and self.added is not None:
            return state.added - self.added != following
        if self.position < state.max_deleted != self._known_deleted:
            return True
        return not untrimmed(Position(self.position, self.added), state)

    def on_gap(self, state: StreamState, first_read: EntryID | None, following: int | None) -> None:
        """Notify live clients of removed entries, then wait for an examination, because a
        revocation may be among them."""
        if self._revoked:
            self._drop_revoked(())
        reason = Reason.DELETED if state.max_deleted > self.position else Reason.TRIMMED
        notice = gap(reason, self.position, state, first_read)
        self.position = before(first_read) if first_read else state.last
        self.digest = None
        self._known_deleted = state.max_deleted
        if following is not None:
            self.added = state.added - following
        else:
            self.added = added_before_first(state) if state.first == first_read else None
        self._notify_live(notice)
        self.misaligned = True
        self.on_unsettled()

    def _notify_live(self, notice: Notice) -> None:
        if self._live.count:
            self.hub.observer.notified(self.channel, notice, None)
        self._live.notify(notice)

    # ---- behind -----------------------------------------------------------------------------

    def stall(self, subscription: Subscription) -> None:
        """Stop live delivery to a subscription whose socket is full. It continues from W later."""
        self._live.remove(subscription)
        subscription.behind_at(self.position, self.added, self.digest)
        subscription.known_deleted, subscription.known_trimmed = self._known_deleted, None
        self._add_behind(subscription)

    def _add_behind(self, subscription: Subscription) -> None:
        if subscription not in self._behind:
            self._behind[subscription] = None
            self.hub.behind_count += 1

    def _remove_behind(self, subscription: Subscription) -> None:
        if subscription in self._behind:
            del self._behind[subscription]
            self.hub.behind_count -= 1

    def catch_up(self, subscription: Subscription) -> None:
        """Make a subscription live if it is at W. Otherwise request the page that it needs."""
        if subscription not in self._behind or not self.settled or subscription.session.paused:
            return
        if subscription.pending_notice is not None:
            notice, subscription.pending_notice = subscription.pending_notice, None
            subscription.before_notice = None
            subscription.notify(replace(notice, position=subscription.position))
            if subscription.has_ended:
                return
        if self._held and (held := self._held.get(subscription)) is not None:
            self._catch_up_to(subscription, held)
        elif subscription.cursor == self.position:
            deleted = self._known_deleted
            if deleted > self.position and deleted != subscription.known_deleted:
                # Live clients have already received this notice, and will not receive it again.
                subscription.notify(Notice("gap", Reason.DELETED, self.position, deleted))
                if subscription.has_ended:
                    return
            self._remove_behind(subscription)
            self._live.add(subscription)
        elif subscription.cursor is not None and subscription.cursor < self.position:
            self.hub.reads.want_page(self)
        # Otherwise another worker had read further than this one, and W will reach the cursor.

    def _catch_up_to(self, subscription: Subscription, held: _Hold) -> None:
        cursor = subscription.cursor
        if cursor is None:
            return
        if cursor >= held.stop:
            held.reached()
        elif cursor < self.position:
            self.hub.reads.want_page(self)

    def page_request(self) -> PageRequest | None:
        """Return a request from the lowest cursor whose client has room, or None."""
        if not self.settled:
            return None
        start = catch_up.lowest_cursor(
            each
            for each in self._behind
            if not self._held
            or (held := self._held.get(each)) is None
            or (each.cursor is not None and each.cursor < held.stop)
        )
        if start is None or start >= self.position:
            return None
        return PageRequest(start, self.position)

    def on_page(self, request: PageRequest, page: Page) -> None:
        """Serve all subscriptions whose cursor lies in the page, up to W."""
        if not self.alive or not self.settled:
            return
        if not self.has_same_incarnation(page.state):
            self.on_unsettled()
            return
        shared = catch_up.SharedPage(self.channel, self.incarnation, request, page, self.position)
        offered = 0
        for subscription in list(self._behind):
            if not subscription.session.paused:
                held = self._held.get(subscription)
                stop = held.stop if held else None
                offered += shared.serve(subscription, stop)
                self.catch_up(subscription)
        self.hub.metrics.caught_up(offered, shared.sizes)

    def _refuse(self, subscription: Subscription, error: RelayError, rule: str = "") -> None:
        self.hub.metrics.subscriptions.dec()
        subscription.session.refuse(self.channel, error, rule)
        self.leave(subscription)

    def drop(self, subscription: Subscription, notice: Notice) -> None:
        """End a subscription and send its client the reason."""
        session = subscription.session
        if subscription.has_ended:
            return
        del session.subscriptions[self.channel]
        self.hub.metrics.subscriptions.dec()
        self.hub.observer.unsubscribed(subscription, notice)
        subscription.notify(notice)
        self.leave(subscription)
        session.client.dropped(self.channel, notice)
        self.hub.flush_soon()


def _is_revoked(subscription: Subscription, body: Revocation) -> bool:
    as_of = subscription.rights_as_of
    return subscription.session.principal.user == body.user and bool(as_of and as_of < body.id)


def _context_of(request: ExamineRequest) -> tuple[tuple[Subscription, ...], bool]:
    return cast("tuple[tuple[Subscription, ...], bool]", request.context)
