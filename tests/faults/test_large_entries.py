"""Entries that are larger than all earlier ones: the memory of catch-up stays bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.centrifugo_client import SECRET, centrifugo
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
        assert (await client.next()).event is None
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


async def test_a_history_of_large_entries_is_read_up_to_a_size(server: Server) -> None:
    await asyncio.to_thread(_fill, server, "news", LARGE)
    lines = [f"secret={SECRET}", "history_size=200", "history_lifetime=600", "recover=true"]
    relay = RelayProcess(server, settings=[f"protocol:centrifugo.{line}" for line in lines])
    await asyncio.to_thread(relay.start)
    try:
        before = _peak_mb(relay.pid)
        async with centrifugo(relay.url) as door:
            reply = await door.api("history", channel="news")
            # The newest 20 are small. 16 MiB contain 18 of the others, and the last page is
            # complete.
            assert 38 <= len(reply["body"]["data"]) < LARGE // 2
        assert _peak_mb(relay.pid) - before < 200
    finally:
        relay.kill()


async def test_an_entry_far_beyond_the_limit_becomes_a_dead_letter(server: Server) -> None:
    # Invalidations arrive late behind the large reply. The worker must not connect again for that.
    relay = RelayProcess(server, settings=["stream.canary_s=0.1"])
    await asyncio.to_thread(relay.start)
    try:
        before = _peak_mb(relay.pid)
        async with native(relay) as door:
            client = await door.sse("news")
            with server.client() as admin:
                admin.xadd("relay:stream:{news}", {"data": "x" * 60_000_000})
                admin.xadd("relay:stream:{news}", {"data": "2"})
                assert (await client.next()).data == "2"
                async with asyncio.timeout(30):
                    while not admin.xlen("relay:dead-letters"):
                        await asyncio.sleep(0.02)
                ((_, letter),) = admin.xrange("relay:dead-letters")
                assert letter[b"reason"] == b"too large: 60000005 bytes"
                assert letter[b"truncated"] == b"1"
            client.drop()
        # Four times: a reply contains the stream's last entry as well, and its buffer doubles.
        assert _peak_mb(relay.pid) - before < 450
    finally:
        relay.kill()
