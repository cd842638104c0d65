"""Without free file descriptors, existing clients are served, no CPU is wasted, and relay
recovers."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator

import pytest

from tests.support.clients import LIMIT_S, native, redis
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]

LIMIT = 128


@pytest.fixture(scope="module")
def poor(valkey: Server) -> Iterator[RelayProcess]:
    """Run a relay with a low limit of open files, soft and hard."""
    process = RelayProcess(valkey, prefix=["prlimit", f"--nofile={LIMIT}:{LIMIT}"]).start()
    yield process
    process.kill()


def _cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _is_served(port: int) -> bool:
    """Return True if a new connection is served."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return connection.recv(12) == b"HTTP/1.1 200"
    except OSError:
        return False


async def test_out_of_descriptors(poor: RelayProcess, valkey: Server, channel: str) -> None:
    async with native(poor) as door:
        stream, websocket = await door.sse(channel), await door.ws(channel)
        await websocket.next()
        address = ("127.0.0.1", poor.port)
        crowd = [socket.create_connection(address) for _ in range(LIMIT * 2)]
        try:
            assert not await asyncio.to_thread(_is_served, poor.port)
            began, before = time.monotonic(), _cpu_s(poor.pid)
            for number in range(20):
                poor.xadd(channel, data=str(number))
                assert (await stream.next()).json() == number
                assert (await websocket.next())["data"] == number
                await asyncio.sleep(0.05)
            assert _cpu_s(poor.pid) - before < 0.3 * (time.monotonic() - began)
            # Redis is reachable even now, because some descriptors are reserved for it.
            redis(valkey, "CLIENT", "KILL", "USER", "relay", "SKIPME", "yes")
            poor.xadd(channel, data='"again"')
            assert (await stream.next()).json() == "again"
        finally:
            for each in crowd:
                each.close()
        async with asyncio.timeout(LIMIT_S):
            while not await asyncio.to_thread(_is_served, poor.port):
                pass
        late = await door.sse(channel)
        poor.xadd(channel, data='"late"')
        assert (await late.next()).json() == (await stream.next()).json() == "late"
    assert len([line for line in poor.log if "descriptors" in line]) == 1
    assert not any("Traceback" in line for line in poor.log)
