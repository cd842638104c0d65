"""A request is handled by its session's worker, whichever worker read it; what is lost shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from relay.transports.between_workers.handover import Handover, NotThere
from relay.transports.between_workers.link import Kind
from relay.transports.socket.bodies import BodyRejected, read_body
from relay.transports.socket.client_socket import ClientSocket
from relay.transports.socket.exchange import (
    Exchange,
    HeldRequest,
    HttpAnswer,
    HttpRequest,
    http_request,
)
from relay.transports.socket.listener import GuardedSite
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.websocket import WebSocketConnection, accept_headers, frame_text
from tests.support.bus import Wire
from tests.unit.transports.serving import HANDSHAKE, Run, head_of, masked, raw_client

BUFFER = 8192
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"


class Worker:
    """Reads requests at any path and has them handled by `owner`; handles its own by path."""

    def __init__(self, wire: Wire, name: str, reaper: Reaper, owner: str = "owner") -> None:
        self.bus = wire.bus(name)
        self.reaper = reaper
        self.owner = owner
        self.handover = Handover(
            topic="test", bus=self.bus, handle=self.handle, buffer_bytes=BUFFER, reaper=reaper
        )
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
            exchange.answer(HttpAnswer(200, text.upper(), {"X-Owner": self.bus.instance}))
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
            exchange.take(head, socket, duplex=True)
        elif what == "/broken":
            raise ZeroDivisionError
        else:
            return False
        self.happened.set()
        return True

    async def answer(self, request: web.Request) -> web.StreamResponse:
        try:
            body: bytes | None = await read_body(request, 1000)
        except BodyRejected:
            body = None
        asked = http_request(request, body)
        try:
            if self.owner == self.bus.instance:
                response = self.handover.here(request, asked)
                assert response is not None
                return response
            return await self.handover.forward(request, asked, self.owner)
        except NotThere as exc:
            return web.Response(status=410 if exc.gone else 404)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        app = web.Application()
        app.router.add_route("*", "/{what:.*}", self.answer)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        site = GuardedSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield site.port
        finally:
            await runner.cleanup()


def get(path: str, body: bytes = b"") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture(params=["owner", "asker"])
def front(request: pytest.FixtureRequest) -> str:
    """Which worker the client talks to."""
    return str(request.param)


def both(reaper: Reaper) -> tuple[Wire, dict[str, Worker]]:
    wire = Wire()
    return wire, {name: Worker(wire, name, reaper) for name in ("owner", "asker")}


def test_a_request_is_handled_with_all_that_it_had(run: Run, reaper: Reaper, front: str) -> None:
    async def main() -> None:
        _, workers = both(reaper)
        async with (
            workers[front].serving() as port,
            raw_client(port, b"") as (reader, writer),
        ):
            for _ in range(2):  # on one connection
                writer.write(
                    b"POST /now?a=b%20c&a=d HTTP/1.1\r\nHost: x\r\nX-Odd: caf\xe9 \xf0\x9f\x98"
                    b"\x80\r\nContent-Length: 5\r\n\r\nhello"
                )
                head = await head_of(reader)
                assert b"200 OK" in head
                assert b"X-Owner: owner" in head
                assert await reader.readexactly(5) == b"HELLO"
            writer.write(get("/now", b"x" * 1001))
            await head_of(reader)
            assert await reader.readexactly(4) == b"NONE"
        asked = workers["owner"].asked[0]
        assert asked.method == "POST"
        assert asked.query.getall("a") == ["b c", "d"]
        assert (
            asked.headers["x-ODD"].encode("utf-8", "surrogateescape") == b"caf\xe9 \xf0\x9f\x98\x80"
        )
        assert asked.peer == "127.0.0.1"
        assert not workers["asker"].asked
        assert not len(workers["owner"].handover)
        assert not len(workers["asker"].handover)

    run(main())


def test_an_answer_may_come_later_and_the_connection_goes_on(
    run: Run, reaper: Reaper, front: str
) -> None:
    async def main() -> None:
        _, workers = both(reaper)
        owner = workers["owner"]
        async with workers[front].serving() as port, raw_client(port, b"") as (reader, writer):
            tasks = asyncio.all_tasks()
            for number in range(3):
                writer.write(get("/later"))
                while len(owner.held) <= number:
                    owner.happened.clear()
                    await owner.happened.wait()
                for _ in range(10):
                    await asyncio.sleep(0)
                # The handler's task has ended: nothing waits but the socket.
                assert asyncio.all_tasks() <= tasks
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
        assert not len(owner.handover)

    run(main())


def test_a_client_that_wants_the_connection_closed_has_it_closed(
    run: Run, reaper: Reaper, front: str
) -> None:
    async def main() -> None:
        _, workers = both(reaper)
        owner = workers["owner"]
        old = b"GET /later HTTP/1.0\r\nHost: x\r\n\r\n"
        new = b"GET /later HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        async with workers[front].serving() as port:
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


def test_the_owner_learns_that_a_waiting_client_has_gone(
    run: Run, reaper: Reaper, front: str
) -> None:
    async def main() -> None:
        wire, workers = both(reaper)
        owner = workers["owner"]
        async with workers[front].serving() as port:
            for path, event in (("/later", "gone"), ("/stream", "closed")):
                owner.events.clear()
                owner.happened.clear()
                async with raw_client(port, get(path)) as (_, writer):
                    await owner.happened.wait()
                    for _ in range(20):
                        await asyncio.sleep(0)
                    writer.transport.abort()
                    await owner.until(event)
        assert not len(owner.handover)
        assert not len(workers["asker"].handover)
        assert wire.sent == (0 if front == "owner" else 7)

    run(main())


def test_a_stream_is_paused_where_its_client_is_slow_and_loses_nothing(
    run: Run, reaper: Reaper, front: str
) -> None:
    async def main() -> None:
        _, workers = both(reaper)
        owner = workers["owner"]
        async with (
            workers[front].serving() as port,
            raw_client(port, get("/stream")) as (reader, _),
        ):
            await head_of(reader)
            (stream,) = owner.streams
            written = 0
            got: list[bytes] = []
            # More than both kernels' buffers.
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


def test_a_websocket_is_handed_over_both_ways(run: Run, reaper: Reaper, front: str) -> None:
    async def main() -> None:
        _, workers = both(reaper)
        owner = workers["owner"]
        handshake = HANDSHAKE.replace(b"GET /", b"GET /ws")
        big = b"x" * 200_000
        async with (
            workers[front].serving() as port,
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
        assert not len(owner.handover)
        assert not len(workers["asker"].handover)

    run(main())


def test_what_cannot_be_handled_is_told_to_the_asker(
    run: Run, reaper: Reaper, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        wire, workers = both(reaper)
        async with workers["asker"].serving() as port, raw_client(port, b"") as (reader, writer):

            async def status(path: str) -> bytes:
                writer.write(get(path))
                head = await head_of(reader)
                size = int(head.lower().partition(b"content-length: ")[2].split()[0])
                await reader.readexactly(size)
                return head[9:12]

            assert await status("/unknown") == b"404"
            assert await status("/broken") == b"500"
            workers["asker"].owner = "nobody"
            assert await status("/now") == b"410"
            workers["asker"].owner = "owner"
            assert await status("/now") == b"200"
            wire.dead.add("owner")
            assert await status("/now") == b"410"
        assert not len(workers["asker"].handover)

    run(main())
    assert "could not be handled" in caplog.text


@pytest.mark.parametrize("path", ["/later", "/stream"])
@pytest.mark.parametrize("which", ["asker's last", "owner's middle", "owner's last"])
def test_a_lost_message_costs_the_connection_and_both_sides_notice(
    run: Run, reaper: Reaper, path: str, which: str
) -> None:
    async def main() -> None:
        wire, workers = both(reaper)
        owner, asker = workers["owner"], workers["asker"]
        async with asker.serving() as port, raw_client(port, get(path)) as (reader, writer):
            while not owner.held and not owner.streams:
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            wire.lose = lambda *_: True
            if which == "asker's last":
                writer.transport.abort()
                while len(asker.handover):
                    await asyncio.sleep(0.001)
            else:
                for socket in (*owner.held, *owner.streams):
                    socket.write(b"lost")
                for _ in range(20):
                    await asyncio.sleep(0)
            wire.lose = lambda *_: False
            if which == "owner's middle":
                for socket in (*owner.held, *owner.streams):
                    socket.write(b"not lost")
            else:
                owner.handover.probe()
                asker.handover.probe()
            await owner.until("gone" if path == "/later" else "closed")
            if which != "asker's last":
                assert b"lost" not in await reader.read()
            while len(asker.handover) or len(owner.handover):
                await asyncio.sleep(0.001)

    run(main())


def test_a_worker_that_stops_lets_the_clients_of_others_come_again(
    run: Run, reaper: Reaper
) -> None:
    async def main() -> None:
        _, workers = both(reaper)
        owner, asker = workers["owner"], workers["asker"]
        async with asker.serving() as port, raw_client(port, get("/stream")) as (reader, _):
            await head_of(reader)
            owner.streams[0].write(b"before")
            await asker.handover.closed()
            assert await reader.read() == b"before"
            await owner.until("closed")
            # Whoever comes now is answered, but may not stay.
            async with raw_client(port, get("/stream")) as (again, _):
                await head_of(again)
                assert await again.read() == b""
            async with raw_client(port, get("/now", b"x")) as (again, _):
                await head_of(again)
                assert await again.readexactly(1) == b"X"
        assert not len(owner.handover)

    run(main())


def test_a_websocket_whose_owner_does_not_read_is_held_up(
    run: Run, reaper: Reaper, front: str
) -> None:
    async def main() -> None:
        _, workers = both(reaper)
        handshake = HANDSHAKE.replace(b"GET /", b"GET /ws")
        async with (
            workers[front].serving() as port,
            raw_client(port, handshake) as (reader, writer),
        ):
            await head_of(reader)
            (socket,) = workers["owner"].streams
            socket.pause_reading()
            frame = masked(1, b"x" * 60_000)
            count = 0
            # Until both kernels' buffers and what may be under way are full.
            while writer.transport.get_write_buffer_size() < 1_000_000:
                writer.write(frame)
                count += 1
                await asyncio.sleep(0.001)
            assert count > 16
            socket.resume_reading()
            for _ in range(count):
                assert len(await reader.readexactly(4 + 60_000)) == 60_004

    run(main())


@pytest.mark.parametrize("dead", ["owner", "asker"])
def test_a_worker_that_died_takes_its_connections_with_it(
    run: Run, reaper: Reaper, dead: str
) -> None:
    async def main() -> None:
        wire, workers = both(reaper)
        owner, asker = workers["owner"], workers["asker"]
        async with asker.serving() as port, raw_client(port, get("/stream")) as (reader, _):
            await head_of(reader)
            wire.dead.add(dead)
            survivor = (asker if dead == "owner" else owner).handover
            survivor.probe()
            await asyncio.sleep(0.01)
            # It may have been away for a moment only.
            assert len(survivor) == 1
            survivor.probe()
            if dead == "owner":
                assert await reader.read() == b""
                assert not len(asker.handover)
            else:
                await owner.until("closed")
                assert not len(owner.handover)

    run(main())


def test_nothing_is_left_of_a_request_that_was_given_up(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        wire, workers = both(reaper)
        asker, owner = workers["asker"], workers["owner"]
        wire.lose = lambda sender, receiver, payload: receiver == "asker"
        async with asker.serving() as port, raw_client(port, get("/stream")) as (_, writer):
            while not owner.streams:
                await asyncio.sleep(0)
            writer.transport.abort()
            wire.lose = lambda *_: False
            # The owner's first message was lost, so its probe shows another count.
            owner.handover.probe()
            await owner.until("closed")
            assert not len(asker.handover)

    run(main())


def test_the_kinds_of_each_side_are_told_apart() -> None:
    assert all((kind < Kind.ANSWER) == (kind in list(Kind)[:8]) for kind in Kind)
