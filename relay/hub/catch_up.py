"""Catch-up of clients that are behind: the next page to read, and its delivery."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from relay.core.model import Position
from relay.core.reasons import Reason
from relay.hub.delivery import Batch
from relay.hub.recovery import added_before_first, gap, untrimmed

if TYPE_CHECKING:
    from relay.core.model import Channel, EntryID, Record
    from relay.core.stream_interface import Page, PageRequest
    from relay.hub.session import Subscription


def lowest_cursor(subscriptions: Iterable[Subscription]) -> EntryID | None:
    """Return the lowest cursor of the subscriptions whose sockets have room."""
    return min(
        (
            subscription.cursor
            for subscription in subscriptions
            if not subscription.session.paused and subscription.cursor is not None
        ),
        default=None,
    )


class SharedPage:
    """One page for all subscriptions whose cursor lies in it, up to the worker's position."""

    def __init__(
        self,
        channel: Channel,
        incarnation: int | None,
        request: PageRequest,
        page: Page,
        position: EntryID,
    ) -> None:
        self._incarnation = incarnation
        self._state = page.state
        self._start = request.start
        self._batch = Batch(channel, page.records, self._position_at)
        self._end = self._batch.index_after(position)
        covered = page.records[-1].id if page.records else request.start
        if page.complete:
            # All entries that this worker had read at the request are in the page or were removed.
            covered = max(covered, request.reached)
        self._covered = min(covered, position)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes that were offered so far, by protocol."""
        return self._batch.sizes

    def serve(self, subscription: Subscription, stop: EntryID | None = None) -> int:
        """Offer the entries after the subscription's cursor, up to `stop`, and advance the cursor.
        Send a notice if entries were removed. Return how many entries were offered."""
        cursor, covered, end = subscription.cursor, self._covered, self._end
        if stop is not None and stop < covered:
            covered, end = stop, self._batch.index_after(stop)
        if cursor is None or not self._start <= cursor < covered:
            return 0
        begin, state = self._batch.index_after(cursor), self._state
        added = subscription.added
        if state.max_deleted > cursor and state.max_deleted != subscription.known_deleted:
            subscription.notify(gap(Reason.DELETED, cursor, state))
            added = None
            subscription.known_deleted = state.max_deleted
        elif not untrimmed(Position(cursor, added), state):
            if added_before_first(state) != subscription.known_trimmed:
                subscription.notify(gap(Reason.TRIMMED, cursor, state))
            added = None
            subscription.known_trimmed = added_before_first(state)
        if subscription.has_ended:
            # The protocol has no gap notice, so it has closed the subscription.
            return 0
        offered = self._batch.deliver(subscription.session.encoder, (subscription,), begin, end)
        at_record = end > begin and self._batch.records[end - 1].id == covered
        subscription.behind_at(
            covered,
            None if added is None else added + end - begin,
            self._batch.records[end - 1].digest if at_record else None,
        )
        return offered

    def _position_at(self, record: Record, _index: int) -> Position:
        return Position(record.id, None, self._incarnation, record.digest)
