"""The Socket.IO protocol with python-socketio 4 and 5, over both transports."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import redis
from tests.support.pypi import packages
from tests.support.relay import RelayProcess
from tests.support.socketio import SECRET, axr_token
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
_SCRIPT = Path(__file__).parents[1] / "support" / "socketio_python.py"
VERSIONS = ("python-socketio-4.6.1", "python-socketio-5.18.1")
TRANSPORTS = ("polling", "websocket")


class PythonClient:
    """A client in its own process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def next(self, limit_s: float = 15) -> list[Any]:
        """Return its next report."""
        assert self._process.stdout is not None
        async with asyncio.timeout(limit_s):
            found: list[Any] = json.loads(await self._process.stdout.readline())
            return found

    async def until(self, what: str) -> list[list[Any]]:
        """Return its reports up to this one."""
        found = [await self.next()]
        while found[-1][0] != what:
            found.append(await self.next())
        return found


@asynccontextmanager
async def client(
    version: str, relay: RelayProcess, transport: str, token: str
) -> AsyncIterator[PythonClient]:
    """Run a client that connects at once."""
    folder = await asyncio.to_thread(packages, version)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", str(_SCRIPT), relay.url, transport, token),
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield PythonClient(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@asynccontextmanager
async def every_kind(relay: RelayProcess, token: str) -> AsyncIterator[list[PythonClient]]:
    """Run a client of each version over each transport."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(client(version, relay, transport, token))
            for version in VERSIONS
            for transport in TRANSPORTS
        ]


@pytest.fixture(scope="module")
def axr(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=[f"protocol:socketio.secret={SECRET}"]).start()
    yield process
    process.kill()


async def test_clients_come_back_after_a_restart(axr: RelayProcess) -> None:
    """A poll that waits when relay stops is rejected: Python's clients take CLOSE as final."""
    async with every_kind(axr, axr_token("py")) as clients:
        for each in clients:
            await each.until("connect")
        axr.xadd("axr:py", data='"1"', type="text")
        axr.xadd("axr:py", data="[]", type="nothing", args="0")
        for each in clients:
            # No client receives a cursor in its events. Each event has a thread in the client, so
            # that their order may change there.
            assert sorted([await each.next() for _ in range(2)]) == [["nothing"], ["text", "1"]]
        await asyncio.to_thread(axr.restart)
        for each in clients:
            # Attempts while relay is away fail.
            assert (await each.until("connect"))[0] == ["disconnect"]
        axr.xadd("axr:py", data='"2"', type="text")
        for each in clients:
            assert await each.next() == ["text", "2"]


async def test_rejected_clients_stay_away(axr: RelayProcess) -> None:
    async with every_kind(axr, "bad") as clients:
        for each in clients:
            assert ["connect_error"] in await each.until("ended")


async def test_disconnected_clients_stay_away(axr: RelayProcess) -> None:
    async with every_kind(axr, axr_token("gone")) as clients:
        for each in clients:
            await each.until("connect")
        redis(axr.server, "XADD", "relay:control", "*", "command", "disconnect", "user", "gone")
        for each in clients:
            assert await each.until("ended") == [["disconnect"], ["ended"]]
