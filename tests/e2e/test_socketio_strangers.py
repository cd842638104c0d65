"""Limits for Socket.IO clients without credentials."""

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
UPGRADE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


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
    """An Engine.IO session over HTTP polling."""

    def __init__(self, http: aiohttp.ClientSession, relay: RelayProcess) -> None:
        self._http = http
        self._url = f"{relay.url}/socket.io/?EIO=4&transport=polling"

    @property
    def target(self) -> str:
        """Return the path and query of the session's requests."""
        return "/" + self._url.split("/", 3)[3]

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

    async def send(http: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
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
        return socket

    before = memory_mb(axr)
    async with aiohttp.ClientSession() as http:
        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(send(http)) for _ in range(SOCKETS)]
        # The clients sent 72 MB. No event is complete, because its last attachment is missing.
        assert memory_mb(axr) - before < 30
        # Wait until all has been sent. Otherwise the loop ends before the connections.
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.result().close())


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
        # The session has ended, and the next poll reports it.
        assert await session.poll() in ("1", UNKNOWN)
        assert await session.poll() == UNKNOWN


async def test_clients_that_leave_at_any_moment_write_nothing_into_the_log(valkey: Server) -> None:
    """With two workers, half of these requests are passed on to the other worker."""
    axr = RelayProcess(valkey, settings=[f"protocol:socketio.secret={SECRET}", "node.workers=2"])
    await asyncio.to_thread(axr.start)
    try:
        async with aiohttp.ClientSession() as http:
            sessions = [await Polling(http, axr).open() for _ in range(10)]
            before = len(axr.log)
            for number in range(200):
                target = sessions[number % 10].target
                if number % 2:
                    target = target.replace("polling", "websocket")
                    head, rest = f"GET {target}", UPGRADE
                else:
                    head, rest = f"POST {target}", "Content-Length: 1000\r\n\r\n4"
                _, writer = await asyncio.open_connection("127.0.0.1", axr.port)
                writer.write(f"{head} HTTP/1.1\r\nHost: x\r\n{rest}".encode())
                await writer.drain()
                if number % 3:
                    writer.transport.abort()
                else:
                    writer.close()
            # When a new session works, relay has processed all earlier requests.
            session = await Polling(http, axr).open()
            assert await session.post(connect(axr_token("after"))) == 200
            assert "sid" in await session.poll()
    finally:
        await asyncio.to_thread(axr.stop)
    wrong = [line for line in axr.log if "Traceback" in line or "TypeError" in line]
    assert wrong == [], "\n".join(axr.log)
    assert len(axr.log) - before < 20


async def test_a_forged_session_id_costs_no_body(valkey: Server) -> None:
    """The forged ID has the address of another relay's worker, but no existing session."""
    settings = [f"protocol:socketio.secret={SECRET}", "node.internal_address=127.0.0.1"]
    relays = [RelayProcess(valkey, settings=settings) for _ in range(2)]
    try:
        for each in relays:
            await asyncio.to_thread(each.start)
        async with aiohttp.ClientSession() as http:
            session = await Polling(http, relays[0]).open()
            sid = session.target.rpartition("sid=")[2]
            elsewhere = f"{relays[1].url}/socket.io/?EIO=4&transport=polling&sid="
            forged = "~" + "a" * 20 + "." + sid.partition(".")[2]
            head = f"POST {elsewhere}{forged} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", relays[1].port)
            writer.write(head.encode())
            async with asyncio.timeout(30):
                # Relay rejects the request before the client sends its body.
                assert UNKNOWN in (await reader.read(4096)).decode()
            writer.close()
            # Requests of an existing session are accepted by any worker, up to the limit.
            for size, status in ((60_000, 200), (70_000, 413)):
                body = "6" + "a" * size
                async with http.post(elsewhere + sid, data=body) as answer:
                    assert answer.status == status
    finally:
        for each in relays:
            each.kill()
