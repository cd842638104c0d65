"""A Redis that is frozen for longer than the time limits: no command is lost or repeated."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.clients import native, redis, stream_key, until
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
SETTINGS = [
    "redis.connect_timeout_s=0.3",
    "redis.command_timeout_s=0.3",
    "producer:queue.enabled=yes",
    # Each command is a separate step, so that the freeze occurs between them.
    "producer:queue.batch=1",
]
ROUND = 1000


def push(server: Server, numbers: range) -> None:
    publish = '{"method":"publish","params":{"channel":"news","data":%d}}'
    redis(server, "RPUSH", "centrifugo.api", *[publish % number for number in numbers])


async def test_commands_go_on_after_a_freeze_each_once(tmp_path: Path) -> None:
    server = Server(tmp_path / "valkey")
    with running(server):
        relay = RelayProcess(server, settings=SETTINGS)
        await asyncio.to_thread(relay.start)
        try:
            async with native(relay) as door:
                sse = await door.sse("news")
                for first in range(0, 3 * ROUND, ROUND):
                    await asyncio.to_thread(push, server, range(first, first + ROUND))
                    blocks = await sse.take(5)
                    server.freeze()
                    # The lost connection, and new ones that get no reply.
                    await until(lambda: server.abandoned() >= 5)
                    server.thaw()
                    blocks += await sse.take(ROUND - 5)
                    assert [block.json() for block in blocks] == list(range(first, first + ROUND))
            found = redis(server, "XRANGE", stream_key("news"), "-", "+")
            assert [int(fields[b"data"]) for _, fields in found] == list(range(3 * ROUND))
            assert not redis(server, "EXISTS", "centrifugo.api", "relay:dead-letters")
        finally:
            relay.kill()
