"""Clocks that differ or are set: that of the relay's host, by libfaketime."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.clients import native, redis, until
from tests.support.programs import missing
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running

pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]

LIBRARIES = "*/faketime/libfaketime.so.1"


async def _is_renewed(server: Server, key: bytes) -> None:
    """Wait until the worker has renewed its heartbeat twice: once may be from before."""
    for _ in range(2):
        before = redis(server, "PEXPIRETIME", key)
        await until(lambda before=before: redis(server, "PEXPIRETIME", key) > before)  # type: ignore[misc]


async def test_the_clock_of_a_host_is_ahead_and_then_set_back(tmp_path: Path) -> None:
    library = next(Path("/usr/lib").glob(LIBRARIES), None) or missing("libfaketime", "faketime")
    offset = tmp_path / "offset"
    offset.write_text("+120s")
    faked = [
        "env",
        f"LD_PRELOAD={library}",
        f"FAKETIME_TIMESTAMP_FILE={offset}",
        "FAKETIME_NO_CACHE=1",
        "FAKETIME_DONT_FAKE_MONOTONIC=1",
    ]
    server = Server(tmp_path / "valkey")
    with running(server):
        relay = RelayProcess(server, prefix=faked).start()
        try:
            async with native(relay) as door:
                stream = await door.sse("news")
                relay.xadd("news", data="1")
                assert (await stream.next()).data == "1"
                await until(lambda: any("120 s ahead of the clock" in line for line in relay.log))
                (key,) = redis(server, "KEYS", "relay:node:*")
                # The lead is not reported as a lag.
                below_30_s = await door.metric('relay_lag_seconds_bucket{le="30.0"}')
                assert below_30_s == await door.metric("relay_lag_seconds_count") > 0
                assert "120 s ahead" in (await door.get("/readyz")).body.decode()
                # The next heartbeat says it.
                await until(lambda: b"120 s ahead" in redis(server, "GET", key))
                status = await Cli(server).run("status")
                assert status.returncode == 1
                assert "120 s ahead of the clock of Redis" in status.stderr

                offset.write_text("-3480s")
                await until(lambda: any("was set back by 3600 s" in line for line in relay.log))
                # Periodic jobs run on: the heartbeat is renewed every 5 s.
                await _is_renewed(server, key)
                relay.xadd("news", data="2")
                assert (await stream.next()).data == "2"

                # The runs that a year has skipped are not computed one by one.
                offset.write_text("+365d")
                await until(lambda: any("was set forward by" in line for line in relay.log))
                await _is_renewed(server, key)
        finally:
            relay.kill()
