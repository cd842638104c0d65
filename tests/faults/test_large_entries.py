"""Entries that are larger than all before them: what catch-up holds in memory stays bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import Native, native
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running

pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(60)]

SMALL, LARGE = 1500, 140
LARGE_TEXT = "x" * 900_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, options=("--appendonly", "no"))
    with running(server):
        yield server


def _fill(server: Server, channel: str, large: int) -> None:
    with server.client() as admin:
        pipeline = admin.pipeline(transaction=False)
        for _ in range(SMALL):
            pipeline.xadd(f"relay:stream:{{{channel}}}", {"data": "1"})
        pipeline.execute()
        for _ in range(large):
            admin.xadd(f"relay:stream:{{{channel}}}", {"data": LARGE_TEXT})
        for _ in range(20):
            admin.xadd(f"relay:stream:{{{channel}}}", {"data": "1"})


def _peak_mb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


async def _receive(door: Native, channel: str, count: int) -> None:
    client = await door.sse(channel, last="0-0")
    for _ in range(count):
        assert (await client.next(20)).event is None
    client.drop()


@pytest.mark.parametrize("channels", [1, 4])
async def test_large_entries_after_small_ones_are_read_a_few_at_a_time(
    server: Server, channels: int
) -> None:
    names = [f"c{number}" for number in range(channels)]
    for name in names:
        await asyncio.to_thread(_fill, server, name, LARGE // channels)
    relay = RelayProcess(server)
    await asyncio.to_thread(relay.start)
    try:
        before = _peak_mb(relay.pid)
        async with native(relay) as door:
            count = SMALL + LARGE // channels + 20
            async with asyncio.TaskGroup() as group:
                for name in names:
                    group.create_task(_receive(door, name, count))
        assert _peak_mb(relay.pid) - before < 150
        assert [line for line in relay.log if "no invalidation arrived" in line] == []
    finally:
        relay.kill()
