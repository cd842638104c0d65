"""Limits for peers without a credential: open connections, compressed bodies, log lines."""

from __future__ import annotations

import asyncio
import gzip
import logging
import os
import re
import resource
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import orjson
import pytest
from aiohttp import web

from relay.core.client_address import TrustedProxies
from relay.core.free_memory import FreeMemory
from relay.protocols.seafile import answers
from relay.transports.socket import bodies, handshakes, http_connection, sse, websocket
from relay.transports.socket.bodies import read_body
from relay.transports.socket.handshakes import Handshakes
from relay.transports.socket.http_connection import ConnectionLimits
from relay.transports.socket.listener import GuardedSite
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import connection_of, take_over
from tests.unit.transports.serving import HANDSHAKE, Run, head_of, masked, raw_client

SECRET = b"SECRET-9f8e7d"
LIMIT_BYTES = 1_000_000


class Site:
    """A server with the paths /ping, /body (reads a body), /slow (waits) and /large (answers)."""

    def __init__(self, port: int, limits: ConnectionLimits) -> None:
        self.port = port
        self.limits = limits
        self.sizes: list[int] = []
        self.go_on = asyncio.Event()
        self.streams: list[sse.SseConnection] = []
        # Requests so far, except those of /stream.
        self.begun = 0

    async def ping(self, _: web.Request) -> web.StreamResponse:
        self.begun += 1
        return web.Response(text="pong")

    async def body(self, request: web.Request) -> web.StreamResponse:
        self.begun += 1
        self.sizes.append(len(await read_body(request, LIMIT_BYTES)))
        return web.Response(text=f"{self.limits.bodies.held_bytes}")

    async def slow(self, _: web.Request) -> web.StreamResponse:
        await self.go_on.wait()
        return web.Response(text="done")

    async def sender(self, request: web.Request) -> web.StreamResponse:
        info = connection_of(request)
        found = [info.address, info.forwarded_for, answers.sender(request)]
        return web.Response(body=orjson.dumps(found))

    async def large(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=bytes(64 * 1024 * 1024))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        client = sse.SseConnection(buffer_bytes=65536, reaper=Reaper())
        self.streams.append(client)
        return take_over(request, sse.head(), client)


@asynccontextmanager
async def serving(
    *, head_timeout_s: float = 60.0, limits: ConnectionLimits | None = None
) -> AsyncIterator[Site]:
    limits = limits or ConnectionLimits(head_timeout_s=head_timeout_s)
    it = Site(0, limits)
    app = web.Application()
    app.router.add_get("/ping", it.ping)
    app.router.add_post("/body", it.body)
    app.router.add_get("/slow", it.slow)
    app.router.add_get("/socket.io/", it.ping)
    app.router.add_get("/large", it.large)
    app.router.add_get("/sender", it.sender)
    app.router.add_get("/sse", it.stream)
    runner = web.AppRunner(app, shutdown_timeout=1.0, keepalive_timeout=75.0, access_log=None)
    await runner.setup()
    site = GuardedSite(runner, "127.0.0.1", 0, limits=limits)
    await site.start()
    it.port = site.port
    try:
        yield it
    finally:
        while limits.discards:
            await asyncio.sleep(0.01)
        await runner.cleanup()


def post(path: bytes, body: bytes, *headers: bytes, size: int | None = None) -> bytes:
    length = len(body) if size is None else size
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: x", b"Content-Length: %d" % length, *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


PING = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"


async def closed(reader: asyncio.StreamReader) -> bytes:
    """Return the data received until the connection is closed or reset."""
    text = b""
    async with asyncio.timeout(30):
        with suppress(ConnectionError):
            while part := await reader.read(65536):
                text += part
    return text


async def endless(writer: asyncio.StreamWriter) -> None:
    for _ in range(1000):
        writer.write(bytes(1_000_000))
        await writer.drain()


def test_a_proxy_that_removes_upgrade_is_named_in_the_log(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving() as it:
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
            # nginx without proxy_set_header: the handshake arrives without its hop-by-hop headers.
            writer.write(
                b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            )
            assert b"200 OK" in await closed(reader)
            writer.close()

    with caplog.at_level(logging.WARNING):
        run(main())
    (line,) = caplog.messages
    assert line.startswith(
        "A proxy at 127.0.0.1 removes the header Upgrade from WebSocket requests"
    )


# ---- time limits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        ([b""], []),
        ([b"GET /ping HT"], [b"408"]),
        ([PING, b"GET /pi"], [b"200", b"408"]),
        ([PING + b"GET /pi"], [b"200"]),
        ([PING + PING + b"G"], [b"200", b"200"]),
        ([post(b"/body", b"abc") + b"GET"], [b"200"]),
        ([post(b"/body", b"", size=3), b"abcGET /p"], [b"200"]),
        (
            [
                b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab",
                b"c\r\n0\r\n\r\nGET /",
            ],
            [b"200"],
        ),
    ],
)
def test_a_connection_without_a_complete_head_is_closed(
    run: Run, sent: list[bytes], answers: list[bytes]
) -> None:
    async def main() -> None:
        async with (
            serving(head_timeout_s=0.3) as site,
            raw_client(site.port, b"") as (
                reader,
                writer,
            ),
        ):
            for part in sent:
                writer.write(part)
                await asyncio.sleep(0.02)
            assert re.findall(rb"HTTP/1.1 (\d+)", await closed(reader)) == answers
            assert len(site.limits.heads) == 0

    run(main())


def test_single_bytes_do_not_extend_the_time_for_a_head(run: Run) -> None:
    async def main() -> None:
        async with (
            serving(head_timeout_s=0.5) as site,
            raw_client(site.port, b"GET /ping HTTP/1.1\r\nX: ") as (reader, writer),
        ):
            async with asyncio.TaskGroup() as tasks:
                ended = tasks.create_task(closed(reader))
                while not ended.done():
                    writer.write(b"a")
                    await asyncio.sleep(0.05)
            assert b"408 Request Timeout" in ended.result()

    run(main())


@pytest.mark.parametrize("first", [PING, post(b"/body", b"abc")])
def test_idle_and_busy_connections_are_not_limited_by_the_time_for_a_head(
    run: Run, first: bytes
) -> None:
    async def main() -> None:
        async with (
            serving(head_timeout_s=0.2) as site,
            raw_client(site.port, first) as (
                reader,
                writer,
            ),
        ):
            assert b"200 OK" in await head_of(reader)
            await asyncio.sleep(0.5)
            writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.sleep(0.5)
            site.go_on.set()
            assert b"200 OK" in await head_of(reader)

    run(main())


def test_a_connection_that_was_taken_over_has_no_time_limit(run: Run) -> None:
    async def main() -> None:
        async with (
            serving(head_timeout_s=0.2) as site,
            raw_client(site.port, b"GET /sse HTTP/1.1\r\nHost: x\r\n\r\n") as (reader, _),
        ):
            await head_of(reader)
            assert len(site.limits.heads) == 0
            await asyncio.sleep(0.5)
            site.streams[0].write(b"data: 1\n\n")
            assert await reader.readexactly(9) == b"data: 1\n\n"

    run(main())


def test_a_body_that_does_not_arrive_times_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with (
            serving() as site,
            raw_client(site.port, post(b"/body", b"abc", size=1000)) as (reader, _),
        ):
            text = await closed(reader)
            assert text.startswith(b"HTTP/1.1 408 ")
            assert b"Connection: close" in text
            assert site.limits.bodies.held_bytes == 0

    run(main())


def test_a_client_that_does_not_read_its_answer_is_closed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "WRITE_TIMEOUT_S", 1.0)

    async def main() -> None:
        async with serving() as site:
            with socket.create_connection(("127.0.0.1", site.port)) as client:
                client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
                while not len(site.limits.writes):
                    await asyncio.sleep(0.01)
                while len(site.limits.writes):
                    await asyncio.sleep(0.01)

    run(main())


def test_old_connections_without_a_request_make_room_for_new_clients(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_connection, "_MIN_AGE_S", 0.2)
    # Earlier tests of this process may have left descriptors open. Let there be room for two per
    # connection beside them.
    files = 200 + 3 * max(map(int, os.listdir("/proc/self/fd")))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    # A quarter is for connections without a request.
    most = files // 4

    async def main() -> None:
        async with serving() as site:
            crowd: list[socket.socket] = []
            for _ in range(most + 10):
                crowd.append(socket.create_connection(("127.0.0.1", site.port)))
                crowd[-1].sendall(b"GET /pi")
                await asyncio.sleep(0)
            # A client that has just connected is not closed in favour of them.
            async with raw_client(site.port, PING) as (reader, _):
                assert b"200 OK" in await head_of(reader)
            while True:
                async with raw_client(site.port, PING) as (reader, _):
                    assert b"200 OK" in await head_of(reader)
                if len(site.limits.heads) <= most:
                    break
                await asyncio.sleep(0.05)
            for each in crowd:
                each.close()

    with caplog.at_level(logging.WARNING):
        run(main())
    assert len({record.getMessage() for record in caplog.records}) == 1
    assert "have not sent a complete request" in caplog.text


# ---- bodies ----------------------------------------------------------------------------------


def test_no_body_is_decompressed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(bytes(50_000_000))

    async def main() -> None:
        async with serving() as site:
            for path, status in ((b"/body", b"415"), (b"/nowhere", b"404"), (b"/ping", b"405")):
                for encoding in (b"gzip", b"deflate", b"br", b"GZIP, identity"):
                    request = post(path, bomb, b"Content-Encoding: " + encoding)
                    async with raw_client(site.port, request) as (reader, _):
                        head = await head_of(reader)
                        assert head.split()[1] == status
            assert site.sizes == []
            async with raw_client(
                site.port, post(b"/body", b"abc", b"Content-Encoding: identity")
            ) as (reader, _):
                assert b"200 OK" in await head_of(reader)
            assert site.sizes == [3]

    run(main())


def test_an_early_response_is_read_while_the_body_is_still_sent(run: Run) -> None:
    async def main() -> None:
        async with serving() as site:
            for path, status in ((b"/body", b"413"), (b"/nowhere", b"404")):
                async with raw_client(site.port, post(path, b"", size=8_000_000)) as (
                    reader,
                    writer,
                ):
                    for _ in range(8):
                        writer.write(bytes(1_000_000))
                        await writer.drain()
                    text = await closed(reader)
                    assert text.split()[1] == status
                    assert b"Connection: close" in text
            # The amount and the time are limited.
            async with raw_client(site.port, post(b"/nowhere", b"", size=1 << 40)) as (_, writer):
                with pytest.raises(ConnectionError):
                    await endless(writer)

    run(main())


def test_all_bodies_together_are_limited_and_the_largest_is_rejected(run: Run) -> None:
    async def main() -> None:
        async with serving() as site:
            site.limits.bodies._total_bytes = 3_000_000
            greedy = [await asyncio.open_connection("127.0.0.1", site.port) for _ in range(10)]
            for _, writer in greedy:
                writer.write(post(b"/body", bytes(900_000), size=900_001))
            async with asyncio.TaskGroup() as tasks:
                first = [tasks.create_task(reader.readline()) for reader, _ in greedy]
                while sum(task.done() for task in first) < 7:
                    await asyncio.sleep(0.01)
                assert {task.result().split()[1] for task in first if task.done()} == {b"503"}
                assert site.limits.bodies.held_bytes <= 3_000_000
                # Small bodies still arrive.
                async with raw_client(site.port, post(b"/body", bytes(1000))) as (reader, _):
                    assert b"200 OK" in await head_of(reader)
                for _, writer in greedy:
                    writer.write(b"a")
            statuses = sorted(task.result().split()[1] for task in first)
            assert statuses == [b"200"] * 3 + [b"503"] * 7
            assert site.limits.bodies.held_bytes == 0
            for _, writer in greedy:
                writer.transport.abort()

    run(main())


# ---- the log ---------------------------------------------------------------------------------

MALFORMED = [
    b"GET /sse?token=" + SECRET + b" HTTP/9.9x\r\n\r\n",
    b"GET /sse HTTP/1.1\r\nHost: x\r\nX-API Sign: " + SECRET + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nCookie AjaXplorer=" + SECRET + b"\r\n\r\n",
    b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nz" + SECRET + b"\r\n\r\n",
    b"GET /" + SECRET + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + SECRET + b"a" * 70_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n%s\r\n" % b"".join(b"X-%d: %s\r\n" % (i, SECRET) for i in range(300)),
    b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n" + SECRET,
    b"\x16\x03\x01" + SECRET,
    b"GET http://[::1/" + SECRET + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    PING + b"GARBAGE " + SECRET + b"\r\n\r\n",
    PING[:-2] + b"X: " + SECRET + b"\n\r\n\r\n",
]


def test_malformed_requests_leave_one_line_without_their_bytes(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving() as site:
            for request in MALFORMED:
                async with raw_client(site.port, request) as (reader, _):
                    text = await closed(reader)
                    assert text.split()[-1:] != []
                    assert SECRET not in text
                    assert b" 400 " in text or b" 431 " in text

    with caplog.at_level(logging.DEBUG):
        run(main())
    records = [record for record in caplog.records if record.name != "asyncio"]
    assert {record.getMessage() for record in records if record.levelno >= logging.INFO} == {
        "Rejected a malformed HTTP request of 127.0.0.1"
    }
    assert all(record.exc_info is None for record in records)
    assert SECRET.decode() not in caplog.text


def test_an_unknown_expectation_is_not_repeated_to_the_client(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving() as site:
            for expected in (SECRET, b"\xff", b"100-continue, " + SECRET):
                request = PING[:-2] + b"Expect: " + expected + b"\r\n\r\n"
                async with raw_client(site.port, request) as (reader, _):
                    text = await closed(reader)
                    assert text.startswith(b"HTTP/1.1 417 ")
                    assert SECRET not in text
            request = post(b"/body", b"", b"Expect: 100-Continue", size=3)
            async with raw_client(site.port, request) as (reader, writer):
                assert b"100 Continue" in await head_of(reader)
                writer.write(b"abc")
                assert b"200 OK" in await head_of(reader)

    with caplog.at_level(logging.INFO):
        run(main())
    assert caplog.text == ""


def test_headers_that_do_not_end_are_limited(run: Run) -> None:
    async def main() -> None:
        async with (
            serving() as site,
            raw_client(site.port, b"GET /ping HTTP/1.1\r\n") as (reader, writer),
        ):
            async with asyncio.TaskGroup() as tasks:
                ended = tasks.create_task(closed(reader))
                for number in range(100):
                    writer.write(b"X-%d: %s\r\n" % (number, b"a" * 8000))
                    await asyncio.sleep(0)
            assert ended.result().startswith(b"HTTP/1.1 431 ")

    run(main())


@pytest.mark.parametrize("rest", [b"\x8f\x01\xfa\x00\x17\xee\x90\xc3", masked(1, b"hello"), PING])
def test_data_behind_a_rejected_upgrade_is_not_parsed(
    run: Run, caplog: pytest.LogCaptureFixture, rest: bytes
) -> None:
    """Pydio's PHP client sends eight random bytes, others send their first frames."""

    async def main() -> None:
        request = HANDSHAKE.replace(b"GET /", b"GET /nowhere")
        async with serving() as site, raw_client(site.port, request + rest) as (reader, writer):
            assert (await head_of(reader)).startswith(b"HTTP/1.1 404 ")
            writer.write(rest)
            assert b"HTTP/1.1" not in await closed(reader)

    with caplog.at_level(logging.INFO):
        run(main())
    assert caplog.text == ""


@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_disconnects_at_any_time_leaves_nothing_in_the_log(
    run: Run, caplog: pytest.LogCaptureFixture, reset: bool
) -> None:
    chunked = b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\na"
    requests = [
        b"GET",
        PING,
        PING * 3,
        post(b"/body", b"a", size=9),
        post(b"/nowhere", b"a", size=9),
        chunked,
        b"GET /sse HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /slow HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n\x81",
        b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n",
    ]

    async def main() -> None:
        async with serving() as site:
            site.go_on.set()
            for turns in range(3):
                for request in requests:
                    client = socket.create_connection(("127.0.0.1", site.port))
                    client.sendall(request)
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    if reset:
                        linger = struct.pack("ii", 1, 0)
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    client.close()
                    for _ in range(turns):
                        await asyncio.sleep(0.005)
            while site.limits.heads or site.limits.discards:
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.INFO):
        run(main())
    assert caplog.text == ""


def test_a_client_that_leaves_before_its_request_starts_leaves_nothing_in_the_log(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving() as site, raw_client(site.port, b"") as (_, writer):
            while not site.limits.heads:
                await asyncio.sleep(0.01)
            (connection,) = site.limits.heads._due
            await asyncio.sleep(0.01)
            # One iteration of the event loop has read the request and the end of the connection.
            connection.data_received(PING)
            connection.connection_lost(ConnectionResetError())
            writer.transport.abort()
            await asyncio.sleep(0.01)

    with caplog.at_level(logging.INFO):
        run(main())
    assert caplog.text == ""


def test_rejected_bodies_share_the_turns_in_which_they_are_discarded(run: Run) -> None:
    clients, read_at_once = 8, 262_144

    async def main() -> None:
        async with serving() as site:
            sockets = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(clients)]
            rest = bytes(16 * 1024 * 1024)

            def send(client: socket.socket) -> None:
                with suppress(OSError):
                    client.sendall(post(b"/nowhere", rest))

            async with asyncio.TaskGroup() as tasks:
                for client in sockets:
                    tasks.create_task(asyncio.to_thread(send, client))
                while len(site.limits.discards) < clients:
                    await asyncio.sleep(0)
                most = 0
                left = sum(each._left for each in site.limits.discards._due)
                for _ in range(2000):
                    await asyncio.sleep(0)
                    now = sum(each._left for each in site.limits.discards._due)
                    if len(site.limits.discards) == clients:
                        most = max(most, left - now)
                    left = now
                for client in sockets:
                    client.shutdown(socket.SHUT_RDWR)
            for client in sockets:
                client.close()
            while site.limits.discards:
                await asyncio.sleep(0.01)
            assert 0 < most <= 3 * read_at_once

    run(main())


def test_large_bodies_share_the_turns_in_which_they_are_read(run: Run) -> None:
    clients, read_at_once = 20, 262_144

    async def main() -> None:
        async with serving() as site:
            whole = post(b"/body", bytes(LIMIT_BYTES))

            def send() -> bytes:
                with socket.create_connection(("127.0.0.1", site.port)) as client:
                    client.sendall(whole)
                    return client.recv(12)

            held, most, steps = 0, 0, 0
            async with asyncio.TaskGroup() as tasks:
                answers = [tasks.create_task(asyncio.to_thread(send)) for _ in range(clients)]
                while len(site.sizes) < clients:
                    await asyncio.sleep(0)
                    now = site.limits.bodies.held_bytes
                    most, steps = max(most, now - held), steps + (now > held)
                    held = now
            assert [each.result() for each in answers] == [b"HTTP/1.1 200"] * clients
            assert site.sizes == [LIMIT_BYTES] * clients
            assert steps > clients
            # Without the limit, all bodies are read in the same iteration of the event loop.
            assert most <= 6 * read_at_once

    run(main())


async def most_per_turn(site: Site, total: int) -> int:
    """Wait until so many requests have begun. Return how many have begun at most in one turn."""
    most, begun = 0, site.begun
    async with asyncio.timeout(30):
        while begun < total:
            await asyncio.sleep(0)
            most, begun = max(most, site.begun - begun), site.begun
    return most


async def receive_answers(client: socket.socket, count: int) -> None:
    """Receive so many answers, then close the socket, which does not block."""
    received = b""
    while received.count(b"HTTP/1.1 200 OK") < count:
        async with asyncio.timeout(30):
            received += await asyncio.get_running_loop().sock_recv(client, 65536)
    client.close()


def test_requests_that_arrive_at_once_are_spread_over_turns(run: Run) -> None:
    """Of all kinds: with a body, with a long head, and one behind another."""
    long_head = b"GET /ping HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000 + b"\r\n\r\n"
    kinds = (PING, post(b"/body", b"abc"), long_head, PING + PING)
    answers = (1, 1, 1, 2)
    count = 60

    async def main() -> None:
        async with serving() as site:
            clients = [
                socket.create_connection(("127.0.0.1", site.port))
                for _ in range(count * len(kinds))
            ]
            while len(site.limits.heads) < len(clients):
                await asyncio.sleep(0)
            for number, each in enumerate(clients):
                each.sendall(kinds[number % len(kinds)])
                each.setblocking(False)
            # One has disconnected before its turn.
            clients[-1].close()
            # Those of one turn, and the second ones of the clients of another.
            assert await most_per_turn(site, count * sum(answers) - 2) <= 2 * 32
            for number, each in enumerate(clients[:-1]):
                await receive_answers(each, answers[number % len(kinds)])
            assert not len(site.limits.pace)

    run(main())


def test_requests_behind_others_of_their_connections_are_spread_over_turns(run: Run) -> None:
    count, behind = 300, 10

    async def main() -> None:
        async with serving() as site:
            clients = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(count)]
            while len(site.limits.heads) < len(clients):
                await asyncio.sleep(0)
            for each in clients:
                each.sendall(PING * behind)
                each.setblocking(False)
            # This one disconnects while its second request waits.
            clients[-1].close()
            # Those of one turn, in two different steps of aiohttp's handler.
            assert await most_per_turn(site, (count - 1) * behind) <= 2 * 32
            for each in clients[:-1]:
                await receive_answers(each, behind)
            assert not len(site.limits.pace)

    run(main())


def test_complete_requests_that_wait_are_not_closed_as_incomplete_ones(run: Run) -> None:
    async def main() -> None:
        async with serving() as site:
            clients = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(100)]
            while len(site.limits.heads) < len(clients):
                await asyncio.sleep(0)
            for each in clients:
                each.sendall(PING)
            async with asyncio.timeout(30):
                while not len(site.limits.pace):
                    await asyncio.sleep(0)
            assert not len(site.limits.heads)
            loop = asyncio.get_running_loop()
            for each in clients:
                each.setblocking(False)
                async with asyncio.timeout(30):
                    assert (await loop.sock_recv(each, 65536)).startswith(b"HTTP/1.1 200 OK")
                each.close()

    run(main())


def test_incomplete_messages_of_all_websockets_have_a_common_limit(run: Run) -> None:
    async def main() -> None:
        limits = ConnectionLimits()
        limits.bodies = bodies.Bodies(1_000_000)
        messages: list[int] = []

        async def handle(request: web.Request) -> web.StreamResponse:
            client = websocket.WebSocketConnection(
                buffer_bytes=65536, max_frame_bytes=8_000_000, reaper=Reaper()
            )
            client.on_text = lambda text: messages.append(len(text))
            accepted = websocket.accept_headers(request)
            assert isinstance(accepted, bytes)
            return take_over(request, accepted, client)

        app = web.Application()
        app.router.add_get("/", handle)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        site = GuardedSite(runner, "127.0.0.1", 0, limits=limits)
        await site.start()
        try:
            whole = masked(1, bytes(700_000))
            async with (
                raw_client(site.port, HANDSHAKE) as (small, first),
                raw_client(site.port, HANDSHAKE) as (large, second),
            ):
                await head_of(small)
                await head_of(large)
                first.write(whole[:400_000])
                second.write(whole[:500_000])
                while limits.bodies.held_bytes < 899_000:
                    await asyncio.sleep(0.01)
                # Their sum now exceeds the limit, so the largest message is rejected.
                second.write(whole[500_000:620_000])
                async with asyncio.timeout(30):
                    assert (await large.read(4))[2:] == (1013).to_bytes(2, "big")
                first.write(whole[400_000:])
                async with asyncio.timeout(30):
                    while not messages:
                        await asyncio.sleep(0.01)
                assert messages == [700_000]
                assert limits.bodies.held_bytes == 0
                first.write(whole[:100_000])
                while not limits.bodies.held_bytes:
                    await asyncio.sleep(0.01)
            async with asyncio.timeout(30):
                while limits.bodies.held_bytes:
                    await asyncio.sleep(0.01)
        finally:
            await runner.cleanup()

    run(main())


# ---- new clients -----------------------------------------------------------------------------


def overloaded() -> ConnectionLimits:
    """Limits of a worker whose memory is short."""
    return ConnectionLimits(handshakes=Handshakes(memory=lambda: FreeMemory(1, 1 << 30)))


def test_an_overloaded_worker_rejects_new_clients_only(run: Run) -> None:
    async def main() -> None:
        async with serving(limits=overloaded()) as site:
            sent = HANDSHAKE.replace(b"GET /", b"GET /ping")
            halves = sent[:40], sent[40:]
            async with raw_client(site.port, sent) as (reader, _):
                answer = await closed(reader)
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert b"\r\nRetry-After: " in answer
            # A long head arrives in several parts.
            async with raw_client(site.port, halves[0]) as (reader, writer):
                while not site.limits.heads:
                    await asyncio.sleep(0.01)
                writer.write(halves[1])
                assert (await closed(reader)).startswith(b"HTTP/1.1 503 ")
            # So does a browser on a connection that has served other requests.
            async with raw_client(site.port, PING) as (reader, writer):
                assert b"200 OK" in await head_of(reader)
                assert await reader.readexactly(4) == b"pong"
                writer.write(sent)
                assert (await closed(reader)).startswith(b"HTTP/1.1 503 ")
            without_meaning = sent.replace(b"/ping", b"/ping?sid=1")
            async with raw_client(site.port, without_meaning) as (reader, _):
                assert (await closed(reader)).startswith(b"HTTP/1.1 503 ")
            # Requests of open sessions and of producers are served.
            with_session = sent.replace(b"/ping", b"/socket.io/?EIO=4&sid=1")
            for request in (PING, post(b"/body", b"abc"), with_session):
                async with raw_client(site.port, request) as (reader, _):
                    assert b"200 OK" in await head_of(reader)

    run(main())


def test_clients_that_wait_for_their_turn_are_served_in_order(run: Run) -> None:
    async def main() -> None:
        limits = ConnectionLimits(handshakes=Handshakes(memory=lambda: None))
        async with serving(limits=limits) as site:
            sent = HANDSHAKE.replace(b"GET /", b"GET /ping")
            clients = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(40)]
            for each in clients:
                each.sendall(sent)
            # One has disconnected before its turn.
            clients[20].close()
            for number, each in enumerate(clients):
                if number != 20:
                    each.setblocking(False)
                    answer = await asyncio.get_running_loop().sock_recv(each, 15)
                    assert answer == b"HTTP/1.1 200 OK"
                    each.close()
            assert not len(limits.handshakes)

    run(main())


def test_a_client_that_makes_room_for_another_address_receives_503(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No handshake is handled, and five clients may wait.
    for name, value in {
        "_FEWEST": 0,
        "_MOST": 0,
        "_AVERAGE_S": 1e9,
        "LONGEST_WAIT_S": 0.0045,
    }.items():
        monkeypatch.setattr(handshakes, name, value)

    def sent(number: int) -> bytes:
        head = HANDSHAKE.replace(b"GET /", b"GET /ping")
        return head.replace(b"Host: x", b"Host: x\r\nX-Forwarded-For: 10.0.0.%d" % number)

    async def main() -> None:
        limits = ConnectionLimits(handshakes=Handshakes(memory=lambda: None))
        async with AsyncExitStack() as stack:
            site = await stack.enter_async_context(serving(limits=limits))
            flood = []
            for number in range(1, 6):
                client = raw_client(site.port, sent(1)[:40])
                flood.append(await stack.enter_async_context(client))
                # A head may arrive in several parts.
                flood[-1][1].write(sent(1)[40:])
                while len(limits.handshakes) < number:
                    await asyncio.sleep(0.01)
            async with raw_client(site.port, sent(1)) as (reader, _):
                assert b"\r\nRetry-After: " in await closed(reader)
            other, _ = await stack.enter_async_context(raw_client(site.port, sent(2)))
            answer = await closed(flood.pop()[0])
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nRetry-After: " in answer
            # More than a head is not held.
            flooding, writer = flood.pop()
            writer.write(bytes(200_000))
            assert (await closed(flooding)).startswith(b"HTTP/1.1 431 ")
            assert len(limits.handshakes) == 4
            # Bytes behind a head count as well.
            monkeypatch.setattr(handshakes, "_MOST_BYTES", limits.handshakes._held_bytes + 99)
            more, writer = flood.pop()
            writer.write(bytes(100))
            assert (await closed(more)).startswith(b"HTTP/1.1 503 ")
            assert len(limits.handshakes) == 3
            monkeypatch.setattr(handshakes, "_FEWEST", 10)
            monkeypatch.setattr(handshakes, "_MOST", 10)
            for reader in (other, *(each for each, _ in flood)):
                assert b"200 OK" in await head_of(reader)

    run(main())


# ---- addresses ---------------------------------------------------------------------------------


def test_only_trusted_proxies_report_addresses(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """In what operators see, and in all log lines."""

    async def main() -> None:
        limits = ConnectionLimits(proxies=TrustedProxies(["127.0.0.9"]))
        async with serving(limits=limits) as site:
            for peer, address in (("127.0.0.9", "6.6.6.6"), ("127.0.0.8", "127.0.0.8")):
                forwarded = b"X-Forwarded-For: 5.5.5.5, 6.6.6.6"
                requests = {
                    b"GET /sender HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % forwarded: b"200",
                    post(b"/body", b"", forwarded, size=LIMIT_BYTES + 1): b"413",
                }
                for request, status in requests.items():
                    reader, writer = await asyncio.open_connection(
                        "127.0.0.1", site.port, local_addr=(peer, 0)
                    )
                    writer.write(request)
                    head = await head_of(reader)
                    assert head.startswith(b"HTTP/1.1 " + status), head
                    if status == b"200":
                        shown = orjson.dumps([address, "", address])
                        assert await reader.readexactly(len(shown)) == shown
                    writer.close()
                (line,) = caplog.messages
                assert line.startswith(f"Rejected a request of {address} with status 413")
                caplog.clear()

    with caplog.at_level(logging.WARNING):
        run(main())
