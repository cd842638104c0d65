"""A Redis that rejects writes: events are delivered, publishing is rejected, and relay recovers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import cast

import aiohttp
import pytest
from redis import Redis

from tests.support.cli import Cli
from tests.support.clients import Native, native
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running

pytestmark = pytest.mark.redis
LIMIT_S = 30.0


@pytest.fixture(scope="module", params=[1, 2])
def relay(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[RelayProcess]:
    server = Server(tmp_path_factory.mktemp("valkey"), options=("--appendonly", "no"))
    workers = ["--workers", str(request.param)] if request.param > 1 else []
    with running(server):
        process = RelayProcess(
            server, flags=workers, settings=["hub.connections_per_user=50", "jobs.retention_s=1"]
        ).start()
        yield process
        process.kill()


@pytest.fixture
async def door(relay: RelayProcess) -> AsyncIterator[Native]:
    async with native(relay) as clients:
        yield clients


def admin(relay: RelayProcess) -> Redis:
    return cast("Redis", relay.redis())


async def readyz(relay: RelayProcess) -> tuple[int, str]:
    async with aiohttp.ClientSession() as http, http.get(f"{relay.url}/readyz") as reply:
        return reply.status, await reply.text()


async def until(
    relay: RelayProcess, wanted: Callable[[int, str], bool], *, in_a_row: int = 1
) -> None:
    """Wait for this answer of /readyz. Each request is answered by any of the workers."""
    answers = 0
    async with asyncio.timeout(LIMIT_S):
        while answers < in_a_row:
            if wanted(*await readyz(relay)):
                answers += 1
            else:
                answers = 0
                await asyncio.sleep(0.05)


def fill(redis: Redis) -> None:
    redis.config_set("maxmemory", "1024")


def empty(redis: Redis) -> None:
    redis.config_set("maxmemory", "0")


def need_replicas(redis: Redis) -> None:
    redis.config_set("min-replicas-to-write", "1")


def need_none(redis: Redis) -> None:
    redis.config_set("min-replicas-to-write", "0")


@pytest.mark.parametrize(("begin", "end"), [(fill, empty), (need_replicas, need_none)])
async def test_while_writes_are_refused_events_are_delivered(
    relay: RelayProcess,
    door: Native,
    begin: Callable[[Redis], None],
    end: Callable[[Redis], None],
) -> None:
    redis = admin(relay)
    news, unused = f"{begin.__name__}:news", f"{begin.__name__}:unused"
    follower = await door.sse(news)
    relay.xadd(news, data="1")
    assert [block.json() for block in await follower.take(1)] == [1]
    begin(redis)
    await until(relay, lambda status, text: status == 200 and "refuses writes" in text)
    # New clients receive earlier entries, also of streams that do not exist.
    resumed = await door.sse(news, header=follower.opened.id)
    assert [block.json() for block in await resumed.take(1)] == [1]
    idle = await door.sse(unused)
    end(redis)
    await until(relay, lambda status, text: status == 200 and "refuses" not in text)
    relay.xadd(news, data="2")
    relay.xadd(unused, data="3")
    for client in (follower, resumed):
        assert [block.json() for block in await client.take(1)] == [2]
    blocks = await idle.take(1)
    assert blocks[-1].json() == 3 or blocks[-1].event
    assert sum("Traceback" in line for line in relay.log) == 0


async def test_a_worker_without_clients_notices_that_reads_are_allowed_again(
    relay: RelayProcess, door: Native
) -> None:
    """A load balancer that checks /readyz sends the worker no client that could detect it."""
    redis = admin(relay)
    redis.execute_command("ACL", "SETUSER", "relay", "-hmget")  # type: ignore[no-untyped-call]
    # The client is asked to reconnect, and disconnects.
    assert await (await door.sse("news")).ended() == []
    # The failed read and the check of rights after it name the command.
    await until(relay, lambda status, text: status == 503 and "hmget" in text)
    redis.execute_command("ACL", "SETUSER", "relay", "+hmget")  # type: ignore[no-untyped-call]
    # Of both workers: the next tests use any of them.
    await until(
        relay,
        lambda status, text: status == 200 and "reads of streams" not in text,
        in_a_row=20,
    )


async def test_a_foreign_key_in_place_of_the_list_of_workers_is_reported(
    relay: RelayProcess, door: Native
) -> None:
    redis = admin(relay)
    follower = await door.sse("news")
    redis.set("relay:nodes", "x")
    await until(relay, lambda status, text: status == 200 and "list of workers" in text)
    await door.sse("news")
    relay.xadd("news", data="1")
    assert [block.json() for block in await follower.take(1)] == [1]
    redis.delete("relay:nodes")
    await until(relay, lambda status, text: status == 200 and "refuses" not in text)


async def test_a_stream_without_braces_is_reported(relay: RelayProcess) -> None:
    redis = admin(relay)
    redis.xadd("relay:stream:news", {"data": "1"})
    await until(relay, lambda status, text: status == 200 and "relay:stream:{news}" in text)
    cli = Cli(relay.server)
    listed = await cli.run("streams")
    assert "relay:stream:news belongs to no channel" in listed.stderr
    redis.delete("relay:stream:news")
    await until(relay, lambda status, text: text == "ready\n")


async def test_status_names_what_redis_refuses(relay: RelayProcess) -> None:
    redis = admin(relay)
    cli = Cli(relay.server)
    fill(redis)
    await until(relay, lambda status, text: status == 200 and "refuses writes" in text)
    done = await cli.run("status")
    assert done.returncode == 1
    assert "OOM" in done.stderr
    empty(redis)
    await until(relay, lambda status, text: text == "ready\n")
