"""Limits of connections per user, with the rights of the ACL user `relay`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from relay.core.errors import LimitExceeded, Unavailable
from relay.stream.cluster.connection_limits import ConnectionLimiter
from relay.stream.connection.connect import redis_client
from relay.stream.format.keys import Keys
from tests.support.clients import redis, until
from tests.support.valkey import Server, running

pytestmark = pytest.mark.redis
KEYS = Keys("relay:")


class Worker:
    """The part of a worker that counts, with its own sessions."""

    def __init__(self, seats: ConnectionLimiter, here: dict[str, int]) -> None:
        self.seats = seats
        self.here = here
        self.evicted: list[Mapping[tuple[str, str | None], int]] = []

    async def open(self, user: str = "anna") -> None:
        async with self.seats.slot(user):
            self.here[user] = self.here.get(user, 0) + 1
            self.seats.changed(user)

    def close(self, user: str = "anna") -> None:
        self.here[user] -= 1
        self.seats.changed(user)


@asynccontextmanager
async def worker(
    server: Server, name: str, limit: int, dead: frozenset[str] = frozenset()
) -> AsyncIterator[Worker]:
    redis(server, "SADD", "relay:nodes", name)
    here: dict[str, int] = {}
    async with redis_client(server.settings()) as client, asyncio.TaskGroup() as group:
        seats = ConnectionLimiter(
            client=client,
            keys=KEYS,
            instance=name,
            limit=limit,
            count=lambda user, _door: here.get(user, 0),
            users=lambda: [user for user, count in here.items() if count],
            dead=dead.__contains__,
            evict=lambda excess: one.evicted.append(excess),
        )
        one = Worker(seats, here)
        task = group.create_task(seats.run())
        yield one
        task.cancel()
        with contextlib.suppress(Exception):
            await seats.leave()
    redis(server, "SREM", "relay:nodes", name)


def written(server: Server, name: str) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = redis(server, "HGETALL", f"relay:users:{name}")
    return found


@pytest.fixture
def valkey(tmp_path: Path) -> Server:
    """Run a server that the tests stop and start."""
    return Server(tmp_path)


async def test_one_seat_and_two_at_once(valkey: Server) -> None:
    with running(valkey):
        async with worker(valkey, "one:1", 1) as one, worker(valkey, "two:2", 1) as two:
            for _ in range(20):
                async with asyncio.TaskGroup() as group:
                    tries = [group.create_task(_try(each)) for each in (one, two)]
                assert sorted(task.result() for task in tries) == [False, True]
                (one if tries[0].result() else two).close()
                await until(lambda: not any(written(valkey, n) for n in ("one:1", "two:2")))


async def _try(each: Worker) -> bool:
    try:
        await each.open()
    except LimitExceeded:
        return False
    return True


async def test_without_a_limit_nothing_is_written(valkey: Server) -> None:
    with running(valkey):
        async with worker(valkey, "one:1", 0) as one:
            await one.open()
            await one.open()
            assert not written(valkey, "one:1")
            # A reload sets a limit. Existing connections are counted.
            one.seats.limit = 2
            with pytest.raises(LimitExceeded):
                await one.open()
            await one.open("ben")
            assert written(valkey, "one:1") == {b"anna": b"2", b"ben": b"1"}
            assert 0 < redis(valkey, "TTL", "relay:users:one:1") <= 6


async def test_the_nameless_are_not_counted(valkey: Server) -> None:
    with running(valkey):
        async with worker(valkey, "one:1", 1) as one:
            for _ in range(3):
                await one.open("")
            assert not written(valkey, "one:1")


async def test_a_known_death_frees_the_seats(valkey: Server) -> None:
    with running(valkey):
        redis(valkey, "SADD", "relay:nodes", "gone:9")
        redis(valkey, "HSET", "relay:users:gone:9", "anna", 1)
        async with worker(valkey, "one:1", 1) as one:
            with pytest.raises(LimitExceeded):
                await one.open()
        async with worker(valkey, "one:1", 1, frozenset({"gone:9"})) as one:
            await one.open()


async def test_counts_survive_a_redis_that_lost_them(valkey: Server) -> None:
    with running(valkey):
        async with worker(valkey, "one:1", 5) as one:
            await one.open()
            redis(valkey, "FLUSHALL")
            await until(lambda: written(valkey, "one:1") == {b"anna": b"1"})
            valkey.kill()
            with pytest.raises(Unavailable):
                await one.open()
            valkey.start()
            await until(lambda: written(valkey, "one:1") == {b"anna": b"1"})
            await one.open()
            assert written(valkey, "one:1") == {b"anna": b"2"}


async def test_who_gives_up_waiting_leaves_no_seat_taken(valkey: Server) -> None:
    with running(valkey):
        async with worker(valkey, "one:1", 1) as one:
            valkey.freeze()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await one.open()
            valkey.thaw()
            await one.open()
            with pytest.raises(LimitExceeded):
                await one.open()


async def test_a_doors_own_limit_holds_over_workers_and_beside_the_other(valkey: Server) -> None:
    with running(valkey):
        async with worker(valkey, "one:1", 0) as one, worker(valkey, "two:2", 0) as two:
            async with one.seats.slot("anna", "d", 1):
                one.here["anna"] = 1
            with pytest.raises(LimitExceeded, match="more than 1"):
                async with two.seats.slot("anna", "d", 1):
                    pass
            async with two.seats.slot("anna", "other", 1):
                pass
            async with two.seats.slot("anna"):
                pass
            assert b"anna\x1fd" in written(valkey, "one:1")


async def test_a_worker_that_was_frozen_disconnects_what_exceeds_the_limit(valkey: Server) -> None:
    with running(valkey):
        async with worker(valkey, "one:1", 2) as one:
            await one.open()
            await one.open()
            # Accepted by another worker in the freeze.
            redis(valkey, "SADD", "relay:nodes", "two:2")
            redis(valkey, "HSET", "relay:users:two:2", "anna", 1)
            one.seats.on_wake(2.0)
            await asyncio.sleep(0.1)
            assert not one.evicted
            one.seats.on_wake(10.0)
            await until(lambda: one.evicted)
            assert one.evicted == [{("anna", None): 1}]
