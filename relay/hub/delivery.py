"""A batch of entries on its way to many clients: encoded once per format, joined once per range."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from relay.core.model import Channel, EntryID, Event, Position, Record, Revocation
from relay.hub.encoding import Encoder, frame

if TYPE_CHECKING:
    from relay.hub.session import Subscription


class Batch:
    """Records of one stream, in order, and their encodings by format and range."""

    def __init__(
        self,
        channel: Channel,
        records: Sequence[Record],
        position_at: Callable[[Record, int], Position],
    ) -> None:
        self.records = records
        self._channel = channel
        self._position_at = position_at
        self._ids = [record.id for record in records]
        self._limited = any(
            isinstance(record.body, Event) and record.body.to is not None for record in records
        )
        self._chunks: dict[tuple[Encoder, int, int], bytes] = {}

    def index_after(self, entry_id: EntryID) -> int:
        """The index of the first record after `entry_id`."""
        return bisect_right(self._ids, entry_id)

    def deliver(
        self, encoder: Encoder, subscriptions: Collection[Subscription], begin: int, end: int
    ) -> None:
        """Offers records begin to end to sessions of one format; what is shared is made once."""
        if begin >= end:
            return
        if encoder.personal:
            self._deliver_personal(encoder, subscriptions, begin, end)
        elif self._limited:
            for subscription in subscriptions:
                selectors = subscription.session.selectors
                data = b"".join(
                    frame(encoder, event) for _, event in self._events(begin, end, selectors)
                )
                if data:
                    subscription.session.offer(data)
        else:
            data = self._chunk(encoder, begin, end)
            if data:
                for subscription in subscriptions:
                    subscription.session.offer(data)

    def _chunk(self, encoder: Encoder, begin: int, end: int) -> bytes:
        key = (encoder, begin, end)
        data = self._chunks.get(key)
        if data is None:
            data = b"".join(frame(encoder, event) for _, event in self._events(begin, end, None))
            self._chunks[key] = data
        return data

    def _deliver_personal(
        self, encoder: Encoder, subscriptions: Collection[Subscription], begin: int, end: int
    ) -> None:
        for index in range(begin, end):
            event = self.records[index].body
            if not isinstance(event, Event):
                continue
            shared, to = frame(encoder, event), event.to
            # One object for everybody, so that an encoder can see that it has met it.
            position = self._position_at(self.records[index], index)
            for subscription in subscriptions:
                session = subscription.session
                if to is None or not to.isdisjoint(session.selectors):
                    data = encoder.personal_event(event, position, subscription, shared)
                    if data:
                        session.offer(data)

    def _events(
        self, begin: int, end: int, selectors: frozenset[str] | None
    ) -> Iterator[tuple[int, Event]]:
        for index in range(begin, end):
            body = self.records[index].body
            if isinstance(body, Event) and (
                body.to is None or (selectors is not None and not body.to.isdisjoint(selectors))
            ):
                yield index, body


def unrevoked_runs(records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """Index ranges between revocations: each must take effect before what follows it."""
    begin = 0
    for index, record in enumerate(records):
        if isinstance(record.body, Revocation):
            yield begin, index
            begin = index + 1
    yield begin, len(records)
