"""Delivery of one batch of entries to many clients, encoded once per format and range."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from relay.core.model import Channel, EntryID, Event, Position, Record
from relay.hub.encoding import frame
from relay.hub.session import Encoder

if TYPE_CHECKING:
    from relay.hub.session import Subscription


class Batch:
    """Records of one stream in order, with their encodings by format and range."""

    def __init__(
        self,
        channel: Channel,
        records: Sequence[Record],
        position_at: Callable[[Record, int], Position],
    ) -> None:
        self.records = records
        # Indexes of the records that are not events for clients.
        self.stops: list[int] = []
        # Bytes that were offered so far, by protocol.
        self.sizes: dict[str, int] = {}
        self._channel = channel
        self._position_at = position_at
        self._limited = False
        self._chunks: dict[tuple[Encoder, int, int], tuple[bytes, int]] = {}
        for index, record in enumerate(records):
            if not isinstance(record.body, Event):
                self.stops.append(index)
            elif record.body.to is not None:
                self._limited = True

    def index_after(self, entry_id: EntryID) -> int:
        """Return the index of the first record after `entry_id`."""
        return bisect_right(self.records, entry_id, key=_id_of)

    def deliver(
        self, encoder: Encoder, subscriptions: Collection[Subscription], begin: int, end: int
    ) -> int:
        """Offer the records from `begin` to `end` to sessions of one format.

        Frames that all of them receive are encoded once. Return how many events were offered, over
        all subscriptions.
        """
        if begin >= end:
            return 0
        if encoder.personal:
            offered, size = self._deliver_personal(encoder, subscriptions, begin, end)
        elif self._limited:
            offered, size = self._deliver_limited(encoder, subscriptions, begin, end)
        else:
            key = (encoder, begin, end)
            chunk = self._chunks.get(key)
            if chunk is None:
                chunk = self._chunks[key] = self._encode(encoder, begin, end, None)
            data, offered = chunk
            size = len(data)
            if offered:
                for subscription in subscriptions:
                    subscription.session.offer(data)
                offered *= len(subscriptions)
                size *= len(subscriptions)
        if offered:
            self.sizes[encoder.door] = self.sizes.get(encoder.door, 0) + size
        return offered

    def _deliver_limited(
        self, encoder: Encoder, subscriptions: Collection[Subscription], begin: int, end: int
    ) -> tuple[int, int]:
        """Deliver records that have recipients. Return the number of events and their bytes."""
        offered = size = 0
        for subscription in subscriptions:
            selectors = subscription.session.selectors
            data, count = self._encode(encoder, begin, end, selectors)
            if count:
                subscription.session.offer(data)
                offered += count
                size += len(data)
        return offered, size

    def _encode(
        self, encoder: Encoder, begin: int, end: int, selectors: frozenset[str] | None
    ) -> tuple[bytes, int]:
        """Return the frames of the events that a client with these selectors receives, and how
        many they are."""
        frames = []
        for index in range(begin, end):
            event = self.records[index].body
            if isinstance(event, Event) and (
                event.to is None or (selectors is not None and not event.to.isdisjoint(selectors))
            ):
                # The same as `frame`, inlined for speed.
                data = event.frames.get(encoder)
                if data is None:
                    data = event.frames[encoder] = encoder.event(event)
                if data:
                    frames.append(data)
        return b"".join(frames), len(frames)

    def _deliver_personal(
        self, encoder: Encoder, subscriptions: Collection[Subscription], begin: int, end: int
    ) -> tuple[int, int]:
        """Deliver frames that differ by client. Return the number of events and their bytes."""
        offered = size = 0
        for index in range(begin, end):
            event = self.records[index].body
            if not isinstance(event, Event):
                continue
            shared, to = frame(encoder, event), event.to
            # The same object for all sessions, so that an encoder can recognize it.
            position = self._position_at(self.records[index], index)
            for subscription in subscriptions:
                session = subscription.session
                if to is None or not to.isdisjoint(session.selectors):
                    data = encoder.personal_event(event, position, subscription, shared)
                    if data:
                        session.offer(data)
                        offered += 1
                        size += len(data)
        return offered, size


def _id_of(record: Record) -> EntryID:
    return record.id
