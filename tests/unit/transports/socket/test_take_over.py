"""Taking a connection over from aiohttp loses no byte and releases aiohttp's objects."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import ssl
import weakref
from contextlib import suppress

import pytest
from aiohttp import ClientSession, web

from relay.transports.socket import sse
from relay.transports.socket.exchange import Exchange, HeldRequest, HttpAnswer, http_request
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import take_over
from relay.transports.socket.websocket import WebSocketConnection, accept_headers, frame_text
from tests.unit.transports.serving import (
    GET,
    HANDSHAKE,
    Handler,
    Run,
    head_of,
    masked,
    raw_client,
    serving,
)

Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


class Echo:
    """Sends every text back. `pause` delays its handler before the take-over."""

    def __init__(self, reaper: Reaper, pause: asyncio.Event | None = None) -> None:
        self.reaper = reaper
        self.pause = pause
        self.arrived = asyncio.Event()
        self.closed = asyncio.Event()
        self.closings = 0
        self.clients: list[WebSocketConnection] = []
        self.leftovers: list[weakref.ref[object]] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.arrived.set()
        if self.pause is not None:
            await self.pause.wait()
        head = accept_headers(request)
        if isinstance(head, web.Response):
            return head
        client = WebSocketConnection(
            buffer_bytes=65536, max_frame_bytes=1 << 20, reaper=self.reaper
        )
        client.on_text = lambda text: client.write(frame_text(text))
        client.on_closed = self._on_closed
        self.clients.append(client)
        self.leftovers.append(weakref.ref(request))
        return take_over(request, head, client)

    def _on_closed(self) -> None:
        self.closings += 1
        self.closed.set()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_a_first_frame_in_the_segment_of_the_handshake_is_read(
    run: Run, reaper: Reaper, tls: Contexts, secure: bool
) -> None:
    async def main() -> None:
        echo = Echo(reaper)
        half = masked(1, b"two")
        async with (
            serving(echo.handle, tls[0] if secure else None) as (port, _),
            raw_client(
                port, HANDSHAKE + masked(1, b"one") + half[:5], tls[1] if secure else None
            ) as (reader, writer),
        ):
            assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in await head_of(reader)
            assert await reader.readexactly(5) == b"\x81\x03one"
            writer.write(half[5:])
            assert await reader.readexactly(5) == b"\x81\x03two"
            writer.write(masked(1, b"three"))
            assert await reader.readexactly(7) == b"\x81\x05three"

    run(main())


def test_frames_that_arrive_before_the_handler_returns_are_read(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        echo = Echo(reaper, asyncio.Event())
        big = masked(1, b"x" * 300_000, mask=b"\0\0\0\0")
        async with (
            serving(echo.handle) as (port, _),
            raw_client(port, HANDSHAKE) as (reader, writer),
        ):
            await echo.arrived.wait()
            # This exceeds the size at which aiohttp pauses reading.
            writer.write(big)
            for _ in range(20):
                await asyncio.sleep(0)
            assert echo.pause is not None
            echo.pause.set()
            await head_of(reader)
            assert len(await reader.readexactly(10 + 300_000)) == 300_010

    run(main())


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_aiohttp_releases_the_connection_and_logs_the_request_once(
    run: Run, reaper: Reaper, tls: Contexts, secure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def main() -> None:
        echo = Echo(reaper)
        before = asyncio.all_tasks()
        async with (
            serving(echo.handle, tls[0] if secure else None, 0.05) as (port, runner),
            raw_client(port, HANDSHAKE, tls[1] if secure else None) as (reader, writer),
        ):
            await head_of(reader)
            # The connection answers after aiohttp's idle timeout has passed.
            await asyncio.sleep(0.15)
            writer.write(masked(1, b"hi"))
            assert await reader.readexactly(4) == b"\x81\x02hi"
            assert runner.server is not None
            assert runner.server.connections == []
            assert asyncio.all_tasks() == before
            gc.collect()
            assert [ref() for ref in echo.leftovers] == [None]
            await runner.cleanup()
            writer.write(masked(1, b"hi"))
            assert await reader.readexactly(4) == b"\x81\x02hi"
            echo.clients[0].abort()
            await echo.closed.wait()

    run(main())
    access = [record for record in caplog.records if record.name == "aiohttp.access"]
    assert [" 101 " in record.getMessage() for record in access] == [True]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_disconnect_is_reported_to_the_owner_once(
    run: Run, reaper: Reaper, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        echo = Echo(reaper, asyncio.Event())

        async with serving(echo.handle) as (port, runner):
            async with raw_client(port, HANDSHAKE):
                await echo.arrived.wait()
                assert runner.server is not None
                connection = runner.server.connections[0]
            while connection.transport is not None:
                await asyncio.sleep(0)
            assert echo.pause is not None
            echo.pause.set()
            await echo.closed.wait()
        assert echo.closings == 1
        client = echo.clients[0]
        client.write(b"nobody reads this")
        client.close(b"nor this")
        assert client.closing

    run(main())
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_stream_starts_with_its_head_and_disables_nagle(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        options: list[int] = []

        async def handler(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            sock = request.transport.get_extra_info("socket")
            options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            options.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            client = sse.SseConnection(buffer_bytes=65536, reaper=reaper)
            response = take_over(request, sse.head({"Access-Control-Allow-Origin": "*"}), client)
            client.write(b"id: 1-0\ndata: hello\n\n")
            client.close(b"event: end\ndata: bye\n\n")
            return response

        async with serving(handler) as (port, _), ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/") as answer:
                assert answer.status == 200
                assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
                assert answer.headers["Access-Control-Allow-Origin"] == "*"
                assert await answer.read() == b"id: 1-0\ndata: hello\n\nevent: end\ndata: bye\n\n"
            async with raw_client(port, GET) as (reader, _):
                assert (await reader.read()).endswith(b"data: bye\n\n")
        assert all(options)

    run(main())


def test_other_requests_of_the_same_server_work(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        handler: Handler = Echo(reaper).handle
        async with (
            serving(handler) as (port, _),
            ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}/") as answer,
        ):
            assert answer.status == 426
            assert answer.headers["Sec-WebSocket-Version"] == "13"

    run(main())


def test_a_response_to_a_connection_that_is_ending_leaves_nothing(run: Run) -> None:
    closed: list[bool] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        exchange = Exchange(request, http_request(request, b""))
        held = HeldRequest(buffer_bytes=65536, reaper=Reaper())
        exchange.hold(held)
        transport = held._transport
        assert transport is not None

        def lose_and_answer() -> None:
            # The loop has read the end of the connection, but its protocol has not been called yet.
            transport.abort()
            held.finish(HttpAnswer(200, b"late"))
            closed.append(transport.is_closing())

        asyncio.get_running_loop().call_soon(lose_and_answer)
        assert exchange.response is not None
        return exchange.response

    async def main() -> None:
        async with serving(handler) as (port, _), raw_client(port, GET) as (reader, _):
            with suppress(ConnectionError):
                assert await reader.read() == b""
        gc.collect()  # reports exceptions of tasks that were not awaited

    run(main())
    assert closed == [True]
