"""Each long-running task of the Redis side ends when it is cancelled, whatever the servers do."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from relay.config.settings import (
    NamespaceSettings,
    PublishSettings,
    RedisSettings,
    StreamSettings,
)
from relay.core.errors import RelayError
from relay.core.model import Channel
from relay.process.jobs import JobScheduler, PeriodicJob
from relay.stream.connection.connect import command, discover, redis_client, servers_of
from relay.stream.connection.failovers import watch_failovers
from relay.stream.connection.primary import Primaries
from relay.stream.format.keys import Keys
from relay.stream.read.control_reader import ControlReader
from relay.stream.read.shard_readers import ShardReaders
from relay.stream.shards.clients import ShardClients, shard_clients
from relay.stream.shards.links import ShardLinks
from relay.stream.shards.making import keys_of
from relay.stream.upkeep.retention import trim
from relay.stream.write.appender import Appender
from tests.support.redis_cluster import RedisCluster, running_cluster
from tests.support.stream_reader import stream_reader
from tests.support.valkey import SentinelServer, Server, running

Work = Callable[[], Coroutine[object, object, object]]
NEWS = Channel("news")
# The servers do not answer within this time, and the tasks must not wait for that.
LONG_S = 60.0


@contextmanager
def servers(folder: Path, topology: str) -> Iterator[tuple[str, list[Server]]]:
    """Run servers. Yield a URL, and the servers without which nothing can be discovered."""
    with ExitStack() as stack:
        if topology == "cluster":
            cluster = stack.enter_context(running_cluster(RedisCluster(folder, primaries=1)))
            yield cluster.url, cluster.servers
            return
        primary = Server(folder / "primary")
        stack.enter_context(running(primary))
        if topology == "single":
            yield primary.url("admin"), [primary]
            return
        sentinel = SentinelServer(folder / "sentinel", primary)
        stack.enter_context(running(sentinel))
        yield sentinel.url("admin"), [sentinel]


def loops(settings: RedisSettings, clients: ShardClients, keys: Keys) -> dict[str, Work]:
    """Return a function for each long-running task that begins it."""
    shards = clients.shards

    make = partial(stream_reader, clients, keys, StreamSettings())

    async def read() -> None:
        control = ControlReader(keys, lambda _: None, lambda: None)
        await ShardReaders(
            shards=shards, keys=keys, control=control, primaries=Primaries(), make=make
        ).run()

    async def append() -> None:
        appender = Appender(
            shards=shards,
            keys=keys,
            redis=settings,
            settings=PublishSettings(timeout_s=LONG_S),
            namespace_of=lambda _: NamespaceSettings(),
        )
        appender.append(NEWS, [b"data", b"1"]).add_done_callback(asyncio.Future.exception)
        await appender.run()

    async def schedule() -> None:
        async def run() -> None:
            await trim(clients, keys, lambda _: NamespaceSettings(retention_age_s=60))

        jobs = [
            PeriodicJob(name=name, every_s=60, if_late="", run=run, at_once=True, shared=shared)
            for name, shared in (("own", False), ("shared", True))
        ]
        await JobScheduler(
            client=clients.home, keys=keys, instance="one", jobs=jobs, is_connected=lambda: False
        ).run()

    async def link() -> None:
        await ShardLinks(shards, settings, subscribe_to=keys.bus("one")).run()

    works: dict[str, Work] = {
        "reader": read,
        "appender": append,
        "links": link,
        "jobs": schedule,
        "map": partial(forever, shards.refresh),
    }
    if "sentinel" in settings.url:
        works["failovers"] = partial(watch_failovers, settings)
        works["discovery"] = partial(forever, partial(discover, servers_of(settings)[0]))
    return works


async def forever(call: Callable[[], Coroutine[object, object, object]]) -> None:
    """Repeat a call, which may fail at once."""
    while True:
        with suppress(RelayError):
            await call()
        await asyncio.sleep(0)


async def running_on(name: str, work: Work) -> list[str]:
    """Cancel the task after each of many numbers of turns. Return those that have not ended."""
    tasks: dict[asyncio.Task[object], str] = {}
    loop = asyncio.get_running_loop()
    for turns in (*range(24), *range(24, 120, 12)):
        task = loop.create_task(work(), name=name)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        tasks[task] = f"{name} after {turns} turns"
    done, left = await asyncio.wait(tasks, timeout=20)
    for task in left:
        task.cancel()
    bugs = [each.exception() for each in done if not each.cancelled()]
    assert not any(bugs), bugs
    return [tasks[each] for each in left]


# redis-py 8.1 leaves a few sockets to the garbage collector if it is cancelled while it connects.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("topology", ["single", "sentinel", "cluster"])
async def test_each_loop_ends_while_its_server_is_away(
    topology: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with servers(tmp_path, topology) as (url, needed):
        settings = RedisSettings(url=url, connect_timeout_s=LONG_S, command_timeout_s=LONG_S)
        keys = keys_of(settings)
        async with shard_clients(settings) as clients:
            await clients.shards.refresh()
            works = loops(settings, clients, keys)
            for begin in (lambda _: None, Server.freeze, Server.kill):
                for server in needed:
                    begin(server)
                left = [each for name in works for each in await running_on(name, works[name])]
                assert not left
                for server in needed:
                    if server.is_running:
                        server.thaw()
        gc.collect()
        assert "never retrieved" not in caplog.text


async def test_a_cancellation_that_redis_py_swallows_is_raised(tmp_path: Path) -> None:
    server = Server(tmp_path)

    async def work() -> None:
        while True:
            await command(client, "SET", "key", "1")

    with running(server):
        async with redis_client(server.settings("admin")) as client:
            left = [each for _ in range(5) for each in await running_on("commands", work)]
    assert not left
