"""One workspace's stream and its local clients: live delivery, catch-up and resume.

The feed has one position W: everything up to it was offered to every live client. A subscription
is in one mode:

* *new*: waits for an examination that began after it came. Rights and stream are read in one
  transaction there, so no revocation can fall between.
* *behind*: it resumes, or its socket was full. It has a cursor of its own; nothing is buffered
  for it. It is served from pages, shared by all who are behind on this stream, and becomes live
  in the turn in which its cursor reaches W.
* *live*: its cursor is W. Entries go straight to its socket, in the turn in which W moves.

A feed is *settled* while its position is known to belong to the stream as it is. After a lost
connection or group, or a hole, it is examined first: clients are told what may be missing, and
everybody's rights are checked again, before anything further is delivered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from relay.core.errors import Forbidden, RelayError, Unavailable
from relay.core.model import ZERO_ID, Broken, EntryID, Event, Position, Revocation
from relay.core.reasons import Reason
from relay.core.stream_interface import ExamineRequest, PageRequest
from relay.hub import catch_up
from relay.hub.delivery import Batch
from relay.hub.live import LiveClients
from relay.hub.recovery import Notice, added_before_first, before, gap, judge, untrimmed

if TYPE_CHECKING:
    from relay.core.model import Channel, Record, StreamState
    from relay.core.stream_interface import Examined, Page
    from relay.hub.hub import Hub
    from relay.hub.session import Subscription


class Feed:
    """A followed stream. Sans-I/O: it asks `hub.reads`, and is told."""

    def __init__(self, hub: Hub, channel: Channel) -> None:
        self.hub = hub
        self.channel = channel
        self.alive = True
        self.settled = False
        self.misaligned = True  # the group in Redis does not stand at `position`
        # Large until its entries are known: a first read of small ones is cheap to repeat, one of
        # large ones fills the memory.
        self.average_bytes = 8192.0
        self.position = ZERO_ID
        self.added: int | None = None
        self.digest: int | None = None
        self.incarnation: int | None = None
        # The highest deletion that live clients were told of; it may lie ahead of the position.
        self._known_deleted = ZERO_ID
        self._examined = False
        self._new: dict[Subscription, None] = {}
        self._behind: dict[Subscription, None] = {}
        self._live = LiveClients(channel, hub.metrics)
        self._recheck = False
        # The next examination creates the stream's marker group.
        self._mark = False
        # The stream was found in Redis or created.
        self.exists = False
        # It has a marker group. If not, Redis refused to create one.
        self.marked = True
        self._members = 0

    # ---- coming and going -------------------------------------------------------------------

    def join(self, subscription: Subscription) -> None:
        """A new subscription; it is answered by the next examination."""
        self._members += 1
        self._new[subscription] = None
        self.hub.reads.want_examine(self)

    def leave(self, subscription: Subscription) -> None:
        """The subscription is over, in whatever mode it was. Called once for each that joined."""
        self._new.pop(subscription, None)
        self._behind.pop(subscription, None)
        if subscription.live:
            self._live.remove(subscription)
        self._members -= 1
        if not self._members:
            self.hub.forget(self)

    def subscriptions(self) -> Iterator[Subscription]:
        """Those that were admitted."""
        yield from self._live
        yield from self._behind

    @property
    def has_waiting(self) -> bool:
        """Return True if a client waits for the next examination."""
        return bool(self._new)

    @property
    def behind_count(self) -> int:
        """How many subscriptions are served from pages now."""
        return len(self._behind)

    # ---- examinations -----------------------------------------------------------------------

    def examine_request(self) -> ExamineRequest:
        """Takes everybody who waits now; who comes later waits for the next one."""
        taken = tuple(self._new)
        self._new = {}
        users = {subscription.session.principal.user for subscription in taken}
        recheck, self._recheck = self._recheck, False
        mark, self._mark = self._mark, False
        if recheck:
            users |= {sub.session.principal.user for sub in self.subscriptions()}
        own = {
            sub.asked.id
            for sub in taken
            if sub.asked and not (self.settled and self._is_of_this_incarnation(sub.asked))
        }
        if not self.settled and self._examined:
            own.add(self.position)
        own.discard(ZERO_ID)
        users.discard("")
        return ExamineRequest(tuple(users), tuple(own), (taken, recheck), mark)

    def _is_of_this_incarnation(self, position: Position) -> bool:
        return position.incarnation is not None and position.incarnation == self.incarnation

    def on_examine_failed(self, request: ExamineRequest, reason: str) -> None:
        """Whoever waited is refused; the others stay as they are."""
        taken, recheck = _token(request)
        self._recheck |= recheck
        for subscription in taken:
            if not subscription.gone:
                self._refuse(subscription, Unavailable(reason))

    def on_examine_lost(self, request: ExamineRequest) -> None:
        """Whoever waited is part of the next examination."""
        taken, recheck = _token(request)
        self._recheck |= recheck
        for subscription in taken:
            if not subscription.gone:
                self._new[subscription] = None
        if self.alive:
            self.hub.reads.want_examine(self)

    def on_unsettled(self) -> None:
        """Nothing more is delivered until an examination has judged the position."""
        if self.alive:
            self.settled = False
            self._recheck = True
            self.hub.reads.want_examine(self)

    def on_rights_changed(self) -> None:
        """The rights of everybody here are read again."""
        if self.alive:
            self._recheck = True
            self.hub.reads.want_examine(self)

    def on_examined(self, request: ExamineRequest, examined: Examined) -> None:
        """Settles the position, checks rights, places the new ones; in this order."""
        taken, recheck = _token(request)
        if examined.state.incarnation is None and not request.mark:
            self._request_marker(taken, recheck=recheck, examined=examined)
            return
        if not self.settled or examined.state.incarnation != self.incarnation:
            # Another life may hide a revocation that was lost with the old one.
            if self._examined and not recheck:
                for subscription in taken:
                    if not subscription.gone:
                        self._new[subscription] = None
                self.on_unsettled()
                return
            self._settle(examined)
        if recheck:
            self._check_rights(examined)
        for subscription in taken:
            if not subscription.gone:
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
        for subscription in taken:
            if subscription.gone:
                continue
            if self._may_join(subscription, examined):
                self._new[subscription] = None
            else:
                self._reject(subscription)
        if not self.alive:
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

    def _reject(self, subscription: Subscription) -> None:
        self._refuse(subscription, Forbidden(f"no right to read {self.channel}"))

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
                # Nothing is left before the first one: who comes now begins there too.
                self.position = before(state.first) if state.first else state.last
                self.added = added_before_first(state)
        if verdict.notice is not None:
            self._known_deleted = state.max_deleted
        if notice is None:
            return
        self._live.tell(notice)
        for subscription in self._behind:
            subscription.tell_later(notice, old)

    def _check_rights(self, examined: Examined) -> None:
        for subscription in list(self.subscriptions()):
            principal = subscription.session.principal
            value = examined.rights.get(principal.user)
            if self.hub.rights.allowed(principal, self.channel, value, admitted=True):
                subscription.rights_as_of = examined.state.last
            else:
                reason = Reason.REVOKED if value == b"-" else Reason.RIGHTS_CHANGED
                at = examined.state.last
                self.drop(subscription, Notice("revoked", reason, self.position, at))

    def _place(self, subscription: Subscription, examined: Examined) -> None:
        session, state, asked = subscription.session, examined.state, subscription.asked
        if not self._may_join(subscription, examined):
            self._reject(subscription)
            return
        subscription.rights_as_of = state.last
        subscription.known_deleted = state.max_deleted
        if asked is None:
            subscription.behind_at(state.last, state.added, None)
        else:
            verdict = judge(asked, state, examined.own.get(asked.id))
            subscription.pending_notice = verdict.notice
            subscription.untold = None if verdict.notice is None else asked
            if verdict.notice is not None and verdict.notice.kind == "gap":
                subscription.known_first = state.first
            if verdict.resume == ZERO_ID:
                subscription.behind_at(ZERO_ID, 0, None)
            else:
                kept = asked.added if verdict.counted else None
                subscription.behind_at(verdict.resume, kept, asked.digest)
        self._behind[subscription] = None
        session.client.subscribed(subscription)

    # ---- live -------------------------------------------------------------------------------

    def on_records(self, records: Sequence[Record]) -> None:
        """Offer the entries directly after `position` to all live clients, and advance it."""
        batch = Batch(self.channel, records, self._position_at)
        live, begin, offered = self._live, 0, 0
        for end in (*batch.stops, len(records)):
            for encoder, subscriptions in live.by_encoder.items():
                batch.deliver(encoder, subscriptions, begin, end)
            offered += live.count * (end - begin)
            if end < len(records):
                # A revocation must take effect before the entries that follow it.
                self._apply(records[end].body)
            begin = end + 1
        before, last = self.position, records[-1]
        self.position, self.digest = last.id, last.digest
        if self.added is not None:
            self.added += len(records)
        self.hub.metrics.read_live(len(records), offered, last.id.ms)
        if self._behind:
            self._passed(before)

    def on_end(self, last: EntryID) -> None:
        """Everything up to `last` was read or told of; it may be an entry that is gone."""
        before = self.position
        if before < last:
            self.position, self.digest = last, None
            if self._behind:
                self._passed(before)

    def _passed(self, before: EntryID) -> None:
        """Whoever was ahead of this worker may be where it is now, or behind it."""
        for subscription in list(self._behind):
            cursor = subscription.cursor
            if cursor is not None and cursor > before:
                self.catch_up(subscription)

    def _position_at(self, record: Record, index: int) -> Position:
        """The position that a live client has after record number `index` of the batch."""
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
            as_of = subscription.rights_as_of
            if subscription.session.principal.user == body.user and as_of and as_of < body.id:
                self.drop(subscription, Notice("revoked", Reason.REVOKED, body.id, body.id))

    def on_ephemeral(self, event: Event) -> None:
        """Live clients only: there is no history to serve the others from."""
        event.after = self.position
        self._live.offer(event)

    def same_life(self, state: StreamState) -> bool:
        """Whether the state, taken with its marker, is of the incarnation that was examined."""
        return state.incarnation == self.incarnation

    def untouched(self, state: StreamState, following: int | None) -> bool:
        """Whether nothing after `position` was removed unread: all that was ever added after it
        must be what follows it now, wherever both are counted."""
        if following is not None and self.added is not None:
            return state.added - self.added == following
        if self.position < state.max_deleted != self._known_deleted:
            return False
        return untrimmed(Position(self.position, self.added), state)

    def on_hole(
        self, state: StreamState, first_read: EntryID | None, following: int | None
    ) -> None:
        """Tells live clients, then waits for an examination: a revocation may be among what is
        gone."""
        reason = Reason.DELETED if state.max_deleted > self.position else Reason.TRIMMED
        notice = gap(reason, self.position, state, first_read)
        self.position = before(first_read) if first_read else state.last
        self.digest = None
        self._known_deleted = state.max_deleted
        if following is not None:
            self.added = state.added - following
        else:
            self.added = added_before_first(state) if state.first == first_read else None
        self._live.tell(notice)
        self.misaligned = True
        self.on_unsettled()

    # ---- behind -----------------------------------------------------------------------------

    def stall(self, subscription: Subscription) -> None:
        """A live subscription's socket is full: from W on it is owed."""
        self._live.remove(subscription)
        subscription.behind_at(self.position, self.added, self.digest)
        subscription.known_deleted, subscription.known_first = self._known_deleted, None
        self._behind[subscription] = None

    def catch_up(self, subscription: Subscription) -> None:
        """The subscription's socket has room: make it live, or ask for what it lacks."""
        if subscription not in self._behind or not self.settled or subscription.session.paused:
            return
        if subscription.pending_notice is not None:
            notice, subscription.pending_notice = subscription.pending_notice, None
            subscription.untold = None
            subscription.tell(notice)
            if subscription.gone:
                return
        if subscription.cursor == self.position:
            deleted = self._known_deleted
            if deleted > self.position and deleted != subscription.known_deleted:
                # Live clients were told of this one, and will not be again.
                subscription.tell(Notice("gap", Reason.DELETED, self.position, deleted))
                if subscription.gone:
                    return
            del self._behind[subscription]
            self._live.add(subscription)
        elif subscription.cursor is not None and subscription.cursor < self.position:
            self.hub.reads.want_page(self)
        # else: another worker had read further than this one; W will reach the cursor.

    def page_request(self) -> PageRequest | None:
        """From the rearmost cursor that can be served now."""
        if not self.settled:
            return None
        start = catch_up.rearmost(self._behind)
        if start is None or start >= self.position:
            return None
        return PageRequest(start, self.position)

    def on_page(self, request: PageRequest, page: Page) -> None:
        """Serves everybody whose cursor lies in the page, up to W."""
        if not self.alive or not self.settled:
            return
        if not self.same_life(page.state):
            self.on_unsettled()
            return
        share = catch_up.Share(self.channel, self.incarnation, request, page, self.position)
        for subscription in list(self._behind):
            if not subscription.session.paused:
                self.hub.metrics.caught_up(share.serve(subscription))
                self.catch_up(subscription)

    def _refuse(self, subscription: Subscription, error: RelayError) -> None:
        self.hub.metrics.subscriptions.dec()
        subscription.session.refuse(self.channel, error)
        self.leave(subscription)

    # ---- telling ----------------------------------------------------------------------------

    def drop(self, subscription: Subscription, notice: Notice) -> None:
        """Ends a subscription and says why."""
        session = subscription.session
        if subscription.gone:
            return
        del session.subscriptions[self.channel]
        self.hub.metrics.subscriptions.dec()
        subscription.tell(notice)
        self.leave(subscription)
        session.client.dropped(self.channel, notice)
        self.hub.flush_soon()


def _token(request: ExamineRequest) -> tuple[tuple[Subscription, ...], bool]:
    return cast("tuple[tuple[Subscription, ...], bool]", request.token)
