"""permessage-deflate: with hand-made frames, and with aiohttp's client as an independent peer."""

from __future__ import annotations

import asyncio
import contextlib
import zlib

import pytest
from aiohttp import ClientSession, WSMsgType, web
from aiohttp.test_utils import make_mocked_request

from relay.transports.socket.deflate import HUFFMAN_ONLY, InflateError, deflate, inflate, is_offered
from relay.transports.socket.frames import FrameReader, ProtocolViolation
from relay.transports.socket.heartbeat import Heartbeat
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import take_over
from relay.transports.socket.websocket import (
    WebSocketConnection,
    accept_headers,
    frame_compressed,
    frame_ping,
    frame_text,
)
from tests.unit.transports.serving import HANDSHAKE, Run, head_of, masked, raw_client, serving

LIMIT = 1000


def compressed(payload: bytes, opcode: int = 1, *, fin: bool = True) -> bytes:
    return masked(opcode | 0x40, payload, fin=fin)


@pytest.mark.parametrize("level", [HUFFMAN_ONLY, -1, 0, 1, 9])
@pytest.mark.parametrize("message", [b"", b"a", b'{"a":1}' * 100])
def test_compressed_messages_are_read(message: bytes, level: int) -> None:
    assert inflate(deflate(message, level), 1000) == message


def test_a_decompression_bomb_is_rejected() -> None:
    assert inflate(deflate(b"\0" * 10_000_000, 9), 1000) is None


def test_the_limit_itself_is_allowed() -> None:
    assert inflate(deflate(b"x" * 1000, 1), 1000) == b"x" * 1000
    assert inflate(deflate(b"x" * 1001, 1), 1000) is None


def test_invalid_compressed_data_raises_an_error() -> None:
    with pytest.raises(InflateError):
        inflate(b"\xff\xff\xff\xff", 1000)


@pytest.mark.parametrize(
    ("offer", "agreed"),
    [
        ("permessage-deflate", True),
        ("permessage-deflate; client_max_window_bits", True),
        ("Permessage-Deflate; server_no_context_takeover", True),
        ("x-webkit-deflate-frame, permessage-deflate", True),
        # Frames are shared by all clients and use the largest window.
        ("permessage-deflate; server_max_window_bits=10", False),
        ("permessage-deflate; server_max_window_bits=10, permessage-deflate", True),
        ("x-webkit-deflate-frame", False),
        ("", False),
    ],
)
def test_an_offer_is_accepted_if_its_parameters_are_supported(offer: str, agreed: bool) -> None:
    headers = {"Sec-WebSocket-Extensions": offer} if offer else {}
    assert is_offered(make_mocked_request("GET", "/", headers=headers)) is agreed


def test_compressed_and_plain_messages_may_take_turns() -> None:
    reader = FrameReader(LIMIT, compressed=True)
    whole = deflate(b"one two", 1)
    data = compressed(whole[:3], fin=False) + masked(9, b"p") + masked(0, whole[3:])
    data += masked(1, b"plain") + compressed(deflate(b"\xc3\xa9", 9), opcode=2)
    assert reader.feed(data) == [(9, b"p"), (1, b"one two"), (1, b"plain"), (2, b"\xc3\xa9")]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (compressed(deflate(b"x" * 5000, 9)), 1009),
        (compressed(b"\xff\xff\xff"), 1007),
        (compressed(deflate(b"\xff", 1)), 1007),
        # Only the first frame of a message has the bit, and no control frame.
        (masked(1, b"a", fin=False) + compressed(b"b", opcode=0), 1002),
        (compressed(b"", opcode=9), 1002),
        (masked(1 | 0x20, b"a"), 1002),
    ],
)
def test_a_violation_of_the_negotiated_parameters_closes(data: bytes, code: int) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        FrameReader(LIMIT, compressed=True).feed(data)
    assert caught.value.code == code


def test_compression_without_negotiation_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation) as caught:
        FrameReader(LIMIT).feed(compressed(deflate(b"a", 1)))
    assert caught.value.code == 1002


def test_aiohttps_client_negotiates_compression(run: Run, reaper: Reaper) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        wants = is_offered(request)
        head = accept_headers(request, compress=wants)
        assert isinstance(head, bytes)
        client = WebSocketConnection(
            buffer_bytes=65536, max_frame_bytes=LIMIT, reaper=reaper, compressed=wants
        )
        client.on_text = lambda text: client.write(frame_compressed(text) + frame_text(text))
        return take_over(request, head, client)

    async def main() -> None:
        async with (
            serving(handler) as (port, _),
            ClientSession() as session,
            session.ws_connect(f"http://127.0.0.1:{port}/", compress=15) as ws,
        ):
            assert ws.compress
            for text in ("hallo " * 50, "", "grüß dich"):
                await ws.send_str(text)
                assert [(await ws.receive()).data for _ in range(2)] == [text, text]

    run(main())


def test_only_a_pong_counts_if_pongs_are_required(run: Run, reaper: Reaper) -> None:
    beats = Heartbeat(interval_s=0.2, beat=frame_ping(b"ping"), deadline_s=0.1)

    async def handler(request: web.Request) -> web.StreamResponse:
        head = accept_headers(request)
        assert isinstance(head, bytes)
        client = WebSocketConnection(
            buffer_bytes=65536,
            max_frame_bytes=LIMIT,
            reaper=reaper,
            heartbeat=beats,
            only_pong_counts=True,
        )
        return take_over(request, head, client)

    async def main() -> None:
        async with (
            serving(handler) as (port, _),
            ClientSession() as session,
            session.ws_connect(f"http://127.0.0.1:{port}/", autoping=False) as ws,
            raw_client(port, HANDSHAKE) as (reader, writer),
        ):
            await head_of(reader)

            async def talk() -> None:
                # Sends text frames continuously, and no pong.
                while not writer.transport.is_closing():
                    writer.write(masked(1, b"hello"))
                    await asyncio.sleep(0.02)

            answered = asyncio.Event()

            async def answer() -> None:
                for _ in range(4):
                    ping = await ws.receive()
                    assert (ping.type, ping.data) == (WSMsgType.PING, b"ping")
                    await ws.pong(ping.data)
                answered.set()

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(talk()), group.create_task(answer())]
                assert await reader.readexactly(6) == b"\x89\x04ping"
                # The kernel resets a connection that is closed before all its bytes are read.
                with contextlib.suppress(ConnectionResetError):
                    await reader.read()
                await answered.wait()
                for task in tasks:
                    task.cancel()

    run(main())


def test_a_client_is_not_overdue_while_reading_is_paused(run: Run, reaper: Reaper) -> None:
    beats = Heartbeat(interval_s=0.2, beat=frame_ping(b"ping"), deadline_s=0.1)

    async def handler(request: web.Request) -> web.StreamResponse:
        head = accept_headers(request)
        assert isinstance(head, bytes)
        client = WebSocketConnection(
            buffer_bytes=65536, max_frame_bytes=LIMIT, reaper=reaper, heartbeat=beats
        )
        response = take_over(request, head, client)
        client.pause_reading()
        asyncio.get_running_loop().call_later(1.0, client.resume_reading)
        return response

    async def main() -> None:
        async with serving(handler) as (port, _), raw_client(port, HANDSHAKE) as (reader, _):
            await head_of(reader)
            # At least three heartbeats are sent while reading is paused. Later ones are not
            # answered, so the connection is closed.
            assert (await reader.read()).count(b"ping") >= 3

    run(main())


def test_reading_can_be_paused(run: Run, reaper: Reaper) -> None:
    taken: asyncio.Queue[bytes] = asyncio.Queue()
    clients: list[WebSocketConnection] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        head = accept_headers(request)
        assert isinstance(head, bytes)
        client = WebSocketConnection(buffer_bytes=65536, max_frame_bytes=LIMIT, reaper=reaper)
        clients.append(client)
        client.on_text = taken.put_nowait
        return take_over(request, head, client)

    async def main() -> None:
        async with serving(handler) as (port, _), raw_client(port, HANDSHAKE) as (reader, writer):
            await head_of(reader)
            writer.write(masked(1, b"one"))
            assert await taken.get() == b"one"
            clients[0].pause_reading()
            writer.write(masked(1, b"two"))
            await writer.drain()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await taken.get()
            clients[0].resume_reading()
            assert await taken.get() == b"two"

    run(main())


def test_zlib_decompresses_it() -> None:
    made = zlib.decompressobj(-15)
    assert made.decompress(deflate(b"hello hello hello", 6) + b"\0\0\xff\xff") == (
        b"hello hello hello"
    )
