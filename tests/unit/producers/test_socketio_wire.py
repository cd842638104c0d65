"""Messages of Socket.IO emitters: captured bytes of both generations, and arbitrary bytes."""

from __future__ import annotations

import base64
import contextlib
from typing import Any

import msgpack
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producers import socketio_wire as wire
from producers.socketio_wire import Control
from relay.protocols.socketio.entry_format import Emit, UnusableEmit

# `of('/axr').to('allusers').emit('msg',{hello:'world',n:1})`, captured from both.
OLD = bytes.fromhex(
    "93a7656d697474657283a47479706502a46461746192a36d736782a568656c6c6fa5776f726c64a16e01"
    "a36e7370a42f61787282a5726f6f6d7391a8616c6c7573657273a5666c61677380"
)  # fmt: skip
NEW = OLD.replace(b"\x82\xa5rooms", b"\x83\xa5rooms") + bytes.fromhex("a665786365707490")
MSG = Emit(name="msg", args=({"hello": "world", "n": 1},), rooms=("allusers",))


def packed(*data: Any, opts: Any = None, nsp: str = "/axr") -> bytes:
    parts = ["emitter", {"type": 2, "data": list(data), "nsp": nsp}]
    found: bytes = msgpack.packb([*parts, {"rooms": []} if opts is None else opts])
    return found


@pytest.mark.parametrize("payload", [OLD, NEW])
def test_captured_emits(payload: bytes) -> None:
    assert wire.parse_broadcast(payload, "/axr") == MSG
    assert wire.parse_broadcast(payload, "/other") is None


def test_dates_and_undefined_of_both_generations() -> None:
    # Ext type 0 with 8 bytes or 1 (notepack 2); the standard timestamp and nil (notepack 3).
    old_date, new_date = bytes.fromhex("d7000000015d3ef79800"), bytes.fromhex("d6ff59682f00")
    undefined = bytes.fromhex("d40000")
    iso = "2017-07-14T02:40:00.000Z"

    def emit(*args: bytes) -> Emit | None:
        data = bytes((0x90 + 1 + len(args),)) + msgpack.packb("m") + b"".join(args)
        head = b"\x93" + msgpack.packb("emitter") + b"\x82" + msgpack.packb("nsp")
        tail = msgpack.packb({"rooms": ["r"]})
        return wire.parse_broadcast(
            head + msgpack.packb("/axr") + msgpack.packb("data") + data + tail, "/axr"
        )

    with pytest.raises(UnusableEmit):  # no type
        emit(old_date)
    values = wire._msgpack(b"\x93" + old_date + new_date + undefined)
    assert [wire._in_list(each) for each in values] == [iso, iso, None]
    assert wire._plain(wire._msgpack(b"\x81\xa1u" + undefined)) == {}
    assert wire._in_list(wire._msgpack(b"\x91" + undefined)) == [None]
    far = (2**62).to_bytes(8, "big")
    assert wire._in_list(wire._msgpack(b"\xd7\x00" + far)) is None


def test_flags_except_and_rooms_that_are_numbers() -> None:
    opts = {"rooms": ["a", 5, "a"], "flags": {"volatile": True}, "except": ["z"]}
    emit = wire.parse_broadcast(packed("m", b"\1", opts=opts), "/axr")
    assert emit == Emit(name="m", args=(b"\1",), rooms=("a", "5"), without=("z",), volatile=True)


@pytest.mark.parametrize(
    ("text", "control"),
    [
        ('{"type":2,"opts":{"rooms":[],"except":[]},"rooms":["newroom"]}',
         Control(action="join", names=("newroom",))),
        ('{"type":3,"opts":{"rooms":["allusers"],"except":["z"]},"rooms":["a"]}',
         Control(action="leave", rooms=("allusers",), without=("z",), names=("a",))),
        ('{"type":4,"opts":{"rooms":["user-1"],"except":[]},"close":true}',
         Control(action="disconnect", rooms=("user-1",))),
        ('{"uid":"emitter","type":6,"data":["hello","world",1]}', None),
        # socket.io-redis 5.4: 2 is allRooms, 3 remoteJoin.
        ('{"type":2,"requestid":"x"}', None),
        ('{"type":3,"requestid":"x","sid":"y","room":"z"}', None),
        ('{"type":[]}', None),
    ],
)  # fmt: skip
def test_captured_control_messages(text: str, control: Control | None) -> None:
    assert wire.parse_request(text.encode()) == control


def test_captured_entries_of_the_streams_emitter() -> None:
    text = (
        b'{"packet":{"type":2,"data":["msg","from server",{"n":1}]},'
        b'"opts":{"rooms":["allusers"],"except":[],"flags":{}}}'
    )
    fields = {b"uid": b"emitter", b"nsp": b"/axr", b"type": b"3", b"data": text}
    expected = Emit(name="msg", args=("from server", {"n": 1}), rooms=("allusers",))
    assert wire.parse_entry(fields, "/axr") == expected
    assert wire.parse_entry(fields, "/other") is None
    assert wire.parse_entry({**fields, b"type": b"2"}, "/axr") is None
    assert wire.parse_entry({b"uid": b"x"}, "/axr") is None
    binary = (
        b"gqZwYWNrZXSCpHR5cGUCpGRhdGGSo2JpbsQCAQKkb3B0c4Olcm9vbXORqGFsbHVzZXJzpmV4Y2VwdJClZmxhZ3OA"
    )
    assert wire.parse_entry({**fields, b"data": binary}, "/axr") == Emit(
        name="bin", args=(b"\1\2",), rooms=("allusers",)
    )
    join = b'{"opts":{"rooms":["user-1"],"except":[],"flags":{}},"rooms":["x"]}'
    assert wire.parse_entry({**fields, b"type": b"4", b"data": join}, "/axr") == Control(
        action="join", rooms=("user-1",), names=("x",)
    )


@pytest.mark.parametrize("name", ["connect", "disconnect", "connect_error", "newListener"])
def test_event_names_that_clients_emit_themselves_are_unusable(name: str) -> None:
    with pytest.raises(UnusableEmit, match="reserved"):
        wire.parse_broadcast(packed(name), "/axr")


@given(st.binary())
def test_any_bytes_are_an_emit_or_unusable(payload: bytes) -> None:
    with contextlib.suppress(UnusableEmit):
        wire.parse_broadcast(payload, "/axr")
    with contextlib.suppress(UnusableEmit):
        wire.parse_request(payload)
    with contextlib.suppress(UnusableEmit):
        wire.parse_entry({b"nsp": b"/axr", b"type": b"3", b"data": payload}, "/axr")


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text() | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(0, 9), inner)
    ),
    max_leaves=8,
)


@given(anything, anything)
def test_any_message_of_the_right_form_is_an_emit_or_unusable(packet: Any, opts: Any) -> None:
    try:
        payload = msgpack.packb(["emitter", packet, opts])
    except UnicodeEncodeError:
        return
    with contextlib.suppress(UnusableEmit):
        wire.parse_broadcast(payload, "/axr")


def test_channels_escape_what_redis_would_read_as_a_pattern() -> None:
    pattern, start, requests = wire.channels("socket.io", "/a*[x]")
    assert pattern == b"socket.io#/a\\*\\[x\\]#*"
    assert start == b"socket.io#/a*[x]#"
    assert requests == b"socket.io-request#/a*[x]#"


def test_fixture_bytes_are_what_they_say() -> None:
    assert msgpack.unpackb(NEW)[2] == {"rooms": ["allusers"], "flags": {}, "except": []}
    assert orjson.loads(base64.b64decode(base64.b64encode(b"1"))) == 1
