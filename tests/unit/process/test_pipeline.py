"""The pipeline's own decisions: what is set aside, and when the application is asked again."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, cast

from relay.config.settings import NamespaceSettings
from relay.core.metrics import Metrics
from relay.core.model import Broken, Channel, EntryID, Event, Principal, Record
from relay.core.stream_interface import Followed
from relay.process.pipeline import DEAD_LETTERS_WAITING, Admission, Incoming
from relay.rights.http import HttpRights
from relay.rights.policy import Policy

CHANNEL = Channel("app:a")
BOB = Principal(user="bob")


class Stream:
    """What the pipeline needs of a followed stream."""

    channel = CHANNEL

    def __init__(self) -> None:
        self.got: list[Record] = []

    def on_records(self, records: list[Record]) -> None:
        self.got += records


class Answers:
    """An application whose answers the test sets."""

    def __init__(self, answer: bool | None) -> None:
        self.answer = answer

    def cached(self, principal: Principal, channel: Channel) -> bool | None:
        del principal, channel
        return self.answer

    def expires_in(self, principal: Principal, channel: Channel) -> float | None:
        del principal, channel
        return None if self.answer is None else 10.0


def admission(answer: bool | None) -> Admission:
    def spawn(coroutine: Coroutine[Any, Any, None], *, name: str) -> None:
        raise AssertionError(name)

    http = cast(HttpRights, Answers(answer))
    return Admission(Policy(lambda _: NamespaceSettings(rights="http"), http), spawn)


def record(number: int, body: Event | Broken | None = None) -> Record:
    entry_id = EntryID(1, number)
    return Record(entry_id, 0, 1, body or Event(CHANNEL, entry_id, b"1", True))


async def test_what_cannot_be_read_is_set_aside_and_the_rest_goes_on_in_order() -> None:
    metrics, stream = Metrics(), Stream()
    incoming = Incoming(metrics=metrics, max_entry_bytes=1024)
    broken = Broken(EntryID(1, 2), "no data", ())
    records = [record(1), record(2, broken), record(3)]
    incoming.deliver(cast(Followed, stream), records)
    assert stream.got == records
    assert incoming.dead_letters.get_nowait() == (CHANNEL, broken)
    text = metrics.exposition()
    assert b"relay_events_total 3.0" in text
    assert b"relay_dead_letters_total 1.0" in text
    assert b"relay_lag_seconds_count 1.0" in text


async def test_a_full_queue_of_dead_letters_holds_up_nothing() -> None:
    stream = Stream()
    incoming = Incoming(metrics=Metrics(), max_entry_bytes=1024)
    broken = record(1, Broken(EntryID(1, 1), "no data", ()))
    incoming.deliver(cast(Followed, stream), [broken] * (DEAD_LETTERS_WAITING + 1))
    assert len(stream.got) == DEAD_LETTERS_WAITING + 1
    assert incoming.dead_letters.qsize() == DEAD_LETTERS_WAITING


def test_an_ephemeral_event_that_cannot_be_read_is_dropped() -> None:
    incoming = Incoming(metrics=Metrics(), max_entry_bytes=1024)
    assert incoming.decode_ephemeral(CHANNEL, b"no json") is None
    event = incoming.decode_ephemeral(CHANNEL, b'{"data":1}')
    assert event is not None
    assert event.id is None


def test_without_an_answer_nobody_comes_in_and_nobody_is_thrown_out() -> None:
    assert not admission(None).allowed(BOB, CHANNEL, None, admitted=False)
    assert admission(None).allowed(BOB, CHANNEL, None, admitted=True)
    assert not admission(None).allowed(BOB, CHANNEL, b"-", admitted=True)


def test_an_answer_decides_for_both() -> None:
    for admitted in (False, True):
        assert admission(True).allowed(BOB, CHANNEL, None, admitted=admitted)
        assert not admission(False).allowed(BOB, CHANNEL, None, admitted=admitted)
