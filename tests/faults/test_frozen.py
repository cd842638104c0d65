"""A Redis that stops answering for longer than all time limits, and recovers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.clients import native, until
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running

pytestmark = pytest.mark.redis


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
