"""A Redis that stops answering for longer than all time limits, and recovers."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.clients import native, until
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]


async def test_the_relay_reads_on_after_a_freeze_longer_than_a_connect_takes(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path / "valkey")
    limits = ["redis.connect_timeout_s=0.3", "redis.command_timeout_s=0.3"]
    with running(server):
        relay = RelayProcess(server, settings=limits).start()
        try:
            async with native(relay) as door:
                sse = await door.sse("news")
                server.freeze()
                await until(
                    lambda: any("did not answer within 0.3 s" in line for line in relay.log)
                )
                # New connections get no reply either. The log has equal lines only once.
                given_up = server.abandoned()
                await until(lambda: server.abandoned() >= given_up + 5)
                server.thaw()
                relay.xadd("news", data="1")
                assert (await sse.next()).data == "1"
        finally:
            relay.kill()


async def test_a_frozen_redis_does_not_delay_a_stop(tmp_path: Path) -> None:
    server = Server(tmp_path / "valkey")
    with running(server):
        relay = RelayProcess(server).start()
        try:
            async with native(relay) as door:
                stream = await door.sse("news")
                server.freeze()
                relay.send(signal.SIGTERM)
                # Clients are asked to reconnect first.
                assert [block.event for block in await stream.ended()] == ["relay:closing"]
                assert await asyncio.to_thread(relay.ended, 10) == 0
        finally:
            server.thaw()
            relay.kill()


async def test_a_stop_signal_during_the_start_takes_effect(tmp_path: Path) -> None:
    """Redis is not there yet, and relay waits for it."""
    relay = RelayProcess(Server(tmp_path / "valkey"))

    def start() -> None:
        with suppress(RuntimeError):
            relay.start()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(start))
            await until(lambda: any("is disabled" in line for line in relay.log))
            relay.send(signal.SIGTERM)
        assert await asyncio.to_thread(relay.ended) == 0
        assert any("Stopped during the start" in line for line in relay.log)
    finally:
        relay.kill()
