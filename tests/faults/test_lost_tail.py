"""Redis loses acknowledged entries that no client has received: all clients get a notice."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import pytest
from redis.exceptions import ConnectionError

from tests.support.clients import (
    Block,
    Native,
    Refused,
    SseClient,
    native,
    redis,
    stream_key,
    until,
)
from tests.support.redis_cluster import wait_for
from tests.support.relay import RelayProcess
from tests.support.valkey import Flavour, SentinelServer, Server, running

pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(120)]

LARGE = "x" * 100_000


class Site(ABC):
    """One way to lose acknowledged entries: `keep`, append more, `lose`."""

    relay_to: Server

    def __init__(self, folder: Path, flavour: Flavour) -> None:
        self.folder = folder
        self.flavour = flavour

    @contextmanager
    @abstractmethod
    def running(self) -> Iterator[Server]:
        """Return the server to append to at first."""

    @abstractmethod
    def keep(self) -> None:
        """Keep the present entries. Later ones will be lost."""

    @abstractmethod
    def lose(self) -> Server:
        """Lose entries. Return the server to append to from now on."""


class Alone(Site):
    options: tuple[str, ...]

    @contextmanager
    def running(self) -> Iterator[Server]:
        self.relay_to = self.server = Server(self.folder, self.flavour, options=self.options)
        with running(self.server):
            yield self.server


class Rdb(Alone):
    options = ("--appendonly", "no")

    def keep(self) -> None:
        self.server.client().save()

    def lose(self) -> Server:
        self.server.restart()
        return self.server


class CutAof(Alone):
    options = ("--appendfsync", "always")

    def _file(self) -> Path:
        (found,) = (self.folder / "appendonlydir").glob("*.incr.aof")
        return found

    def keep(self) -> None:
        self._size = self._file().stat().st_size

    def lose(self) -> Server:
        self.server.kill()
        with self._file().open("r+b") as file:
            # Cut the file within the first lost entry, as a power failure may.
            file.truncate(self._size + 20)
        self.server.start()
        return self.server


class Failover(Site):
    @contextmanager
    def running(self) -> Iterator[Server]:
        self.primary = Server(self.folder / "primary", self.flavour)
        self.replica = Server(self.folder / "replica", self.flavour, replica_of=self.primary)
        self.relay_to = self.sentinel = SentinelServer(self.folder / "sentinel", self.primary)
        with running(self.primary, self.replica, self.sentinel):
            wait_for(lambda: bool(redis(self.sentinel, "SENTINEL", "REPLICAS", "main")))
            yield self.primary

    def keep(self) -> None:
        with self.primary.client() as admin:
            admin.set("synced", "1")
            assert admin.wait(1, 30_000) == 1
        self.replica.freeze()
        redis(self.primary, "CLIENT", "KILL", "TYPE", "replica")

    def lose(self) -> Server:
        self.sentinel.expect_failover()
        self.primary.kill()
        self.replica.thaw()
        while True:
            # Sentinel closes connections when it promotes a replica.
            with contextlib.suppress(ConnectionError), self.replica.client() as admin:
                if admin.info("replication")["role"] == "master":
                    break
            time.sleep(0.05)
        return self.replica


WAYS: dict[str, Callable[[Path, Flavour], Site]] = {
    "rdb": Rdb,
    "cut aof": CutAof,
    "failover": Failover,
}


@pytest.fixture(params=[("rdb", "redis"), ("cut aof", "valkey"), ("failover", "redis")])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    way, flavour = request.param
    return WAYS[way](tmp_path, flavour)


@asynccontextmanager
async def serving(site: Site) -> AsyncIterator[tuple[RelayProcess, Native]]:
    relay = RelayProcess(site.relay_to)
    await asyncio.to_thread(relay.start)
    try:
        async with native(relay) as door:
            yield relay, door
    finally:
        relay.kill()


def append(server: Server, channel: str, *numbers: int, text: str = "") -> None:
    with server.client() as admin:
        for number in numbers:
            admin.xadd(f"relay:stream:{{{channel}}}", {"data": f'{{"n":{number},"t":"{text}"}}'})


def told(blocks: list[Block]) -> list[object]:
    return [block.event or block.json()["n"] for block in blocks]


async def come_back(door: Native, *channels: str, last: str | None) -> SseClient:
    """Reconnect like a browser until relay has noticed the failover and found its Redis."""
    assert last is not None
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(Refused, OSError):
                client = await door.sse(*channels, header=last)
                if client.opened is not None and not client.opened.comment:
                    return client
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("meanwhile", ["running", "stopped"])
async def test_every_client_is_told_of_a_lost_tail(site: Site, meanwhile: str) -> None:
    with site.running() as server:
        async with serving(site) as (relay, door):
            append(server, "a", 1, 2)
            bare, cursor = await door.sse("a", last="0-0"), await door.sse("a", "b")
            live, behind = await door.sse("a"), await door.sse("large")
            fresh = await door.sse("new")
            append(server, "a", 3)
            assert told(await bare.take(3)) == [1, 2, 3]
            assert told(await cursor.take(1)) == told(await live.take(1)) == [3]
            for client in (bare, cursor, fresh):
                client.drop()
            append(server, "large", *range(60), text=LARGE)
            await until(lambda: redis(server, "XINFO", "GROUPS", stream_key("large")))
            await asyncio.to_thread(site.keep)
            if meanwhile == "stopped":
                await asyncio.to_thread(relay.kill)
            else:
                relay.send(SIGSTOP)
            append(server, "a", *range(4, 54))
            append(server, "large", *range(60, 70), text=LARGE)
            append(server, "new", 1)
            server = await asyncio.to_thread(site.lose)
            if meanwhile == "stopped":
                await asyncio.to_thread(relay.start)
            else:
                relay.send(SIGCONT)
            cursor = await come_back(door, "a", "b", last=cursor.last_id)
            bare = await come_back(door, "a", last=bare.last_id)
            fresh = await come_back(door, "new", last=fresh.last_id)
            for channel in ("a", "large", "new"):
                append(server, channel, 99)
            assert told(await bare.take(2)) == ["relay:reset", 99]
            assert told(await cursor.take(3)) == ["relay:reset", "relay:reset", 99]
            assert told(await fresh.take(2)) == ["relay:reset", 99]
            if meanwhile == "running":
                assert told(await live.take(2)) == ["relay:reset", 99]
                blocks = await behind.take(62)
                assert sorted(told(blocks[:-1]), key=str) == sorted(
                    [*range(60), "relay:reset"], key=str
                )
                assert told(blocks[-1:]) == [99]
            # Later positions are of the present history, so no further notice is sent.
            append(server, "a", 100)
            for client, channels in ((bare, ("a",)), (cursor, ("a", "b"))):
                client.drop()
                again = await come_back(door, *channels, last=client.last_id)
                assert told(await again.take(1)) == [100]
                again.drop()
                again = await come_back(door, *channels, last=again.last_id)
                assert await again.quiet()


async def test_a_position_from_before_an_unnoticed_failover_is_told_after_the_next(
    tmp_path: Path,
) -> None:
    """Two failovers between servers whose processes keep running, without a relay in between."""
    one = Server(tmp_path / "one")
    other = Server(tmp_path / "other", replica_of=one)
    with running(one, other):
        relay = RelayProcess(one)
        await asyncio.to_thread(relay.start)
        try:
            async with native(relay) as door:
                client = await door.sse("a")
                append(one, "a", 1)
                assert told(await client.take(1)) == [1]
                client.drop()
                relay.kill()
                assert one.client().wait(1, 30_000) == 1
                other.client().replicaof("NO", "ONE")
                one.client().replicaof("127.0.0.1", other.port)
                await until(lambda: one.client().info("replication")["master_link_status"] == "up")
                other.freeze()
                one.client().replicaof("NO", "ONE")
                other.thaw()
                append(other, "a", 2)  # Acknowledged by the primary that is now abandoned.
                await asyncio.to_thread(relay.start)
                client = await come_back(door, "a", last=client.last_id)
                append(one, "a", 3)
                assert told(await client.take(2)) == ["relay:reset", 3]
        finally:
            relay.kill()


async def test_a_client_that_resumes_after_the_notice_does_not_receive_it_again(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path)
    with running(server):
        relay = RelayProcess(server)
        await asyncio.to_thread(relay.start)
        try:
            async with native(relay) as door:
                client = await door.sse("a")
                append(server, "a", 1)
                await client.take(1)
                client.drop()
                await asyncio.to_thread(server.restart)
                last = client.last_id
                for expected in (1, 0, 0):
                    client = await come_back(door, "a", last=last)
                    assert told(await client.take(expected)) == ["relay:reset"] * expected
                    assert await client.quiet()
                    client.drop()
                    last = client.last_id
        finally:
            relay.kill()


async def test_a_first_replica_is_no_failover(tmp_path: Path) -> None:
    """It changes the replication ID as well, although nothing is lost."""
    server = Server(tmp_path / "one")
    with running(server):
        relay = RelayProcess(server)
        await asyncio.to_thread(relay.start)
        try:
            async with native(relay) as door:
                live, away = await door.sse("a"), await door.sse("a", "b")
                append(server, "a", 1)
                assert told([*await live.take(1), *await away.take(1)]) == [1, 1]
                away.drop()
                before = server.client().info("replication")["master_replid"]
                with running(Server(tmp_path / "two", replica_of=server)):
                    await until(
                        lambda: server.client().info("replication")["master_replid"] != before
                    )
                    append(server, "a", 2)
                    away = await come_back(door, "a", "b", last=away.last_id)
                    assert told([*await live.take(1), *await away.take(1)]) == [2, 2]
                    redis(server, "CLIENT", "KILL", "USER", "relay")
                    append(server, "a", 3)
                    assert told([*await live.take(1), *await away.take(1)]) == [3, 3]
        finally:
            relay.kill()
