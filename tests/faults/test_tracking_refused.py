"""A server whose ACL rejects CLIENT TRACKING: streams are polled, and all events arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.clients import native, redis, rights_key
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def polled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """Run a relay whose user may not use tracking."""
    server = Server(tmp_path_factory.mktemp("valkey"))
    with running(server):
        redis(server, "ACL", "SETUSER", "relay", "-client|tracking")
        process = RelayProcess(server).start()
        yield process
        process.kill()


async def test_live_resume_rights_and_control_work_without_tracking(
    polled: RelayProcess, channel: str
) -> None:
    assert any("polling streams" in line for line in polled.log)
    async with native(polled) as door:
        names = [channel, f"{channel}-b"]
        stream, websocket = await door.sse(*names), await door.ws(channel)
        await websocket.next()
        for number in range(50):
            polled.xadd(names[number % 2], data=str(number))
        blocks = await stream.take(50)
        assert [block.json() for block in blocks if block.json() % 2 == 0] == [*range(0, 50, 2)]
        assert [block.json() for block in blocks if block.json() % 2] == [*range(1, 50, 2)]
        assert [each["data"] for each in await websocket.take(25)] == [*range(0, 50, 2)]
        stream.drop()
        polled.xadd(channel, data='"missed"')
        stream = await door.sse(*names, header=stream.last_id)
        assert (await stream.next()).json() == "missed"
        assert (await websocket.next())["data"] == "missed"
        assert await door.status("/readyz") == 200

        redis(polled.server, "HSET", rights_key(channel), "alice", "-")
        assert (await websocket.next())["notice"] == "revoked"
        redis(polled.server, "XADD", "relay:control", "*", "command", "disconnect", "user", "alice")
        _, code = await websocket.closed()
        assert code == 4403


async def test_readiness_with_many_idle_streams(polled: RelayProcess, channel: str) -> None:
    async with native(polled) as door:
        many = [f"{channel}-{number}" for number in range(2000)]
        for start in range(0, len(many), 100):
            await door.sse(*many[start : start + 100])
        for _ in range(20):
            assert await door.status("/readyz") == 200
            await asyncio.sleep(0.1)
        client = await door.sse(channel)
        polled.xadd(channel, data="1")
        assert (await client.next()).json() == 1


async def test_a_foreign_key_among_the_polled_hurts_only_its_channel(
    polled: RelayProcess, channel: str
) -> None:
    async with native(polled) as door:
        good, bad = await door.sse(channel), await door.sse(f"{channel}-bad")
        key = f"relay:stream:{{{channel}-bad}}"
        redis(polled.server, "DEL", key)
        redis(polled.server, "SET", key, "foreign")
        for number in range(5):
            polled.xadd(channel, data=str(number))
            assert (await good.next()).json() == number
        redis(polled.server, "DEL", key)
        polled.xadd(f"{channel}-bad", data="1")
        blocks = await bad.take(2)
        assert [block.event for block in blocks] == ["relay:reset", None]
