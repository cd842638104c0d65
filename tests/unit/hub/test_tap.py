"""What the live tap may cost while operators watch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from relay.core.model import EntryID, Event, Principal, Record
from relay.inspect.tap import Tap
from tests.support.hub import NEWS, Reads, Words, examine, join, make_hub


async def test_a_batch_for_many_recipients_examines_few_clients() -> None:
    hub, words = make_hub(Reads()), Words()
    for number in range(400):
        join(hub, Principal(user=f"u{number}"), words)
    examine(hub)
    tap = Tap(hub, cast("Any", SimpleNamespace(on_event=None)), lambda: 0.0)
    for watch in range(8):
        await tap.answer({"watch": f"w{watch}"})
    feed = hub.feed(NEWS)
    assert feed
    names = frozenset({"user:u1", *(f"user:{'n' * 1000}{number}" for number in range(3000))})
    records = []
    for number in range(1, 101):
        entry_id = EntryID(number, 0)
        body = Event(NEWS, entry_id, b"x", is_json=False, to=names)
        records.append(Record(entry_id, 0, 1, body))
    feed.on_records(records)
    answers = [await tap.answer({"watch": f"w{watch}"}) for watch in range(8)]
    shown = [record for answer in answers for record in answer["records"]]
    assert len(shown) == 800
    complete = [each for each in shown if each["not_addressed"] is not None]
    # 12 records of 400 clients need 4,800 examinations; a slow machine may begin a second period.
    assert 12 <= len(complete) < 100
    assert complete[0]["delivered"] == 1
    assert complete[0]["not_addressed"] == 399
    # Recipients are chosen by those who append entries.
    assert all(len(each["to"]) == 20 for each in shown)
    assert max(len(name) for each in shown for name in each["to"]) <= 100
