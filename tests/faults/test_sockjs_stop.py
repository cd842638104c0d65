"""One of two workers stops: polling clients whose session is on the other one miss nothing."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import signal
from collections import Counter

import pytest
from aiohttp import ClientResponse, ClientSession, TCPConnector

from tests.support.clients import redis, stream_key, until
from tests.support.valkey import Server
from tests.support.workers import running, workers

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]
SECRET = "a secret of the application"
CHANNEL = "rolling"
# A number of which some have session and socket on different workers, except once in 100,000 runs.
CLIENTS = 40
OVER = b"shutting down"


class Polled:
    """A v1 client over SockJS. Each request uses its own connection, as behind a proxy."""

    def __init__(self, http: ClientSession, base: str, number: int) -> None:
        self._http = http
        self._url = f"{base}/connection/000/rolling{number}"
        self.stream: ClientResponse | None = None

    async def post(self, transport: str, body: bytes = b"") -> ClientResponse:
        # With an Origin, as from a browser, which can distinguish a complete response from a broken
        # one.
        headers = {"Origin": "http://page.example"}
        return await self._http.post(f"{self._url}/{transport}", data=body, headers=headers)

    async def open(self) -> None:
        """Open a new stream and read its prelude."""
        self.stream = await self.post("xhr_streaming")
        assert self.stream.status == 200
        await self.stream.content.readuntil(b"\n")

    async def line(self) -> bytes:
        """Return the next frame that is not a heartbeat, or b'' at the end of the stream."""
        assert self.stream is not None
        # A stream that ends is filled with one long heartbeat.
        while set(line := await self.stream.content.readline()) == set(b"h\n"):
            pass
        return line

    async def ask(self, method: str, **params: str) -> None:
        command = json.dumps({"uid": "1", "method": method, "params": params})
        async with await self.post("xhr_send", json.dumps([command]).encode()) as answer:
            assert answer.status == 204
        assert f'\\"method\\":\\"{method}\\"'.encode() in await self.line()

    async def begin(self) -> None:
        async with await self.post("xhr") as answer:
            assert await answer.read() == b"o\n"
        await self.open()
        sign = hmac.new(SECRET.encode(), b"u1500000000", hashlib.sha256).hexdigest()
        await self.ask("connect", user="u", timestamp="1500000000", info="", token=sign)
        await self.ask("subscribe", channel=CHANNEL)

    async def follow(self) -> str:
        """Read until the message or the end of the session; return which of them it was."""
        line = await self.line()
        if b"the message" in line:
            return "stayed"
        # Anything else would be a session that was lost.
        assert OVER in line, line
        return "was told"


async def test_sessions_of_the_other_worker_go_on(valkey: Server) -> None:
    async with (
        running(valkey, f"protocol:centrifugo.secret={SECRET}") as (relay, _),
        ClientSession(connector=TCPConnector(limit=0, force_close=True)) as http,
        asyncio.TaskGroup() as tasks,
    ):
        clients = [Polled(http, relay.url, number) for number in range(CLIENTS)]
        for client in clients:
            await client.begin()
        following = [tasks.create_task(client.follow()) for client in clients]
        stopped = workers(relay)[1]
        os.kill(stopped, signal.SIGTERM)
        await until(lambda: stopped not in workers(relay).values())
        redis(valkey, "XADD", stream_key(CHANNEL), "*", "data", '"the message"')
        how = Counter([await each for each in following])
        for client in clients:
            assert client.stream is not None
            client.stream.close()
    assert how.total() == CLIENTS
    # The session's worker has the socket, so no other worker's stop ends a stream.
    assert set(how) == {"stayed", "was told"}
