"""The worker of a session handles its requests, no matter which worker has read them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from aiohttp import web

from relay.core.errors import WorkerUnreachable
from relay.transports.between_workers import forwarder
from relay.transports.between_workers.internal import Introduction
from relay.transports.between_workers.splice import Answer
from relay.transports.socket.bodies import BodyRejected, read_body
from relay.transports.socket.client_socket import ClientSocket
from relay.transports.socket.exchange import (
    Exchange,
    HeldRequest,
    HttpAnswer,
    HttpRequest,
    http_request,
)
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.websocket import WebSocketConnection, accept_headers, frame_text
from tests.support.siblings import Cluster, ClusterWorker
from tests.unit.transports.serving import HANDSHAKE, Run, head_of, masked, raw_client

BUFFER = 8192
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
OWNER, ASKER, NOBODY = "0000000a", "0000000b", "0000000c"


class Worker:
    """Passes requests of every path on to `owner`, or handles them if it is the owner."""

    def __init__(self, node: ClusterWorker, reaper: Reaper) -> None:
        self.node = node
        self.reaper = reaper
        self.owner = OWNER
        self.asked: list[HttpRequest] = []
        self.held: list[HeldRequest] = []
        self.streams: list[ClientSocket] = []
        self.events: list[str] = []
        self.happened = asyncio.Event()

    def note(self, event: str) -> Callable[[], None]:
        def noted() -> None:
            self.events.append(event)
            self.happened.set()

        return noted

    async def until(self, *events: str) -> None:
        while self.events != list(events):
            self.happened.clear()
            await self.happened.wait()

    def handle(self, exchange: Exchange) -> bool:
        self.asked.append(exchange.request)
        what = exchange.request.target.partition("?")[0]
        if what == "/now":
            body = exchange.request.body
            text = b"none" if body is None else body
            exchange.answer(HttpAnswer(200, text.upper(), {"X-Owner": self.node.address}))
        elif what == "/later":
            held = HeldRequest(buffer_bytes=BUFFER, reaper=self.reaper)
            held.on_closed = self.note("gone")
            self.held.append(held)
            exchange.hold(held)
        elif what == "/stream":
            stream = ClientSocket(buffer_bytes=BUFFER, reaper=self.reaper)
            stream.on_closed = self.note("closed")
            stream.on_full = self.note("full")
            stream.on_drained = self.note("drained")
            self.streams.append(stream)
            exchange.take(HEAD, stream)
        elif what == "/ws":
            head = accept_headers(exchange.request)
            assert isinstance(head, bytes)
            socket = WebSocketConnection(
                buffer_bytes=BUFFER, max_frame_bytes=1 << 20, reaper=self.reaper
            )
            socket.on_text = lambda text: socket.write(frame_text(text.upper()))
            socket.on_closed = self.note("closed")
            self.streams.append(socket)
            exchange.take(head, socket)
        elif what == "/broken":
            raise ZeroDivisionError
        else:
            return False
        self.happened.set()
        return True

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.owner != self.node.address:
            try:
                passed = await self.node.forward(request, self.owner, 1000)
            except WorkerUnreachable:
                return web.Response(status=404)
            return passed or web.Response(status=410)
        try:
            body: bytes | None = await read_body(request, 1000)
        except BodyRejected:
            body = None
        exchange = Exchange(request, http_request(request, body))
        if not self.handle(exchange):
            return web.Response(status=404)
        assert exchange.response is not None
        return exchange.response

    def serving(self) -> AbstractAsyncContextManager[int]:
        return self.node.serving([web.route("*", "/{what:.*}", self.answer)])


def get(path: str, body: bytes = b"") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Both:
    """The session's worker and the one to which the client talks, which may be the same."""

    def __init__(self, reaper: Reaper, way: str) -> None:
        self.cluster = Cluster([OWNER, ASKER], on_its_own_host=way == "other host")
        self.owner, self.asker = (Worker(each, reaper) for each in self.cluster.workers.values())
        self.front = self.owner if way == "local" else self.asker

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """Return the port for the client."""
        async with self.owner.serving() as port, self.asker.serving() as other:
            yield port if self.front is self.owner else other
            while len(self.asker.node.forwarder):
                await asyncio.sleep(0.001)
        self.cluster.close()


@pytest.fixture(params=["local", "socket", "pair", "other host"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return how the request gets to the owner."""
    way = str(request.param)
    if way == "pair":
        # The kernel cannot copy the data of TLS connections.
        monkeypatch.setattr(forwarder, "_can_pass", lambda _: False)
    return way


def test_a_request_is_handled_with_its_headers_and_body(run: Run, reaper: Reaper, way: str) -> None:
    async def main() -> None:
        both = Both(reaper, way)
        async with (
            both.serving() as port,
            raw_client(port, b"") as (reader, writer),
        ):
            for _ in range(2):  # Both requests use one connection.
                writer.write(
                    b"POST /now?a=b%20c&a=d HTTP/1.1\r\nHost: x\r\nX-Odd: caf\xe9 \xf0\x9f\x98"
                    b"\x80\r\nContent-Length: 5\r\n\r\nhello"
                )
                head = await head_of(reader)
                assert b"200 OK" in head
                assert b"X-Owner: " + OWNER.encode() in head
                assert await reader.readexactly(5) == b"HELLO"
            writer.write(get("/now", b"x" * 1001))
            await head_of(reader)
            assert await reader.readexactly(4) == b"NONE"
        asked = both.owner.asked[0]
        assert asked.method == "POST"
        assert asked.query.getall("a") == ["b c", "d"]
        assert (
            asked.headers["x-ODD"].encode("utf-8", "surrogateescape") == b"caf\xe9 \xf0\x9f\x98\x80"
        )
        assert asked.peer == "127.0.0.1"
        assert not both.asker.asked

    run(main())


def test_the_connection_stays_open_after_a_delayed_response(
    run: Run, reaper: Reaper, way: str
) -> None:
    async def main() -> None:
        both = Both(reaper, way)
        owner = both.owner
        async with both.serving() as port, raw_client(port, b"") as (reader, writer):
            for number in range(3):
                writer.write(get("/later"))
                while len(owner.held) <= number:
                    owner.happened.clear()
                    await owner.happened.wait()
                # The next request begins before this one's answer.
                writer.write(get("/now", b"after")[:20])
                for _ in range(10):
                    await asyncio.sleep(0)
                owner.held[number].finish(HttpAnswer(200, b"done", {"Content-Type": "text/plain"}))
                assert b"Content-Length: 4" in await head_of(reader)
                assert await reader.readexactly(4) == b"done"
                writer.write(get("/now", b"after")[20:])
                await head_of(reader)
                assert await reader.readexactly(5) == b"AFTER"
            owner.held[0].finish(HttpAnswer(200, b"twice"))
        assert owner.events == []

    run(main())


def test_the_connection_closes_after_the_response_if_the_client_asks(
    run: Run, reaper: Reaper, way: str
) -> None:
    async def main() -> None:
        both = Both(reaper, way)
        owner = both.owner
        old = b"GET /later HTTP/1.0\r\nHost: x\r\n\r\n"
        new = b"GET /later HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        async with both.serving() as port:
            for number, request in enumerate((old, new)):
                async with raw_client(port, request) as (reader, _):
                    while len(owner.held) <= number:
                        owner.happened.clear()
                        await owner.happened.wait()
                    owner.held[number].finish(HttpAnswer(200, b"done"))
                    answer = await reader.read()
                    assert b"Connection: close" in answer
                    assert answer.endswith(b"\r\n\r\ndone")
        assert owner.events == []

    run(main())


def test_the_owner_is_notified_when_a_waiting_client_disconnects(
    run: Run, reaper: Reaper, way: str
) -> None:
    async def main() -> None:
        both = Both(reaper, way)
        owner = both.owner
        async with both.serving() as port:
            for path, event in (("/later", "gone"), ("/stream", "closed")):
                owner.events.clear()
                owner.happened.clear()
                async with raw_client(port, get(path)) as (_, writer):
                    await owner.happened.wait()
                    for _ in range(20):
                        await asyncio.sleep(0)
                    writer.transport.abort()
                    await owner.until(event)

    run(main())


def test_a_stream_pauses_for_a_slow_client_without_loss(run: Run, reaper: Reaper, way: str) -> None:
    async def main() -> None:
        both = Both(reaper, way)
        owner = both.owner
        async with (
            both.serving() as port,
            raw_client(port, get("/stream")) as (reader, _),
        ):
            await head_of(reader)
            (stream,) = owner.streams
            written = 0
            got: list[bytes] = []
            # This exceeds the buffers of both kernels.
            while written < 30_000_000:
                stream.write(b"%07d\n" % (written // 8) * 128)
                written += 8 * 128
                if stream.full:
                    assert stream.waiting_bytes() < 20 * BUFFER
                    while stream.full:
                        got.append(await reader.readexactly(8 * 128))
            stream.close(b"the end")
            rest = await reader.read()
            numbers = (b"".join(got) + rest).split(b"\n")
            assert numbers.pop() == b"the end"
            assert [int(each) for each in numbers[::128]] == list(range(0, written // 8, 128))
            while owner.events[-1] != "closed":
                owner.happened.clear()
                await owner.happened.wait()
        assert "full" in owner.events

    run(main())


def test_a_websocket_is_passed_on_in_both_directions(run: Run, reaper: Reaper, way: str) -> None:
    async def main() -> None:
        both = Both(reaper, way)
        owner = both.owner
        handshake = HANDSHAKE.replace(b"GET /", b"GET /ws")
        big = b"x" * 200_000
        async with (
            both.serving() as port,
            raw_client(port, handshake + masked(1, b"one")) as (reader, writer),
        ):
            assert b"101" in await head_of(reader)
            assert await reader.readexactly(5) == b"\x81\x03ONE"
            for _ in range(5):
                writer.write(masked(1, big))
                assert (await reader.readexactly(10 + len(big)))[10:] == big.upper()
            writer.write(masked(8, b"\x03\xe8"))
            assert await reader.read() == b"\x88\x02\x03\xe8"
            await owner.until("closed")

    run(main())


def test_a_websocket_whose_owner_does_not_read_gets_back_pressure(
    run: Run, reaper: Reaper, way: str
) -> None:
    async def main() -> None:
        both = Both(reaper, way)
        handshake = HANDSHAKE.replace(b"GET /", b"GET /ws")
        async with (
            both.serving() as port,
            raw_client(port, handshake) as (reader, writer),
        ):
            await head_of(reader)
            (socket,) = both.owner.streams
            socket.pause_reading()
            frame = masked(1, b"x" * 60_000)
            count = 0
            # Send until the buffers of both kernels and of the relay are full.
            while writer.transport.get_write_buffer_size() < 1_000_000:
                writer.write(frame)
                count += 1
                await asyncio.sleep(0.001)
            assert count > 16
            socket.resume_reading()
            for _ in range(count):
                assert len(await reader.readexactly(4 + 60_000)) == 60_004

    run(main())


def test_a_chunked_body_and_a_pipelined_request_arrive(run: Run, reaper: Reaper, way: str) -> None:
    async def main() -> None:
        both = Both(reaper, way)
        chunks = b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n"
        head = b"POST /now HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with both.serving() as port, raw_client(port, head) as (reader, writer):
            for part in (chunks[:7], chunks[7:], head + chunks):
                writer.write(part)
                await asyncio.sleep(0.01)
            for _ in range(2):
                await head_of(reader)
                assert await reader.readexactly(6) == b"HELLO!"

    run(main())


def test_a_large_body_arrives_in_parts(run: Run, reaper: Reaper, way: str) -> None:
    async def main() -> None:
        both = Both(reaper, way)
        async with both.serving() as port, raw_client(port, b"") as (reader, writer):
            for size in (1000, 1_000_000):
                writer.write(get("/now", b"x" * size))
                await head_of(reader)
                assert await reader.readexactly(4) == (b"XXXX" if size == 1000 else b"NONE")
                await reader.readexactly(996 if size == 1000 else 0)
            assert await reader.read() == b""

    run(main())


def test_a_request_for_a_worker_that_has_died_or_is_unreachable(
    run: Run, reaper: Reaper, way: str
) -> None:
    async def main() -> None:
        if way == "local":
            return
        both = Both(reaper, way)
        async with both.serving() as port, raw_client(port, b"") as (reader, writer):

            async def status(path: str = "/now") -> bytes:
                writer.write(get(path, b"body"))
                head = await head_of(reader)
                size = int(head.lower().partition(b"content-length: ")[2].split()[0])
                await reader.readexactly(size)
                return head[9:12]

            both.asker.owner = NOBODY
            assert await status() == b"410"
            both.cluster.internal[NOBODY] = ("127.0.0.1", 1)
            assert await status() == b"404"
            if way == "other host":
                both.asker.owner = OWNER
                both.asker.node.key = b"another key"
                assert await status() == b"404"
                both.asker.node.key = both.owner.node.key
            both.asker.owner = OWNER
            assert await status("/unknown") == b"404"
            assert await status() == b"200"

    run(main())


def test_a_request_is_passed_on_once_only(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        both = Both(reaper, "socket")
        both.owner.owner = ASKER
        async with both.serving() as port, raw_client(port, get("/now")) as (reader, _):
            assert b" 404 " in await head_of(reader)

    run(main())


def test_the_death_of_the_owner_ends_spliced_connections(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        both = Both(reaper, "other host")
        async with both.serving() as port, raw_client(port, get("/stream")) as (reader, _):
            await head_of(reader)
            both.asker.node.forwarder.on_death(f"host-1:{NOBODY}")
            assert len(both.asker.node.forwarder) == 1
            both.asker.node.forwarder.on_death(f"host-1:{OWNER}")
            assert await reader.read() == b""
            await both.owner.until("closed")

    run(main())


def test_the_internal_address_rejects_other_requests(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        both = Both(reaper, "other host")
        async with both.serving():
            port = both.cluster.internal[OWNER][1]
            to_another = Introduction(receiver=ASKER, listener="", hops=1, peer="").line(
                b"a shared key"
            )
            for line in (b"GET /now HTTP/1.1\r\n\r\n", b"x" * 2000, b"\n", to_another):
                async with raw_client(port, line) as (reader, _):
                    with contextlib.suppress(ConnectionError):
                        assert await reader.read() == b""
        assert not both.owner.asked

    run(main())


@pytest.mark.parametrize(
    ("answer", "is_reusable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nConnection: close\r\n\r\nok", False),
        (b"HTTP/1.1 200 OK\r\n\r\nok", False),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", False),
    ],
)
def test_the_end_of_an_answer_is_found(answer: bytes, is_reusable: bool) -> None:
    for cut in range(len(answer)):
        found = Answer()
        assert not found.ends_with(answer[:cut])
        assert found.ends_with(answer[cut:]) == is_reusable
