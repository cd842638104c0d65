"""A worker process with the echo endpoint; arguments: URL of Redis, port, instance."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

from aiohttp import web

from relay.config.settings import RedisSettings
from relay.transports.socket.listener import GuardedSite
from tests.support.site import site
from tests.support.sockjs import OPTIONS, EchoDoor


async def main(url: str, port: int, instance: str) -> None:
    async with site(RedisSettings(url=url), instance) as here:
        door = EchoDoor(here.bus, here.store, replace(OPTIONS, response_limit_bytes=131_072))
        app = web.Application()
        app.router.add_routes(door.routes)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        # The kernel chooses a worker for each connection, as with `serve --workers`.
        await GuardedSite(runner, "127.0.0.1", port, reuse_port=True).start()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
