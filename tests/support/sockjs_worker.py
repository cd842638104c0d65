"""A worker with the echo door, as a process. Arguments: URL of Redis, port, instance."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

from aiohttp import web

from relay.config.settings import RedisSettings
from relay.core.worker_deaths import WorkerDeaths
from relay.stream.cluster.directory import WorkerDirectory
from relay.stream.cluster.workers import HEARTBEAT_S, WorkerHeartbeat, describe_this_worker
from relay.stream.shards.clients import shard_clients
from relay.stream.shards.making import keys_of
from relay.transports.between_workers.forwarder import Forwarder
from relay.transports.between_workers.internal import InternalListener, Introduction
from relay.transports.socket.listener import GuardedSite
from tests.support.site import site
from tests.support.sockjs import OPTIONS, EchoDoor


async def main(url: str, port: int, instance: str) -> None:
    settings = RedisSettings(url=url)
    keys = keys_of(settings)
    async with site(settings, instance) as here, shard_clients(settings) as clients:
        await clients.shards.refresh()
        client = clients.home
        directory = WorkerDirectory(client=client, keys=keys, deaths=WorkerDeaths())
        forwarder = Forwarder(
            balance=None,
            listener_of=lambda _: (0, ""),
            address_of=directory.address_of,
            key=lambda: directory.key,
        )
        options = replace(OPTIONS, response_limit_bytes=131_072)
        door = EchoDoor(here.bus.address, here.store, options, forwarder.forward)
        app = web.Application()
        app.router.add_routes(door.routes)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        # The kernel chooses a worker for each connection, as with `serve --workers`.
        listener = GuardedSite(runner, "127.0.0.1", port, reuse_port=True)

        def take(transport: asyncio.Transport, asked: Introduction, early: bytes) -> bool:
            return listener.adopt_open(transport, early, hops=asked.hops, peer=asked.peer)

        internal = InternalListener(here.bus.address, lambda: directory.key, take)
        internal_port = await internal.start("127.0.0.1", 0)
        worker = describe_this_worker("test", instance, "1")
        heartbeat = WorkerHeartbeat(client=client, keys=keys, worker=worker)
        await heartbeat.publish_internal(f"127.0.0.1:{internal_port}")
        await directory.refresh()
        await listener.start()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await heartbeat.beat()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
