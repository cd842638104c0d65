"""Several workers on the shards of one queue: each serves its share, and those of dead workers."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from producers.api_queue import ApiQueueConsumer
from producers.settings import QueueSettings
from relay.config.settings import NamespaceSettings, PublishSettings
from relay.core.model import Channel
from relay.stream.connection.connect import command
from relay.stream.format.keys import Keys
from relay.stream.shards.hash_map import HashMap
from relay.stream.shards.making import shard_map
from tests.support.valkey import Server

pytestmark = pytest.mark.redis
QUEUE = "centrifugo.api"
SHARDS = 7
NAMES = [QUEUE, *(f"{QUEUE}.{n}" for n in range(SHARDS))]


@asynccontextmanager
async def worker(server: Server, keys: Keys, name: str) -> AsyncIterator[None]:
    producer = ApiQueueConsumer(
        shards=shard_map(server.settings()),
        keys=keys,
        redis=server.settings(),
        settings=QueueSettings(enabled=True, shards=SHARDS, batch=3),
        publish=PublishSettings(),
        instance=name,
        namespace_of=lambda _: NamespaceSettings(),
        max_entry_bytes=10_000,
    )
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(producer.run())
        try:
            yield
        finally:
            task.cancel()


class Leases:
    """The leases of all queues."""

    def __init__(self, server: Server, admin: Redis, keys: Keys) -> None:
        self._admin = admin
        self.names = NAMES
        shards = shard_map(server.settings())
        if isinstance(shards, HashMap) and keys.has_site_tag:
            # Each server has its own queues, and has the same name on all hosts.
            self.names = [f"{name}@{shard.id}" for name in NAMES for shard in shards.shards]
        self.keys = [keys.lease(f"queue:{name}") for name in self.names]

    async def shared_by(self, workers: int, unseen: int = 0) -> dict[str, int]:
        """Wait until so many workers have at most their shares. `unseen` of them hold no lease."""
        share = math.ceil(len(self.keys) / workers)
        held = min(len(self.keys), share * (workers - unseen))
        async with asyncio.timeout(30):
            while True:
                holders = [await command(self._admin, "GET", key) for key in self.keys]
                found = Counter(holder.decode() for holder in holders if holder)
                is_fair = len(found) == workers - unseen and max(found.values()) <= share
                if is_fair and found.total() == held:
                    return found
                await asyncio.sleep(0.05)


@pytest.fixture
def leases(server: Server, admin: Redis, keys: Keys) -> Leases:
    return Leases(server, admin, keys)


async def test_each_has_its_share_and_the_last_one_all(
    server: Server, admin: Redis, keys: Keys, leases: Leases
) -> None:
    async with worker(server, keys, "one"):
        assert set(await leases.shared_by(1)) == {"one"}
        async with worker(server, keys, "two"):
            await leases.shared_by(2)
            async with worker(server, keys, "three"):
                assert set(await leases.shared_by(3)) == {"one", "two", "three"}
            # A clean stop releases its queues at once.
            await leases.shared_by(2)
        assert set(await leases.shared_by(1)) == {"one"}
    assert not await admin.exists(keys.takers)


async def test_rejected_leases_do_not_end_the_process(
    server: Server, admin: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys("relay:", has_site_tag=True)
    await command(admin, "SET", keys.takers, "another type")
    async with worker(server, keys, "one"), asyncio.timeout(30):
        while "API queue stopped: EVALSHA: WRONGTYPE" not in caplog.text:
            await asyncio.sleep(0.05)
        await command(admin, "DEL", keys.takers)
        lease = Leases(server, admin, keys).keys[0]
        while await command(admin, "GET", lease) != b"one":
            await asyncio.sleep(0.05)


async def test_who_dies_counts_no_longer(
    server: Server, admin: Redis, keys: Keys, leases: Leases
) -> None:
    async with worker(server, keys, "one"):
        await leases.shared_by(1)
        # A worker that was just killed has left its entry and its leases, for 1.5 s.
        seconds, micros = await command(admin, "TIME")
        until_ms = int(seconds) * 1000 + int(micros) // 1000 + 1500
        await command(admin, "ZADD", keys.takers, until_ms, "dead")
        await leases.shared_by(2, unseen=1)
        assert set(await leases.shared_by(1)) == {"one"}
        # The same with the clock of the server before a failover.
        await command(admin, "ZADD", keys.takers, until_ms + 3_600_000, "dead")
        async with asyncio.timeout(30):
            while await command(admin, "ZRANGE", keys.takers, 0, -1) != [b"one"]:
                await asyncio.sleep(0.05)
        assert set(await leases.shared_by(1)) == {"one"}


async def test_order_holds_while_queues_change_hands(
    server: Server, admin: Redis, keys: Keys, leases: Leases
) -> None:
    pushed = 0
    enough = False

    async def push() -> None:
        nonlocal pushed
        while not enough:
            for name in NAMES:
                params = {"channel": name, "data": pushed}
                await admin.rpush(name, json.dumps({"method": "publish", "params": params}))
            pushed += 1
            await asyncio.sleep(0.01)  # so that the waiting commands are soon executed

    async with worker(server, keys, "one"), asyncio.TaskGroup() as tasks:
        tasks.create_task(push())
        for _ in range(2):
            async with worker(server, keys, "two"):
                await leases.shared_by(2)
            await leases.shared_by(1)
        # Don't cancel it: redis-py 8 on Python 3.11 ignores many cancellations while it sends.
        enough = True
    async with worker(server, keys, "last"):
        async with asyncio.timeout(30):
            while await admin.exists(*NAMES):
                await asyncio.sleep(0.02)
    for name in NAMES:
        found: Any = await admin.xrange(keys.stream(Channel(name)))
        numbers = [int(fields[b"data"]) for _, fields in found]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) == pushed
