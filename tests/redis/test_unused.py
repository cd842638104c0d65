"""relay/stream/upkeep/unused.py on real servers, with relay's rights."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from relay.core.model import Channel
from relay.stream.connection.connect import command
from relay.stream.format.keys import Keys
from relay.stream.read import groups
from relay.stream.shards.clients import ShardClients
from relay.stream.upkeep import unused
from relay.stream.upkeep.unused import UnusedStreams, UnusedStreamsJob


async def create(admin: Redis, keys: Keys, name: str, *others: str) -> bytes:
    key = keys.stream(Channel(name))
    await command(admin, *groups.create_marker(key, 5, 1))
    for group in others:
        await admin.xgroup_create(key, group)
    return key


async def gone(admin: Redis, key: bytes) -> None:
    while await admin.exists(key):
        await asyncio.sleep(0.01)


async def test_a_released_stream_is_removed_and_a_followed_or_used_one_stays(
    clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    followed = await create(admin, keys, "followed", "relay:other:1")
    used = await create(admin, keys, "used")
    await admin.xadd(used, {"data": "1"})
    empty = await create(admin, keys, "empty")
    streams = UnusedStreams(clients, keys, keep_s=0.05)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(streams.run())
        for name in ("followed", "used", "empty", "never-created"):
            streams.released(Channel(name))
        await asyncio.wait_for(gone(admin, empty), 30)
        running.cancel()
    assert await admin.exists(followed, used) == 2


async def test_a_worker_keeps_a_limited_number_of_released_streams(
    clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    extra = 3
    created = [await create(admin, keys, f"c{n}") for n in range(unused.MAX_KEPT + extra)]
    streams = UnusedStreams(clients, keys, keep_s=3600)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(streams.run())
        for n in range(len(created)):
            streams.released(Channel(f"c{n}"))
        await asyncio.wait_for(gone(admin, created[extra - 1]), 30)
        running.cancel()
    assert await admin.exists(*created) == unused.MAX_KEPT


async def test_the_job_removes_what_two_runs_have_found_unused(
    clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    empty = await create(admin, keys, "empty")
    followed = await create(admin, keys, "followed", "relay:other:1")
    foreign = keys.stream(Channel("foreign"))
    await admin.set(foreign, "x")
    job = UnusedStreamsJob(clients, keys)
    assert await job.run() == 0
    late = await create(admin, keys, "late")
    assert await job.run() == 1
    assert not await admin.exists(empty)
    assert await admin.exists(followed, foreign, late) == 3
