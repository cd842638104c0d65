"""A client that stops reading costs a cursor, not memory, and does not affect other clients."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.clients import Native, SseClient, WsClient, native, stream_key
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis

EVENTS = 1000
EVENT_BYTES = 20_000
RSS_RISE_BYTES = 16_000_000


def _rss_bytes(relay: RelayProcess) -> int:
    pages = int(Path(f"/proc/{relay.pid}/statm").read_text().split()[1])
    return pages * 4096


def _append(server: Server, channel: str, first: int, count: int) -> None:
    """Append in batches, because the appends are not measured."""
    load = "x" * EVENT_BYTES
    client = server.client()
    for start in range(first, first + count, 50):
        pipeline = client.pipeline(transaction=False)
        for number in range(start, min(start + 50, first + count)):
            data = f'{{"n":{number},"load":"{load}"}}'
            pipeline.execute_command("XADD", stream_key(channel), "*", "data", data)  # type: ignore[no-untyped-call]
        pipeline.execute()


async def _until_behind(door: Native, count: int) -> None:
    async with asyncio.timeout(30):
        while await door.metric("relay_catch_up_clients") != count:
            await asyncio.sleep(0.02)


async def _read_sse(client: SseClient, count: int) -> list[int]:
    return [block.json()["n"] for block in await client.take(count)]


async def _read_ws(client: WsClient, count: int) -> list[int]:
    return [each["data"]["n"] for each in await client.take(count)]


@pytest.mark.slow
async def test_a_slow_client_costs_a_cursor_and_gets_everything(
    relay: RelayProcess, valkey: Server, channel: str
) -> None:
    async with native(relay) as door, asyncio.TaskGroup() as tasks:
        sse_stalled, ws_stalled = await door.sse(channel, limit=65536), await door.ws(channel)
        await ws_stalled.next()
        lively = [await door.sse(channel) for _ in range(3)]
        await asyncio.to_thread(_append, valkey, channel, 0, 20)
        read = [tasks.create_task(_read_sse(each, EVENTS)) for each in lively]
        # aiohttp's client stops reading its socket by itself at 64 KB of unread data; the other one
        # is asked to.
        sse_stalled.transport.pause_reading()
        before = _rss_bytes(relay)
        await asyncio.to_thread(_append, valkey, channel, 20, EVENTS - 20)
        await _until_behind(door, 2)
        for each in read:
            assert await each == list(range(EVENTS))
        assert _rss_bytes(relay) - before < RSS_RISE_BYTES

        sse_stalled.transport.resume_reading()
        assert await _read_sse(sse_stalled, EVENTS) == list(range(EVENTS))
        assert await _read_ws(ws_stalled, EVENTS) == list(range(EVENTS))
        await _until_behind(door, 0)
        assert _rss_bytes(relay) - before < RSS_RISE_BYTES
        relay.xadd(channel, data='{"n":-1}')
        for client in (*lively, sse_stalled):
            assert await _read_sse(client, 1) == [-1]
        assert await _read_ws(ws_stalled, 1) == [-1]


async def test_a_slow_client_is_told_what_was_trimmed_meanwhile(
    relay: RelayProcess, valkey: Server, channel: str
) -> None:
    async with native(relay) as door:
        stalled, lively = await door.sse(channel, limit=65536), await door.sse(channel)
        stalled.transport.pause_reading()
        await asyncio.to_thread(_append, valkey, channel, 0, 600)
        assert await _read_sse(lively, 600) == list(range(600))
        await _until_behind(door, 1)
        valkey.client().xtrim(stream_key(channel), maxlen=5, approximate=False)
        stalled.transport.resume_reading()
        seen: list[int] = []
        while True:
            block = await stalled.next()
            if block.event is not None:
                break
            seen.append(block.json()["n"])
        assert block.event == "relay:gap"
        assert block.json()["reason"] == "trimmed"
        assert seen == list(range(len(seen)))
        assert await _read_sse(stalled, 5) == list(range(595, 600))


async def test_a_client_that_takes_nothing_for_long_is_cut_off(
    valkey: Server, channel: str
) -> None:
    relay = RelayProcess(valkey, settings=["protocol:native.heartbeat_s=1"])
    await asyncio.to_thread(relay.start)
    try:
        async with native(relay) as door:
            stalled = await door.sse(channel, limit=65536)
            stalled.transport.pause_reading()
            await asyncio.to_thread(_append, valkey, channel, 0, 600)
            await _until_behind(door, 1)
            async with asyncio.timeout(30):
                while await door.metric('relay_connections{protocol="native"}'):
                    await asyncio.sleep(0.05)
    finally:
        relay.kill()
