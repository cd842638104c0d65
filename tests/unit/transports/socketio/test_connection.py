"""Transcripts of real clients against the engine and the connection, without sockets."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from relay.transports.engineio.engine import Engine
from relay.transports.engineio.packets import (
    MESSAGE,
    Malformed,
    Packet,
    decode_payload,
    encode_payload,
    frame,
    unframe,
)
from relay.transports.socket.heartbeat import Heartbeat
from relay.transports.socket.reaper import Reaper
from relay.transports.socketio.connection import Acknowledge, SocketIoConnection

PLACEHOLDER = {"_placeholder": True, "num": 0}


class Door:
    """Accepts /axr with a token and rejects it without one."""

    def __init__(self, engine: Engine) -> None:
        self.connection = SocketIoConnection(engine, self)
        self.said: list[Any] = []
        engine.on_message = self.connection.on_message
        engine.on_closed = self.connection.on_closed

    def connecting(self, namespace: str, auth: Mapping[str, Any], query: str) -> None:
        good = auth.get("token") == "good" or "token=good" in query
        if namespace == "/" or good:
            if good:
                self.connection.engine.authorize()
            self.connection.accept(namespace, "the-sid")
        elif namespace == "/axr":
            self.connection.refuse(namespace, "not authorized", {"code": 401})
        else:
            self.connection.refuse(namespace, "Invalid namespace")

    def event(
        self, namespace: str, name: str, args: list[Any], acknowledge: Acknowledge | None
    ) -> None:
        self.said.append((namespace, name, args))
        if acknowledge is not None:
            acknowledge(*args)

    def left(self, namespace: str) -> None:
        self.said.append((namespace, "left"))

    def closed(self) -> None:
        self.said.append("closed")


class Wire:
    """A polling client that posts and polls bodies."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.gone: list[Engine] = []
        self.engine = Engine(
            sid="~sid.w",
            version=version,
            buffer_bytes=1000,
            max_message_bytes=1_000_000,
            reaper=Reaper(),
            heartbeat=Heartbeat(interval_s=25, beat=b""),
            on_gone=self.gone.append,
        )
        self.door = Door(self.engine)
        self.door.connection.opened()

    def post(self, body: bytes, *, binary: bool = False) -> None:
        self.engine.receive(decode_payload(body, self.version, binary=binary))

    def poll(self) -> bytes:
        answers: list[bytes | None] = []
        self.engine.poll(answers.append)
        assert answers, "nothing waits"
        assert answers[0] is not None, "the session has ended"
        packets = unframe(answers[0], self.version)
        return encode_payload(packets, self.version, base64_only=True).data


@pytest.fixture
async def old() -> Wire:
    return Wire(3)


@pytest.fixture
async def new() -> Wire:
    return Wire(4)


async def test_a_2x_client_as_captured(old: Wire) -> None:
    assert old.poll() == b"2:40"
    old.post(b"18:40/axr?token=good,1:2")
    assert old.poll() == b"7:40/axr,1:3"
    old.post(b'24:42/axr,0["echo",{"x":1}]')
    assert old.poll() == b'17:43/axr,0[{"x":1}]'
    old.post(b'46:451-/axr,["bin",{"_placeholder":true,"num":0}]6:b4AQL/')
    assert old.door.said[-1] == ("/axr", "bin", [PLACEHOLDER])
    old.door.connection.emit("/axr", "bin", b"\x01\x02\xff")
    assert old.poll() == b'46:451-/axr,["bin",{"_placeholder":true,"num":0}]6:b4AQL/'
    old.post(b"7:41/axr,")
    assert old.door.said[-1] == ("/axr", "left")


async def test_a_4x_client_as_captured(new: Wire) -> None:
    new.post(b'40/axr,{"token":"good"}')
    assert new.poll() == b'40/axr,{"sid":"the-sid"}'
    new.post(b'42/axr,0["echo",{"x":1}]')
    assert new.poll() == b'43/axr,0[{"x":1}]'
    new.post(b'451-/axr,["bin",{"_placeholder":true,"num":0}]\x1ebAQL/')
    assert new.door.said[-1] == ("/axr", "bin", [PLACEHOLDER])
    new.post(b"41/axr,\x1e1")
    assert new.door.said[-2:] == [("/axr", "left"), "closed"]
    assert new.gone


async def test_rejections_as_captured(old: Wire, new: Wire) -> None:
    old.poll()
    old.post(b"7:40/axr,")
    assert old.poll() == b'19:44/axr,{"code":401}'
    new.post(b"40/axr,")
    assert new.poll() == b'44/axr,{"message":"not authorized","data":{"code":401}}'
    new.post(b"40/nope,")
    assert new.poll() == b'44/nope,{"message":"Invalid namespace"}'


@pytest.mark.parametrize("body", [b'42/axr,["early"]', b"4nonsense", b"2", b"7"])
async def test_a_protocol_violation_closes_the_connection(new: Wire, body: bytes) -> None:
    try:
        new.post(body)
    except Malformed:
        # The endpoint responds with 400 and ends the session.
        new.engine.violated()
    assert new.engine.closing
    # As in engine.io, the session does not exist any more.
    assert new.gone == [new.engine]
    with pytest.raises(AssertionError, match="the session has ended"):
        new.poll()
    assert new.door.said[-1] == "closed"


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize(
    "packets",
    [
        [Packet(MESSAGE, b"0/a,")] * 101,
        [Packet(MESSAGE, b'55-["m"]'), *[Packet(MESSAGE, bytes(20_000), True)] * 4],
        [Packet(MESSAGE, b"0/a," + b" " * 70_000)],
    ],
    ids=["packets", "attachments", "bytes"],
)
async def test_a_client_without_a_credential_may_send_little(
    version: int, packets: list[Packet]
) -> None:
    wire = Wire(version)
    body = encode_payload(packets, version, base64_only=True).data
    wire.post(body)
    assert wire.engine.closing


async def test_a_client_with_a_credential_may_send_more(new: Wire) -> None:
    assert new.engine.max_message_bytes == 65_536
    new.post(b'40/axr,{"token":"good"}')
    assert new.engine.max_message_bytes == 1_000_000
    for _ in range(10):
        new.post(b"\x1e".join([b'42/axr,["m",1]'] * 100))
    new.post(b'42/axr,["large","' + b"x" * 900_000 + b'"]')
    assert not new.engine.closing
    assert len(new.door.said) == 1000
    socket = Socket()
    timer = asyncio.get_running_loop().call_later(60, lambda: None)
    assert new.engine.probe(socket, timer)  # type: ignore[arg-type]
    socket.on_text(b"2probe")
    socket.on_text(b"5")
    assert socket.max_bytes == 1_000_000
    timer.cancel()


async def test_a_client_that_disconnects_while_connecting_has_left(new: Wire) -> None:
    """Otherwise it could connect again during the first attempt."""
    left: list[str] = []
    new.door.connecting = lambda *_: None  # type: ignore[method-assign]
    new.door.left = left.append  # type: ignore[method-assign,assignment]
    new.post(b"40/axr,\x1e41/axr,\x1e41/axr,")
    assert left == ["/axr"]


@pytest.mark.parametrize("version", [3, 4])
async def test_a_closed_connection_is_freed_without_garbage_collection(version: int) -> None:
    gc.collect()
    gc.disable()
    try:
        wire = Wire(version)
        wire.post(
            encode_payload([Packet(MESSAGE, b"0/axr?token=good,")], 3, base64_only=True).data
            if version == 3
            else b'40/axr,{"token":"good"}'
        )
        wire.engine.close()
        # The buffered packets, and then the end: the client reconnects.
        wire.poll()
        with pytest.raises(AssertionError, match="the session has ended"):
            wire.poll()
        door = weakref.ref(wire.door)
        del wire
        assert door() is None
    finally:
        gc.enable()


async def test_a_2x_client_that_answers_pings_that_were_never_sent_is_closed(old: Wire) -> None:
    old.post(b"1:3")
    assert old.engine.closing


async def test_a_second_concurrent_poll_closes_the_session(new: Wire) -> None:
    first: list[bytes | None] = []
    assert new.engine.poll(first.append)
    assert not new.engine.poll(first.append)
    assert new.gone == [new.engine]
    assert first == [frame(Packet(1), 4)]


async def test_a_client_that_does_not_poll_becomes_full_and_is_drained(new: Wire) -> None:
    told: list[str] = []
    new.engine.on_full, new.engine.on_drained = (
        lambda: told.append("full"),
        lambda: told.append("drained"),
    )
    data = frame(Packet(MESSAGE, b"x" * 600), 4)
    new.engine.write(data)
    assert told == []
    new.engine.write(data)
    assert (told, new.engine.full) == (["full"], True)
    new.poll()
    assert (told, new.engine.full) == (["full", "drained"], False)


class Socket:
    """A websocket that may replace polling."""

    def __init__(self) -> None:
        self.closing = False
        self.out: list[bytes] = []
        self.on_text: Callable[[bytes], None] = lambda _: None
        self.on_binary: Callable[[bytes], None] | None = None
        self.on_full: Callable[[], None] = lambda: None
        self.on_drained: Callable[[], None] = lambda: None
        self.on_closed: Callable[[], None] = lambda: None
        self.max_bytes = 0

    def limit_messages(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes

    def write(self, data: bytes) -> None:
        self.out.append(data)

    def close(self, last: bytes = b"") -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True

    def close_with(self, code: int, reason: str = "") -> None:
        self.closing = True


async def test_the_upgrade_as_captured(new: Wire) -> None:
    timer = asyncio.get_running_loop().call_later(60, lambda: None)
    polls: list[bytes | None] = []
    assert new.engine.poll(polls.append)
    socket = Socket()
    assert new.engine.probe(socket, timer)  # type: ignore[arg-type]
    assert not new.engine.probe(Socket(), timer)  # type: ignore[arg-type]
    socket.on_text(b"2probe")
    assert socket.out == [frame(Packet(3, b"probe"), 4)]
    # The pending polling request is answered, and later events wait for the upgrade.
    assert polls == [frame(Packet(6), 4)]
    new.post(b'40/axr,{"token":"good"}')
    assert new.engine.poll(polls.append)
    assert polls[1:] == [frame(Packet(6), 4)]
    socket.on_text(b"5")
    assert unframe(socket.out[-1], 4) == [Packet(MESSAGE, b'0/axr,{"sid":"the-sid"}')]
    new.door.connection.emit("/axr", "m", 1)
    assert unframe(socket.out[-1], 4) == [Packet(MESSAGE, b'2/axr,["m",1]')]
    socket.on_text(b'42/axr,["over websocket"]')
    assert new.door.said[-1] == ("/axr", "over websocket", [])
    timer.cancel()


async def test_polling_continues_after_a_failed_probe(new: Wire) -> None:
    timer = asyncio.get_running_loop().call_later(60, lambda: None)
    socket = Socket()
    assert new.engine.probe(socket, timer)  # type: ignore[arg-type]
    socket.on_text(b"2probe")
    new.post(b'40/axr,{"token":"good"}')
    socket.on_closed()
    assert timer.cancelled()
    assert new.poll() == b'40/axr,{"sid":"the-sid"}'


@pytest.mark.parametrize("ends", ["close", "dismiss"])
async def test_a_session_that_ends_during_an_upgrade_waits_for_it(new: Wire, ends: str) -> None:
    """JavaScript clients that have stopped polling would wait 45 s if the WebSocket failed."""
    timer = asyncio.get_running_loop().call_later(60, lambda: None)
    socket = Socket()
    assert new.engine.probe(socket, timer)  # type: ignore[arg-type]
    socket.on_text(b"2probe")
    new.post(b"40/axr,")
    getattr(new.engine, ends)()
    assert not socket.closing
    socket.on_text(b"5")
    assert socket.closing
    assert timer.cancelled()
    last = [Packet(MESSAGE, b'4/axr,{"message":"not authorized","data":{"code":401}}')]
    sent = [packet for data in socket.out[1:] for packet in unframe(data, 4)]
    assert sent == last + [Packet(1)] * (ends == "dismiss")


async def test_a_session_that_ends_during_an_upgrade_that_fails(new: Wire) -> None:
    timer = asyncio.get_running_loop().call_later(60, lambda: None)
    socket = Socket()
    assert new.engine.probe(socket, timer)  # type: ignore[arg-type]
    socket.on_text(b"2probe")
    new.engine.close()
    assert not new.gone
    socket.on_closed()
    answers: list[bytes | None] = []
    new.engine.poll(answers.append)
    assert answers == [None]
    assert new.gone
