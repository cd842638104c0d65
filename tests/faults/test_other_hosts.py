"""Polling sessions over two hosts, of which one dies, or whose Redis does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import ClientError, ClientResponse, ClientSession

from tests.support.clients import redis
from tests.support.sockjs_sites import WorkerProcess, workers
from tests.support.valkey import Server, free_port, running

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
# A dead worker's heartbeat expires later.
_NOTICED_S = 10
_KILLS_S = 2.0


class Browser:
    """Requests to workers that the test chooses."""

    def __init__(self, http: ClientSession, session: str) -> None:
        self._http = http
        self._session = session

    async def post(self, worker: WorkerProcess, transport: str, body: bytes = b"") -> bytes:
        url = f"http://127.0.0.1:{worker.port}/echo/0/{self._session}/{transport}"
        async with self._http.post(url, data=body) as answer:
            return str(answer.status).encode() + b" " + await answer.read()

    @asynccontextmanager
    async def stream(self, worker: WorkerProcess) -> AsyncIterator[ClientResponse]:
        url = f"http://127.0.0.1:{worker.port}/echo/0/{self._session}/xhr_streaming"
        async with self._http.post(url) as answer:
            await answer.content.readuntil(b"\n")
            yield answer


async def rest(answer: ClientResponse) -> bytes:
    """Return all frames until the end of the session."""
    found = b""
    async with asyncio.timeout(_NOTICED_S):
        try:
            while more := await answer.content.readany():
                found += more
        except ClientError:
            pass
    return found


@pytest.fixture
async def http() -> AsyncIterator[ClientSession]:
    async with ClientSession() as opened:
        yield opened


async def test_the_death_of_a_sessions_worker_ends_its_streams_elsewhere(
    valkey: Server, http: ClientSession
) -> None:
    browser = Browser(http, "owner-dies")
    async with workers(valkey, [free_port(), free_port()]) as (owner, other):
        assert await browser.post(owner, "xhr") == b"200 o\n"
        async with browser.stream(other) as answer:
            assert await browser.post(other, "xhr_send", b'["x"]') == b"204 "
            assert await answer.content.readuntil(b"\n") == b'a["x"]\n'
            await owner.kill()
            assert await browser.post(other, "xhr_send", b'["y"]') == b"404 404 page not found\n"
            assert await rest(answer) == b""
        # The client opens another session.
        assert await browser.post(other, "xhr") == b"404 404 page not found\n"
        assert await Browser(http, "anew").post(other, "xhr") == b"200 o\n"


async def test_the_death_of_the_worker_that_has_the_socket_ends_the_session(
    valkey: Server, http: ClientSession
) -> None:
    browser = Browser(http, "other-dies")
    async with workers(valkey, [free_port(), free_port()]) as (owner, other):
        assert await browser.post(owner, "xhr") == b"200 o\n"
        async with browser.stream(other) as answer:
            await browser.post(owner, "xhr_send", b'["x"]')
            assert await answer.content.readuntil(b"\n") == b'a["x"]\n'
            await other.kill()
            assert await rest(answer) == b""
            answers = set()

            async def anew() -> bool:
                answers.add(await browser.post(owner, "xhr"))
                return b"200 o\n" in answers

            async with asyncio.timeout(_NOTICED_S):
                while not await anew():
                    await asyncio.sleep(0.1)
        assert answers <= {b"200 o\n", b'200 c[2010,"Another connection still open"]\n'}


async def test_a_stream_of_another_worker_does_not_need_redis(
    tmp_path: Path, http: ClientSession
) -> None:
    server = Server(tmp_path)
    browser = Browser(http, "redis-dies")
    with running(server):
        async with workers(server, [free_port(), free_port()]) as (owner, other):
            assert await browser.post(owner, "xhr") == b"200 o\n"
            async with browser.stream(other) as answer:
                server.kill()
                assert await browser.post(owner, "xhr_send", b'["kept"]') == b"204 "
                assert await answer.content.readuntil(b"\n") == b'a["kept"]\n'
                server.start()
                assert await browser.post(other, "xhr_send", b'["after"]') == b"204 "
                assert await answer.content.readuntil(b"\n") == b'a["after"]\n'


async def _opened(http: ClientSession, name: str, at: WorkerProcess) -> Browser:
    """Open a session. After many lost connections, a worker waits before it connects to Redis."""
    browser = Browser(http, name)
    async with asyncio.timeout(30):
        while (answer := await browser.post(at, "xhr")) != b"200 o\n":
            assert answer.startswith(b"503 ")
            await asyncio.sleep(0.05)
    return browser


@pytest.mark.slow
async def test_lost_subscriptions_cut_no_stream(valkey: Server, http: ClientSession) -> None:
    async with workers(valkey, [free_port(), free_port()]) as pair:
        for owner, other in (pair, pair[::-1]):
            # Let workers pass on requests in both directions.
            browser = await _opened(http, f"subscriptions-{owner.port}", owner)
            reverse = await _opened(http, f"reverse-{owner.port}", other)
            async with browser.stream(other) as answer, reverse.stream(owner) as back:
                for number in range(100):
                    kill = ("CLIENT", "KILL", "TYPE", "pubsub")
                    await asyncio.to_thread(redis, valkey, *kill)
                    await asyncio.sleep(_KILLS_S / 100)
                    for each, stream, at in ((browser, answer, owner), (reverse, back, other)):
                        assert await each.post(at, "xhr_send", b'["%d"]' % number) == b"204 "
                        assert await stream.content.readuntil(b"\n") == b'a["%d"]\n' % number
