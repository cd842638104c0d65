"""Services that protocols share across workers, without the rest of relay.

Tests can also run and kill it as a process:
python -m tests.support.site REDIS_URL INSTANCE CHANNEL CLIENTS
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from relay.config.settings import RedisSettings
from relay.core.model import Channel
from relay.process.cluster_services import ClusterServices
from relay.stream.cluster.presence import CHECK_S
from relay.stream.cluster.workers import HEARTBEAT_S, WorkerHeartbeat, describe_this_worker
from relay.stream.format.entry import decode
from relay.stream.shards.clients import shard_clients
from relay.stream.shards.making import keys_of, shard_map
from tests.support.clients import within
from tests.support.valkey import Server


@asynccontextmanager
async def site(
    server: Server | RedisSettings, instance: str, dead: Callable[[str], bool] = lambda _: False
) -> AsyncIterator[ClusterServices]:
    """Create the services of one worker."""
    async with asyncio.TaskGroup() as group:

        def spawn(*arguments: object, **named: object) -> object:
            return group.create_task(*arguments, **named)  # type: ignore[arg-type]

        redis = server.settings() if isinstance(server, Server) else server
        shards = shard_map(redis)
        await shards.refresh()
        one = ClusterServices(
            shards=shards,
            redis=redis,
            keys=keys_of(redis),
            instance=instance,
            decode=lambda channel, entry_id, fields: decode(channel, entry_id, fields, 1000),
            spawn=spawn,
            max_entry_bytes=1000,
            dead=dead,
        )
        tasks = [group.create_task(one.run()), group.create_task(_check(one))]
        await within(30, one.wait_open())
        yield one
        for task in tasks:
            task.cancel()


async def _check(one: ClusterServices) -> None:
    while True:
        await asyncio.sleep(CHECK_S)
        await one.presence.check()


async def _be_present(url: str, instance: str, channel: str, clients: int) -> None:
    settings = RedisSettings(url=url)
    async with site(settings, instance) as one, shard_clients(settings) as servers:
        node = describe_this_worker("test", instance, "1")
        await servers.shards.refresh()
        heartbeat = WorkerHeartbeat(client=servers.home, keys=keys_of(settings), worker=node)
        await heartbeat.beat()
        for number in range(clients):
            one.presence.add(Channel(channel), f"{instance}-{number}", b"{}")
        while len(await one.presence.read(Channel(channel))) < clients:
            await asyncio.sleep(0)
        await one.presence.check()
        print("present", flush=True)  # noqa: T201  # whoever started it waits for this
        while True:
            await heartbeat.beat()
            await asyncio.sleep(HEARTBEAT_S)


if __name__ == "__main__":
    _, url, instance, channel, clients = sys.argv
    asyncio.run(_be_present(url, instance, channel, int(clients)))
