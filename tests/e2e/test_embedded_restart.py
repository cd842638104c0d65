"""Restarts of a relay with its own Valkey: clients are notified only if events may be lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError

from tests.support.clients import Refused, SseClient, native, until
from tests.support.relay import KEY, ROOT, RelayProcess
from tests.support.valkey import free_port

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]


class Site(RelayProcess):
    """A relay without a configured Redis. It runs in a folder whose name is not UTF-8."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._cwd = folder / os.fsdecode(b"caf\xe9")
        self._cwd.mkdir()
        self.folder = self._cwd / "data"
        self.redis_port = free_port()
        self.port = free_port()
        self.workers = workers
        self.process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        sets = ["redis.embedded_dir=data", f"redis.embedded_port={self.redis_port}"]
        sets += [f"jwt.key={KEY}", "node.drain_s=0", f"node.workers={self.workers}"]
        words = [word for each in sets for word in ("--set", each)]
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "relay", "serve", "--port", str(self.port), *words),
            cwd=self._cwd,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            while not (await self.process.stdout.readline()).startswith(b"relay is ready on"):
                pass

    async def end(self) -> None:
        assert self.process is not None
        self.process.terminate()
        async with asyncio.timeout(60):
            assert await self.process.wait() == 0

    def answers(self) -> bool:
        with contextlib.suppress(RedisError):
            return bool(Redis(port=self.redis_port).ping())
        return False

    def add(self, number: int) -> None:
        Redis(port=self.redis_port).xadd("relay:stream:{news}", {"data": str(number)})


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_clean_restart_is_not_reported_and_a_crash_is(tmp_path: Path, workers: int) -> None:
    site = Site(tmp_path, workers)

    async def resumed(last: str | None) -> SseClient:
        """Reconnect like a browser until relay is connected to Redis."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(Refused):
                    client = await door.sse("news", header=last)
                    if not client.opened.comment:
                        return client
                await asyncio.sleep(0.05)

    await site.run()
    try:
        async with native(site) as door:
            client = await door.sse("news")
            site.add(0)
            assert (await client.next()).json() == 0
            last = client.last_id
            # `last` is the ID of an entry, which a browser sends when it reconnects.
            for number in (1, 2):
                site.add(number)
                await site.end()
                await site.run()
                client = await resumed(last)
                block = await client.next()
                assert block.json() == number, block
                last = client.last_id
                client.drop()
            # Kill Valkey. Relay starts it again.
            pid = int((site.folder / "valkey.pid").read_text())
            os.kill(pid, signal.SIGKILL)
            await until(site.answers, 30)
            site.add(3)
            client = await resumed(last)
            assert (await client.next()).event == "relay:reset"
    finally:
        if site.process is not None and site.process.returncode is None:
            await site.end()
