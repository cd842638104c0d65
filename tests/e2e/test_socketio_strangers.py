"""What a Socket.IO client without a credential can make the relay hold and compute."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.relay import RelayProcess
from tests.support.socketio import SECRET, axr_token
from tests.support.valkey import Server

pytestmark = pytest.mark.redis

SOCKETS, ATTACHMENTS = 8, 10
ATTACHMENT = bytes(999_000)
UNKNOWN = '{"code":1,"message":"Session ID unknown"}'


@pytest.fixture(scope="module")
def axr(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=[f"protocol:socketio.secret={SECRET}"]).start()
    yield process
    process.kill()


def memory_mb(process: RelayProcess) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = (each for each in status.splitlines() if each.startswith("VmRSS"))
    return int(line.split()[1]) / 1000


def connect(token: str) -> str:
    return "40/axr," + json.dumps({"token": token})


class Polling:
    """A session over plain requests."""

    def __init__(self, http: aiohttp.ClientSession, relay: RelayProcess) -> None:
        self._http = http
        self._url = f"{relay.url}/socket.io/?EIO=4&transport=polling"

    async def open(self) -> Polling:
        async with self._http.get(self._url) as answer:
            self._url += "&sid=" + json.loads((await answer.text())[1:])["sid"]
        return self

    async def post(self, body: str) -> int:
        async with self._http.post(self._url, data=body) as answer:
            return answer.status

    async def poll(self) -> str:
        async with self._http.get(self._url) as answer:
            return await answer.text()


@pytest.mark.parametrize("token", ["", axr_token("attachments")], ids=["stranger", "user"])
async def test_attachments_are_not_kept(axr: RelayProcess, token: str) -> None:
    url = f"{axr.url}/socket.io/?EIO=4&transport=websocket"

    async def send(http: aiohttp.ClientSession) -> None:
        socket = await http.ws_connect(url)
        await socket.receive()
        if token:
            await socket.send_str(connect(token))
            while not (await socket.receive_str()).startswith("40/axr,"):
                pass
        try:
            await socket.send_str('4510-/axr,["x"]' if token else '4564-["x"]')
            for _ in range(ATTACHMENTS - 1):
                await socket.send_bytes(ATTACHMENT)
        except ConnectionError:
            assert not token

    before = memory_mb(axr)
    async with aiohttp.ClientSession() as http:
        async with asyncio.TaskGroup() as group:
            for _ in range(SOCKETS):
                group.create_task(send(http))
        # 72 MB were sent, and each socket's event lacks its last attachment.
        assert memory_mb(axr) - before < 30


@pytest.mark.parametrize("token", ["", axr_token("packets")], ids=["stranger", "user"])
async def test_a_body_of_many_packets_is_rejected_and_ends_the_session(
    axr: RelayProcess, token: str
) -> None:
    async with aiohttp.ClientSession() as http:
        session = await Polling(http, axr).open()
        if token:
            assert await session.post(connect(token)) == 200
            assert "sid" in await session.poll()
        body = "\x1e".join(["40/a,"] * 160_000)
        assert await session.post(body) == (400 if token else 413)
        # The client learns that the session has ended, whatever it does next.
        assert await session.poll() in ("1", UNKNOWN)
        assert await session.poll() == UNKNOWN
