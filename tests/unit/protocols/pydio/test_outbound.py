"""The queue of PHP's messages keeps their order while Redis is unreachable."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Unpack

import pytest

from relay.core.durability import Durability
from relay.core.errors import LimitExceeded, NotDurable, RedisUnavailable
from relay.core.model import Channel, EntryID, EventFields
from relay.protocols.pydio import outbound
from relay.protocols.pydio.outbound import OutboundQueue
from relay.protocols.pydio.private_messages import Publication

ONE = Channel("pydio:1")


class Stream:
    """Each attempt has the next result of `answers`. Later ones succeed."""

    def __init__(self, answers: Iterable[Exception | None] = ()) -> None:
        self.answers = list(answers)
        self.entries: list[bytes] = []
        self.uids: dict[bytes, set[str | None]] = {}

    def publish(
        self,
        channel: Channel,
        data: bytes,
        *,
        unless_latest: bytes | None = None,
        durability: Durability | None = None,
        **fields: Unpack[EventFields],
    ) -> asyncio.Future[EntryID]:
        future: asyncio.Future[EntryID] = asyncio.get_running_loop().create_future()
        self.uids.setdefault(data, set()).add(fields["uid"])
        error = self.answers.pop(0) if self.answers else None
        if error is None:
            self.entries.append(data)
            future.set_result(EntryID(len(self.entries), 0))
        else:
            future.set_exception(error)
        return future


async def sent(stream: Stream, count: int, clock: Iterable[float] = ()) -> None:
    times = iter(clock)
    out = OutboundQueue(stream.publish, clock=lambda: next(times, 0.0))
    task = asyncio.get_running_loop().create_task(out.run())
    for number in range(count):
        out.add(Publication(channel=ONE, data=b"%d" % number))
    await out.wait_empty()
    task.cancel()


async def test_retries_with_the_same_uid_and_keeps_the_order() -> None:
    away = RedisUnavailable("away")
    stream = Stream([away, away, away, away])
    await sent(stream, 4)
    assert stream.entries == [b"0", b"1", b"2", b"3"]
    assert all(len(uids) == 1 and None not in uids for uids in stream.uids.values())


async def test_drops_only_the_message_that_can_never_be_appended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = Stream([None, LimitExceeded("too large: 9 of 8 bytes"), None])
    await sent(stream, 3)
    assert stream.entries == [b"0", b"2"]
    assert "Dropped a Pydio message for pydio:1: too large" in caplog.text


async def test_appends_a_message_once_that_replicas_have_not_confirmed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    missing = NotDurable("appended as 5-0, but 0 of 1 replicas have confirmed it", EntryID(5, 0))
    stream = Stream([missing])
    await sent(stream, 2)
    assert stream.entries == [b"1"]
    assert "A Pydio message for pydio:1 was appended as 5-0, but 0 of 1 replicas" in caplog.text


async def test_drops_a_message_after_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    await sent(Stream([RedisUnavailable("away")]), 1, [0.0, outbound.HOLD_S + 1])
    assert "not appended within 60 s" in caplog.text


async def test_drops_messages_beyond_the_memory_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbound, "LIMIT_BYTES", 2)
    stream = Stream()
    await sent(stream, 3)
    assert stream.entries == [b"0", b"1"]
    assert "exceeds 2 bytes" in caplog.text
