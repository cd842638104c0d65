"""Which clients have recovered everything, if a history was not read to its end."""

from __future__ import annotations

import pytest

from relay.core.model import ZERO_ID, Channel, EntryID, Event, Record, StreamState
from relay.core.stream_interface import Snapshot
from relay.protocols.centrifugo.history import missed
from relay.protocols.centrifugo.settings import CentrifugoNamespace

NEWS = Channel("news")


def snapshot(first: int, last: int, *, whole: bool, deleted: int = 0) -> Snapshot:
    """Return the entries `first` to `last` of a stream that begins with entry 1."""
    numbers = range(last, first - 1, -1)
    events = [Event(NEWS, EntryID(number, 0), b"1", is_json=True) for number in numbers]
    records = [Record(event.id or ZERO_ID, 7, 10, event) for event in events]
    at = EntryID(last, 0)
    state = StreamState(
        exists=True,
        first=EntryID(1, 0),
        last=at,
        length=last,
        added=last,
        max_deleted=EntryID(deleted, 0),
        incarnation=1,
    )
    return Snapshot(state=state, records=records, events=events, whole=whole)


@pytest.mark.parametrize(
    ("last", "recovered"),
    [("9-0", True), ("6-0", True), ("5-0", True), ("4-0", False), ("4-5", False), ("3-0", False)],
)
def test_a_client_that_missed_more_than_was_read_has_not_recovered(
    last: str, recovered: bool
) -> None:
    rules = CentrifugoNamespace(history_size=100, history_lifetime=100, recover=True)
    # Entry 3 was deleted, so a client at 3-0 has missed nothing that the stream still shows.
    found = missed(snapshot(5, 9, whole=False, deleted=3), rules, last, now=0.0)
    assert found.recovered == recovered
