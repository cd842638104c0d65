"""A relay with two workers, and access to each of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.clients import Native, SseClient, native, redis, until
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, free_port, reserve


@asynccontextmanager
async def running(
    server: Server, *settings: str, flags: Sequence[str] = (), count: int = 2
) -> AsyncIterator[tuple[RelayProcess, Native]]:
    """Run a relay with two workers, or `count`, and its clients."""
    relay = RelayProcess(server, settings=settings, flags=["--workers", str(count), *flags])
    await asyncio.to_thread(relay.start)
    try:
        async with native(relay) as door:
            yield relay, door
    finally:
        relay.kill()
        # Connections of a killed host are counted for some seconds. Other tests must not be
        # affected.
        for key in redis(server, "KEYS", f"relay:users:*_{relay.port}-*"):
            redis(server, "DEL", key)


def workers(relay: RelayProcess) -> dict[int, int]:
    """Return the running worker processes by number."""
    found = {}
    for child in Path(f"/proc/{relay.pid}/task/{relay.pid}/children").read_text().split():
        with contextlib.suppress(OSError, ValueError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            found[int(words[words.index(b"--worker") + 1].split(b":")[0])] = int(child)
    return found


async def connections_by_worker(door: Native, total: int, count: int = 2) -> list[float]:
    """Return the number of clients of each worker, once they are `total` together."""
    async with asyncio.timeout(30):
        while True:
            found = [
                await door.metric(f'relay_worker_connections{{worker="{number}"}}')
                for number in range(1, count + 1)
            ]
            if sum(found) == total:
                return found
            await asyncio.sleep(0.05)


async def over_both(door: Native, channel: str, count: int = 24) -> list[SseClient]:
    """Open `count` clients. Each of two workers has some, except once in millions of runs."""
    return [await door.sse(channel) for _ in range(count)]


def neighbours() -> int:
    """Return a free port whose successor is free too."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError):
            reserve(port + 1)
            return port


async def said(relay: RelayProcess, text: str, count: int = 1) -> None:
    await until(lambda: sum(text in line for line in relay.log) >= count)
