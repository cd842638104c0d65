"""Heartbeats over real sockets. Tests that are not about time advance the timer by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from aiohttp import web

from relay.transports.socket import sse
from relay.transports.socket.client_socket import ClientSocket
from relay.transports.socket.heartbeat import Heartbeat
from relay.transports.socket.progress import acknowledged_bytes
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import take_over
from relay.transports.socket.websocket import (
    PING,
    WebSocketConnection,
    accept_headers,
    frame_close,
    frame_text,
)
from tests.unit.transports.serving import (
    GET,
    HANDSHAKE,
    Run,
    head_of,
    masked,
    raw_client,
    serving,
)

# A tick is a tenth of a second if the interval allows it, so these have 20 slots.
SLOTS = 20
FAREWELL = frame_close(4408, "no answer to pings")


class Door:
    """Takes over every connection as a WebSocket or an event stream."""

    def __init__(self, reaper: Reaper, heartbeat: Heartbeat) -> None:
        self.reaper, self.heartbeat = reaper, heartbeat
        self.clients: list[ClientSocket] = []
        self.closed: asyncio.Queue[ClientSocket] = asyncio.Queue()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        client: ClientSocket
        if "Upgrade" in request.headers:
            head = accept_headers(request)
            assert isinstance(head, bytes)
            client = WebSocketConnection(
                buffer_bytes=65536,
                max_frame_bytes=1000,
                reaper=self.reaper,
                heartbeat=self.heartbeat,
            )
            client.on_text = lambda _: self.heard.set()
        else:
            head = sse.head()
            client = sse.SseConnection(
                buffer_bytes=65536, reaper=self.reaper, heartbeat=self.heartbeat
            )
        client.on_closed = lambda: self.closed.put_nowait(client)
        self.heard = asyncio.Event()
        self.clients.append(client)
        return take_over(request, head, client)


@asynccontextmanager
async def connected(
    door: Door, request: bytes
) -> AsyncIterator[tuple[ClientSocket, asyncio.StreamReader, asyncio.StreamWriter]]:
    async with (
        serving(door.handle) as (port, _),
        raw_client(port, request) as (reader, writer),
    ):
        await head_of(reader)
        yield door.clients[0], reader, writer
        door.clients[0].abort()


def turn(heartbeat: Heartbeat, times: int) -> None:
    for _ in range(times):
        heartbeat.turn()


def pings() -> Heartbeat:
    return Heartbeat(interval_s=2.0, beat=PING, deadline_s=1.0, farewell=FAREWELL)


def test_only_a_client_that_does_not_answer_is_closed_with_a_reason(
    run: Run, reaper: Reaper
) -> None:
    async def main() -> None:
        door = Door(reaper, pings())
        async with connected(door, HANDSHAKE) as (client, reader, writer):
            for _ in range(3):
                turn(door.heartbeat, SLOTS)
                assert await reader.readexactly(2) == PING
                writer.write(masked(10, b"") + masked(1, b"I am here"))
                await door.heard.wait()
                door.heard.clear()
            turn(door.heartbeat, SLOTS + 10)
            assert await reader.readexactly(2) == PING
            assert await reader.readexactly(len(FAREWELL)) == FAREWELL
            assert client.closing
            # The client does not answer the close frame either.
            assert await door.closed.get() is client
            assert len(door.heartbeat) == 0

    run(main())


def test_a_deadline_longer_than_the_interval_is_kept(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        heartbeat = Heartbeat(interval_s=2.0, beat=PING, deadline_s=5.0, farewell=FAREWELL)
        door = Door(reaper, heartbeat)
        async with connected(door, HANDSHAKE) as (client, reader, _):
            while not client.silent_since:
                turn(heartbeat, 1)
            turn(heartbeat, 49)
            assert not client.closing
            turn(heartbeat, 1)
            assert client.closing
            assert (await reader.readexactly(6))[:6] == PING * 3

    run(main())


def test_a_stream_is_never_silent_for_longer_than_the_interval(run: Run, reaper: Reaper) -> None:
    """Whenever the last event was written: a heartbeat of a whole round must not be omitted."""

    async def main() -> None:
        heartbeat = Heartbeat(interval_s=2.0, beat=b":\n\n", only_quiet=True)
        door = Door(reaper, heartbeat)
        async with connected(door, GET) as (client, reader, _):
            # A busy stream needs no heartbeats.
            for _ in range(2 * SLOTS):
                client.write(b"data: 1\n\n")
                turn(heartbeat, 1)
            assert await reader.readexactly(2 * SLOTS * 9) == b"data: 1\n\n" * 2 * SLOTS
            for written_at in range(SLOTS):
                turn(heartbeat, written_at)
                client.write(b"data: 2\n\n")
                turn(heartbeat, SLOTS)
                received = await reader.readuntil(b"data: 2\n\n:\n\n")
                # At most one more than the interval needs.
                assert received.count(b":\n\n") <= 3

    run(main())


def only_silent() -> Heartbeat:
    return Heartbeat(interval_s=2.0, beat=PING, deadline_s=1.0, farewell=FAREWELL, only_quiet=True)


def test_a_client_that_sends_only_pongs_stays_connected(run: Run, reaper: Reaper) -> None:
    """A page that follows a busy library sends nothing by itself."""

    async def main() -> None:
        heartbeat = only_silent()
        async with connected(Door(reaper, heartbeat), HANDSHAKE) as (client, reader, writer):
            for _ in range(4):
                for _ in range(SLOTS):
                    client.write(frame_text(b"event"))
                    turn(heartbeat, 1)
                await reader.readuntil(PING)
                writer.write(masked(10, b""))
                while client.silent_since:
                    await asyncio.sleep(0)
            assert not client.closing
            # A client that does not answer pings is closed, even if data is written to it.
            for _ in range(2 * SLOTS):
                client.write(frame_text(b"event"))
                turn(heartbeat, 1)
            assert client.closing

    run(main())


def test_a_client_that_pings_is_not_pinged(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        heartbeat = only_silent()
        async with connected(Door(reaper, heartbeat), HANDSHAKE) as (client, reader, writer):
            for _ in range(6):
                writer.write(masked(9, b"mine"))
                assert await reader.readexactly(6) == b"\x8a\x04mine"
                turn(heartbeat, SLOTS // 2)
            assert not client.closing
            assert not client.silent_since
            turn(heartbeat, SLOTS)
            assert await reader.readexactly(2) == PING

    run(main())


def test_a_client_that_receives_is_not_closed_however_late_its_pong(
    run: Run, reaper: Reaper
) -> None:
    """A slow link: the ping waits behind other data. The pong's time begins when it has left."""

    async def main() -> None:
        heartbeat = pings()
        async with connected(Door(reaper, heartbeat), HANDSHAKE) as (client, reader, _):
            transport = client.carrier
            assert transport is not None
            # The buffer does not become full.
            transport.set_write_buffer_limits(high=50_000_000)
            payload = frame_text(b"x" * 40_000_000)
            client.write(payload)
            left = len(payload)
            while left > 20_000_000:
                known = acknowledged_bytes(transport)
                await reader.readexactly(2_000_000)
                left -= 2_000_000
                while acknowledged_bytes(transport) == known:
                    await asyncio.sleep(0)
                # The deadline, and one check.
                turn(heartbeat, SLOTS)
                assert not client.closing
            await reader.readexactly(left)
            # Everything has left now, but the client does not respond.
            turn(heartbeat, 3 * SLOTS)
            assert client.closing

    run(main())


@pytest.mark.parametrize("request_bytes", [HANDSHAKE, GET], ids=["websocket", "sse"])
def test_a_client_with_a_full_buffer_gets_no_heartbeat_and_more_time(
    run: Run, reaper: Reaper, request_bytes: bytes
) -> None:
    async def main() -> None:
        heartbeat = Heartbeat(interval_s=2.0, beat=b"BEAT", deadline_s=1.0, farewell=FAREWELL)
        door = Door(reaper, heartbeat)
        async with connected(door, request_bytes) as (client, reader, _):
            wrote = 0
            while not client.full:
                client.write(b"x" * 50_000)
                wrote += 50_000
            turn(heartbeat, 3 * SLOTS)
            assert not client.closing
            drained = asyncio.Event()
            client.on_drained = drained.set
            assert await reader.readexactly(wrote) == b"x" * wrote
            await drained.wait()
            # The client has read data, so its time starts again with a heartbeat.
            turn(heartbeat, SLOTS - 1)
            assert not client.closing
            while not client.full:
                client.write(b"x" * 50_000)
            turn(heartbeat, 6 * SLOTS)
            assert client.closing
            assert await door.closed.get() is client

    run(main())


def test_heartbeats_of_many_clients_are_spread_over_the_interval(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        # No client is overdue before all are connected.
        door = Door(reaper, Heartbeat(interval_s=2.0, beat=PING, deadline_s=60.0))
        async with serving(door.handle) as (port, _), AsyncExitStack() as stack:
            for _ in range(3 * SLOTS):
                reader, _ = await stack.enter_async_context(raw_client(port, HANDSHAKE))
                await head_of(reader)
            assert len(door.heartbeat) == 3 * SLOTS
            # On a slow machine the timer may have advanced meanwhile.
            for client in door.clients:
                client.silent_since = 0
            for _ in range(SLOTS):
                beaten = sum(bool(client.silent_since) for client in door.clients)
                door.heartbeat.turn()
                after = sum(bool(client.silent_since) for client in door.clients)
                assert after - beaten == 3

    run(main())


def test_the_timer_stops_with_the_last_client_and_starts_again(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        heartbeat = Heartbeat(interval_s=0.05, beat=PING, deadline_s=0.1, farewell=FAREWELL)
        door = Door(reaper, heartbeat)
        async with connected(door, HANDSHAKE) as (client, reader, _):
            received = await reader.readuntil(FAREWELL)
            assert received.startswith(PING)
            assert await door.closed.get() is client
            assert len(heartbeat) == 0
        async with connected(Door(reaper, heartbeat), HANDSHAKE) as (_, reader, _):
            assert await reader.readexactly(2) == PING

    run(main())


def test_clients_are_not_overdue_after_a_freeze_of_the_process(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        heartbeat = Heartbeat(interval_s=0.2, beat=PING, deadline_s=0.1, farewell=FAREWELL)
        door = Door(reaper, heartbeat)
        async with connected(door, HANDSHAKE) as (client, reader, writer):
            for _ in range(2):
                await reader.readexactly(2)
                writer.write(masked(10, b""))
                await writer.drain()
                # Block the loop far longer than the deadline, while the pong is in the socket.
                deadline = asyncio.get_running_loop().time() + 0.7
                while asyncio.get_running_loop().time() < deadline:
                    pass
            assert await reader.readexactly(2) == PING
            assert not client.closing

    run(main())


@pytest.mark.parametrize("times", [(0.0, None), (-1.0, None), (1.0, 0.0)])
def test_times_must_be_positive(times: tuple[float, float | None]) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        Heartbeat(interval_s=times[0], beat=b"", deadline_s=times[1])
