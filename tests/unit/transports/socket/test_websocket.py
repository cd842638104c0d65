"""WebSocket frames as raw bytes, and aiohttp's client as an independent peer."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from aiohttp import ClientSession, WSMsgType, web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.transports.socket.frames import (
    TOO_LARGE,
    FrameReader,
    ProtocolViolation,
    parse_close,
)
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import take_over
from relay.transports.socket.websocket import (
    PING,
    WebSocketConnection,
    accept_headers,
    frame_close,
    frame_pong,
    frame_text,
)
from tests.unit.transports.serving import HANDSHAKE, Run, head_of, masked, raw_client, serving

LIMIT = 1000
Found = list[tuple[int, bytes]]


def code_of(data: bytes, limit: int = LIMIT) -> int:
    with pytest.raises(ProtocolViolation) as caught:
        FrameReader(limit).feed(data)
    return caught.value.code


# -- frames to the client ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "head"),
    [
        (0, b"\x81\x00"),
        (125, b"\x81\x7d"),
        (126, b"\x81\x7e\x00\x7e"),
        (65535, b"\x81\x7e\xff\xff"),
        (65536, b"\x81\x7f\x00\x00\x00\x00\x00\x01\x00\x00"),
    ],
)
def test_a_text_frame_uses_the_shortest_length(size: int, head: bytes) -> None:
    assert frame_text(b"x" * size) == head + b"x" * size


def test_control_frames() -> None:
    assert PING == b"\x89\x00"
    assert frame_pong(b"ab") == b"\x8a\x02ab"
    assert frame_close(1001, "bye") == b"\x88\x05\x03\xe9bye"


def test_a_close_reason_is_cut_between_characters() -> None:
    frame = frame_close(4400, "x" * 122 + "é")
    assert frame == b"\x88\x7c" + struct.pack("!H", 4400) + b"x" * 122


# -- frames from the client --------------------------------------------------------------------


def test_the_example_of_the_rfc_is_read() -> None:
    # RFC 6455 section 5.7: "a single-frame masked text message".
    assert FrameReader(LIMIT).feed(bytes.fromhex("818537fa213d7f9f4d5158")) == [(1, b"Hello")]


@given(st.data())
def test_a_lenient_reader_drops_only_messages_that_are_too_large(data: st.DataObject) -> None:
    large = b"x" * (LIMIT + 1)
    sent = (
        masked(1, b"\xe9")
        + masked(1, large)
        + masked(1, b"b" * LIMIT)
        + masked(1, large[:600], fin=False)
        + masked(9, b"?")
        + masked(0, large[:600], fin=False)
        + masked(0, large)
        + masked(1, b"c")
    )
    reader, found = FrameReader(LIMIT, lenient=True), []
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=6)))
    for start, end in itertools.pairwise([0, *cuts, len(sent)]):
        found += reader.feed(sent[start:end])
        assert reader.held_bytes <= 2 * LIMIT
    lost = (TOO_LARGE, b"")
    assert found == [(1, b"\xe9"), lost, (1, b"b" * LIMIT), (9, b"?"), lost, (1, b"c")]


def test_control_frames_between_fragments_are_delivered_first() -> None:
    data = (
        masked(1, b"He", fin=False)
        + masked(9, b"?")
        + masked(0, b"", fin=False)
        + masked(10, b"!")
        + masked(0, b"llo")
    )
    assert FrameReader(LIMIT).feed(data) == [(9, b"?"), (10, b"!"), (1, b"Hello")]


def test_a_character_may_be_split_between_fragments() -> None:
    data = masked(1, "é".encode()[:1], fin=False) + masked(0, "é".encode()[1:])
    assert FrameReader(LIMIT).feed(data) == [(1, "é".encode())]


@pytest.mark.parametrize(
    "data",
    [
        masked(1, b"\xff"),
        masked(1, b"\xc3"),
        masked(1, b"\xed\xa0\x80"),  # a surrogate
        masked(1, b"\xc3", fin=False) + masked(0, b"a"),
        masked(8, b"\x03\xe8\xff"),
    ],
)
def test_invalid_utf_8_closes_with_1007(data: bytes) -> None:
    assert code_of(data) == 1007


@pytest.mark.parametrize(
    "data",
    [
        b"\x81\x00",  # not masked
        bytes([0xC1]) + masked(1, b"")[1:],  # RSV1: compression was not negotiated
        bytes([0x91]) + masked(1, b"")[1:],
        masked(3, b""),
        masked(11, b""),
        masked(9, b"", fin=False),
        masked(9, b"x" * 126),
        masked(0, b"no beginning"),
        masked(1, b"a", fin=False) + masked(1, b"b"),
        masked(2, b"a", fin=False) + masked(1, b"b", fin=False),
        masked(8, b"\x03"),
    ],
)
def test_invalid_framing_closes_with_1002(data: bytes) -> None:
    assert code_of(data) == 1002


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535])
def test_a_reserved_close_code_closes_with_1002(code: int) -> None:
    assert code_of(masked(8, struct.pack("!H", code))) == 1002


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1014, 3000, 4999])
def test_a_valid_close_code_is_read(code: int) -> None:
    payload = struct.pack("!H", code) + "fin ✓".encode()
    assert FrameReader(LIMIT).feed(masked(8, payload)) == [(8, payload)]
    assert parse_close(payload) == code
    assert parse_close(b"") is None


def test_frames_after_a_close_frame_are_ignored() -> None:
    reader = FrameReader(LIMIT)
    assert reader.feed(masked(8, b"") + b"\xff\xff\xff") == [(8, b"")]


@pytest.mark.parametrize(
    "head",
    [
        b"\x81\xfe" + struct.pack("!H", LIMIT + 1),
        b"\x82\xff" + struct.pack("!Q", 1 << 63),
        masked(1, b"x" * LIMIT, fin=False) + b"\x80\x81",
    ],
)
def test_a_message_that_is_too_long_closes_with_1009_before_its_payload(head: bytes) -> None:
    assert code_of(head) == 1009


def test_the_limit_is_inclusive_and_excludes_control_frames() -> None:
    payload = b"x" * LIMIT
    data = masked(1, payload[:-1], fin=False) + masked(9, b"y" * 125) + masked(0, b"x")
    assert FrameReader(LIMIT).feed(data) == [(9, b"y" * 125), (1, payload)]


@pytest.mark.parametrize("piece", [65_537, 100_001, 300_000])
def test_a_large_frame_is_unmasked_as_it_arrives(piece: int) -> None:
    payload = "0123456789äöü".encode() * 40_000
    data = masked(1, b"before") + masked(1, payload) + masked(2, payload[:70_000]) + masked(9, b"")
    reader = FrameReader(1 << 20)
    found: Found = []
    for start in range(0, len(data), piece):
        found += reader.feed(data[start : start + piece])
    assert found == [(1, b"before"), (1, payload), (2, payload[:70_000]), (9, b"")]


def test_messages_before_a_violation_are_delivered() -> None:
    with pytest.raises(ProtocolViolation) as caught:
        FrameReader(LIMIT).feed(masked(1, b"good") + b"\x81\x00")
    assert caught.value.before == [(1, b"good")]


@pytest.mark.parametrize("piece", [1, 3, 8, 100])
def test_a_known_prefix_of_a_client_is_dropped(piece: int) -> None:
    reader = FrameReader(LIMIT, skip_bytes=8)
    data = b"\x81\x85\xffjunk!" + masked(1, b"one") + masked(1, b"two")
    assert len(b"\x81\x85\xffjunk!") == 8
    found: Found = []
    for start in range(0, len(data), piece):
        found += reader.feed(data[start : start + piece])
    assert found == [(1, b"one"), (1, b"two")]


@st.composite
def conversations(draw: st.DrawFn) -> tuple[bytes, Found]:
    """Generate a valid sequence of frames and the messages in it."""
    data, found = b"", Found()
    texts = st.text(max_size=300).map(str.encode)
    for _ in range(draw(st.integers(0, 6))):
        opcode = draw(st.sampled_from([1, 2, 9, 10]))
        if opcode >= 8:
            payload = draw(st.binary(max_size=125))
            data += masked(opcode, payload, mask=draw(st.binary(min_size=4, max_size=4)))
            found.append((opcode, payload))
            continue
        payload = draw(texts if opcode == 1 else st.binary(max_size=300))
        cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=3)))
        edges = [0, *cuts, len(payload)]
        for i, (start, end) in enumerate(itertools.pairwise(edges)):
            last = i == len(edges) - 2
            data += masked(
                opcode if i == 0 else 0,
                payload[start:end],
                fin=last,
                mask=draw(st.binary(min_size=4, max_size=4)),
            )
            if not last and draw(st.booleans()):
                data += masked(9, b"mid", mask=b"abcd")
                found.append((9, b"mid"))
        found.append((opcode, payload))
    return data, found


# The speed of generating examples depends on the machine, which runs other tests too.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(conversation=conversations(), draw=st.data())
def test_any_splitting_of_any_valid_sequence_gives_the_same_messages(
    conversation: tuple[bytes, Found], draw: st.DataObject
) -> None:
    data, expected = conversation
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=20)))
    for edges in ([0, *cuts, len(data)], list(range(len(data) + 1))):
        reader = FrameReader(1 << 20)
        found: Found = []
        for start, end in itertools.pairwise(edges):
            found += reader.feed(data[start:end])
        assert found == expected


@given(data=st.binary(max_size=200))
def test_random_bytes_raise_only_protocol_violations(data: bytes) -> None:
    reader = FrameReader(100)
    with suppress(ProtocolViolation):
        for i in range(len(data)):
            reader.feed(data[i : i + 1])


# -- the handshake and the connection ----------------------------------------------------------


class Server:
    """Takes over every client and calls `on_connect` for it."""

    def __init__(
        self, reaper: Reaper, on_connect: Callable[[WebSocketConnection], None] | None = None
    ) -> None:
        self.reaper = reaper
        self.on_connect = on_connect
        self.connected: asyncio.Queue[WebSocketConnection] = asyncio.Queue()
        self.closed: asyncio.Queue[WebSocketConnection] = asyncio.Queue()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        head = accept_headers(request)
        if isinstance(head, web.Response):
            return head
        client = WebSocketConnection(buffer_bytes=65536, max_frame_bytes=LIMIT, reaper=self.reaper)
        client.on_closed = lambda: self.closed.put_nowait(client)
        if self.on_connect is not None:
            self.on_connect(client)
        response = take_over(request, head, client)
        self.connected.put_nowait(client)
        return response


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (b"Upgrade: websocket", b"Upgrade: h2c", 426),
        (b"keep-alive, Upgrade", b"keep-alive", 426),
        (b"Version: 13", b"Version: 8", 426),
        (b"dGhlIHNhbXBsZSBub25jZQ==", b"c2hvcnQ=", 400),
        (b"dGhlIHNhbXBsZSBub25jZQ==", b"dGhlIHNhbXBsZSBub25jZQ*=", 400),
        (b"HTTP/1.1", b"HTTP/1.0", 426),
        (b"Upgrade: websocket", b"upgrade: WebSocket", 101),
    ],
)
def test_a_handshake_is_checked(
    run: Run, reaper: Reaper, old: bytes, new: bytes, status: int
) -> None:
    async def main() -> None:
        async with (
            serving(Server(reaper).handle) as (port, _),
            raw_client(port, HANDSHAKE.replace(old, new)) as (reader, _),
        ):
            assert int((await head_of(reader))[9:12]) == status

    run(main())


def test_aiohttps_client_exchanges_messages(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        def echo(client: WebSocketConnection) -> None:
            client.on_text = lambda text: client.write(frame_text(text))

        server = Server(reaper, echo)
        async with (
            serving(server.handle) as (port, _),
            ClientSession() as session,
            session.ws_connect(f"http://127.0.0.1:{port}/", autoping=False) as ws,
        ):
            await ws.send_str("grüß dich")
            assert (await ws.receive()).data == "grüß dich"
            await ws.ping(b"there?")
            pong = await ws.receive()
            assert (pong.type, pong.data) == (WSMsgType.PONG, b"there?")
            client = await server.connected.get()
            client.close(frame_text(b"last") + frame_close(4401, "expired"))
            client.write(frame_text(b"swallowed"))
            assert (await ws.receive()).data == "last"
            end = await ws.receive()
            assert (end.type, end.data, end.extra) == (WSMsgType.CLOSE, 4401, "expired")
            assert await server.closed.get() is client

    run(main())


def test_a_close_frame_is_echoed_before_the_connection_ends(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        server = Server(reaper)
        async with serving(server.handle) as (port, _):
            for payload, answer in ((b"\x0f\xa0bye", b"\x88\x02\x0f\xa0"), (b"", b"\x88\x00")):
                async with raw_client(port, HANDSHAKE + masked(8, payload)) as (reader, _):
                    await head_of(reader)
                    assert await reader.read() == answer
                    await server.closed.get()

    run(main())


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (masked(2, b"binary"), 1003),
        (b"\x81\x02hi", 1002),
        (masked(1, b"\xff"), 1007),
        (b"\x81\xff" + struct.pack("!Q", 1 << 40) + b"x" * 200_000, 1009),
    ],
)
def test_a_violation_is_reported_in_the_close_frame(
    run: Run, reaper: Reaper, data: bytes, code: int
) -> None:
    async def main() -> None:
        server = Server(reaper)
        async with (
            serving(server.handle) as (port, _),
            raw_client(port, HANDSHAKE + masked(1, b"fine") + data) as (reader, writer),
        ):
            await head_of(reader)
            head = await reader.readexactly(2)
            assert head[0] == 0x88
            assert int.from_bytes((await reader.readexactly(head[1]))[:2], "big") == code
            writer.write(masked(8, struct.pack("!H", code)))
            writer.close()
            await server.closed.get()

    run(main())


def test_a_client_that_does_not_answer_the_close_is_aborted(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        server = Server(reaper)
        async with (
            serving(server.handle) as (port, _),
            raw_client(port, HANDSHAKE) as (reader, writer),
        ):
            await head_of(reader)
            client = await server.connected.get()
            client.close_with(1001)
            writer.write(masked(1, b"still talking"))
            assert await server.closed.get() is client
            assert len(reaper) == 0

    run(main())


def test_many_pings_of_a_client_that_does_not_read_queue_one_pong(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        server = Server(reaper)
        async with (
            serving(server.handle) as (port, _),
            raw_client(port, HANDSHAKE) as (reader, writer),
        ):
            await head_of(reader)
            client = await server.connected.get()
            while not client.full:
                client.write(frame_text(b"x" * 60_000))
                await asyncio.sleep(0)
            waiting = client.waiting_bytes()
            got = asyncio.Event()
            client.on_text = lambda _: got.set()
            writer.write(b"".join(masked(9, b"%04d" % i) for i in range(100)) + masked(1, b"end"))
            await got.wait()
            assert client.waiting_bytes() <= waiting
            stream = b""
            while b"\x8a\x040099" not in stream:
                stream = stream[-10:] + await reader.read(1 << 20)
            assert b"\x8a\x040098" not in stream

    run(main())


def test_the_pongs_of_one_read_are_one_write(
    run: Run, reaper: Reaper, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    write = WebSocketConnection.write

    def watched(client: WebSocketConnection, data: bytes) -> None:
        written.append(data)
        write(client, data)

    monkeypatch.setattr(WebSocketConnection, "write", watched)

    async def main() -> None:
        server = Server(reaper)
        async with (
            serving(server.handle) as (port, _),
            raw_client(port, HANDSHAKE) as (reader, writer),
        ):
            await head_of(reader)
            writer.write(masked(9, b"a") + masked(9, b"") + masked(9, b"b"))
            assert await reader.readexactly(8) == b"\x8a\x01a\x8a\x00\x8a\x01b"
            assert len(written) == 1

    run(main())


@pytest.mark.parametrize(
    "piece",
    [masked(9, b""), masked(10, b"pong"), masked(1, b"", fin=False) + masked(0, b"")],
    ids=["pings", "pongs", "fragments"],
)
@pytest.mark.parametrize("together", [True, False])
def test_a_flood_of_frames_without_a_message_closes_with_1008(
    run: Run, reaper: Reaper, piece: bytes, *, together: bool
) -> None:
    async def main() -> None:
        server = Server(reaper)
        async with (
            serving(server.handle) as (port, _),
            raw_client(port, HANDSHAKE) as (reader, writer),
        ):
            await head_of(reader)
            client = await server.connected.get()
            messages: list[bytes] = []
            client.on_text = messages.append
            for _ in range(3):
                writer.write(piece * 150)
                await writer.drain()
                if not together:
                    await asyncio.sleep(0.05)
            received = await reader.read()
            assert client.closing
            assert b"\x88" in received
            assert struct.pack("!H", 1008) in received
            assert len(received) <= 450

    run(main())


def test_a_message_of_many_tiny_fragments_is_received_slowly(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        server = Server(reaper)
        async with (
            serving(server.handle) as (port, _),
            raw_client(port, HANDSHAKE) as (reader, writer),
        ):
            await head_of(reader)
            client = await server.connected.get()
            messages: asyncio.Queue[bytes] = asyncio.Queue()
            client.on_text = messages.put_nowait
            client.limit_messages(1 << 20)
            pieces = [masked(1, b"x" * 64, fin=False), *[masked(0, b"y" * 64, fin=False)] * 999]
            begun = asyncio.get_running_loop().time()
            writer.write(b"".join(pieces) + masked(0, b"z"))
            assert await messages.get() == b"x" * 64 + b"y" * 64 * 999 + b"z"
            # 64 fragments per turn, one turn every 5 ms.
            assert asyncio.get_running_loop().time() - begun > 0.02
            # One at a time, too.
            for piece in (*pieces[:20], masked(0, b"z")):
                writer.write(piece)
                await writer.drain()
            assert (await messages.get())[-1:] == b"z"
            writer.close()
            # Otherwise the loop may end while the client is not read.
            await server.closed.get()

    run(main())


def test_a_flood_after_the_servers_close_frame_is_not_parsed(
    run: Run, reaper: Reaper, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    frame_at = FrameReader._frame_at

    def watched(frames: FrameReader, source: bytes | bytearray, start: int, found: Found) -> int:
        parsed.append(start)
        return frame_at(frames, source, start, found)

    monkeypatch.setattr(FrameReader, "_frame_at", watched)

    def close(client: WebSocketConnection) -> None:
        client.on_text = lambda _: client.close_with(4429)

    async def main() -> None:
        server = Server(reaper, close)
        async with (
            serving(server.handle) as (port, _),
            raw_client(port, HANDSHAKE) as (reader, writer),
        ):
            await head_of(reader)
            writer.write(masked(1, b"x", mask=b"abcd") * 20_000)
            await server.closed.get()
            assert len(parsed) <= 200

    run(main())


def test_many_messages_in_one_read_are_handled_in_several_turns(run: Run, reaper: Reaper) -> None:
    """The owner may also pause reading in between."""

    async def main() -> None:
        messages: list[bytes] = []
        most = 0
        in_turn = 0

        def received(client: WebSocketConnection, text: bytes) -> None:
            nonlocal in_turn, most
            messages.append(text)
            in_turn += 1
            most = max(most, in_turn)
            if len(messages) % 100 == 0:
                client.pause_reading()
                loop.call_later(0.001, client.resume_reading)

        def tick() -> None:
            nonlocal in_turn
            in_turn = 0
            if len(messages) < 20_000:
                loop.call_soon(tick)

        loop = asyncio.get_running_loop()
        server = Server(
            reaper, lambda each: setattr(each, "on_text", lambda text: received(each, text))
        )
        async with (
            serving(server.handle) as (port, _),
            raw_client(port, HANDSHAKE) as (reader, writer),
        ):
            await head_of(reader)
            tick()
            writer.write(b"".join(masked(1, b"%d" % i, mask=b"abcd") for i in range(20_000)))
            writer.write(masked(8, struct.pack("!H", 1000)))
            await server.closed.get()
            assert messages == [b"%d" % i for i in range(20_000)]
            assert most <= 200

    run(main())


def test_bytes_that_are_dropped_may_look_like_a_ping(run: Run, reaper: Reaper) -> None:
    """Pydio 6's publisher sends 8 random bytes before its first frame."""

    async def main() -> None:
        async def handler(request: web.Request) -> web.StreamResponse:
            head = accept_headers(request)
            assert isinstance(head, bytes)
            socket = WebSocketConnection(
                buffer_bytes=65536, max_frame_bytes=LIMIT, reaper=reaper, skip_bytes=8
            )
            socket.on_text = lambda text: socket.write(frame_text(text))
            return take_over(request, head, socket)

        async with (
            serving(handler) as (port, _),
            raw_client(port, HANDSHAKE) as (reader, writer),
        ):
            await head_of(reader)
            writer.write(b"\x89\x82abcdef")
            await asyncio.sleep(0.05)
            writer.write(masked(1, b"message"))
            assert await reader.readexactly(9) == frame_text(b"message")

    run(main())


def test_empty_pings_are_answered_wherever_a_frame_was_cut(run: Run, reaper: Reaper) -> None:
    """A ping that fills its segment takes a shortcut, unless it is in the middle of a frame."""
    messages: list[bytes] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        head = accept_headers(request)
        assert isinstance(head, bytes)
        socket = WebSocketConnection(buffer_bytes=65536, max_frame_bytes=LIMIT, reaper=reaper)
        socket.on_binary = messages.append
        return take_over(request, head, socket)

    async def main() -> None:
        async with (
            serving(handler) as (port, _),
            raw_client(port, HANDSHAKE) as (reader, writer),
        ):
            await head_of(reader)
            writer.write(masked(9, b""))
            assert await reader.readexactly(2) == b"\x8a\x00"
            # The same six bytes are the payload of an incomplete frame.
            begun = masked(2, b"\x89\x80abcd", mask=b"\0\0\0\0")
            writer.write(begun[:6])
            await asyncio.sleep(0.05)
            writer.write(begun[6:])
            await asyncio.sleep(0.05)
            writer.write(masked(9, b"x") + masked(9, b""))
            assert await reader.readexactly(5) == b"\x8a\x01x\x8a\x00"
            assert messages == [b"\x89\x80abcd"]

    run(main())


def test_binary_messages_are_rejected_unless_they_are_enabled(run: Run, reaper: Reaper) -> None:
    taken: list[bytes] = []
    goodbyes: list[bool] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        head = accept_headers(request)
        assert isinstance(head, bytes)
        socket = WebSocketConnection(buffer_bytes=65536, max_frame_bytes=LIMIT, reaper=reaper)
        if request.query_string != "refuse":
            socket.on_binary = taken.append
        socket.on_closed = lambda: goodbyes.append(socket.close_received)
        return take_over(request, head, socket)

    async def main() -> None:
        async with serving(handler) as (port, _), ClientSession() as session:
            async with session.ws_connect(f"http://127.0.0.1:{port}/") as client:
                await client.send_bytes(b"\xff\x00")
            async with session.ws_connect(f"http://127.0.0.1:{port}/?refuse") as client:
                await client.send_bytes(b"x")
                await client.receive()
                assert client.close_code == 1003
            async with raw_client(port, HANDSHAKE) as (reader, _):
                await head_of(reader)
        while len(goodbyes) < 3:
            await asyncio.sleep(0)

    run(main())
    assert taken == [b"\xff\x00"]
    assert goodbyes[0]
    assert not goodbyes[2]
