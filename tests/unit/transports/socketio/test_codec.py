"""Socket.IO packets: captures of real clients and servers, and round trips."""

from __future__ import annotations

import sys
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.transports.engineio.packets import Malformed
from relay.transports.socketio import codec
from relay.transports.socketio.codec import Decoded, Decoder, decode, deconstruct, packet

PLACE = b'{"_placeholder":true,"num":0}'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"0/axr?token=good,", Decoded(codec.CONNECT, "/axr", query="token=good")),
        (b'0/axr,{"token":"good"}', Decoded(codec.CONNECT, "/axr", data={"token": "good"})),
        (b"0", Decoded(codec.CONNECT)),
        (b"0/axr", Decoded(codec.CONNECT, "/axr")),
        (b'2/axr,0["echo",{"x":1}]', Decoded(codec.EVENT, "/axr", 0, ["echo", {"x": 1}])),
        (b'2["m"]', Decoded(codec.EVENT, data=["m"])),
        (b'2/axr,["a,b",1]', Decoded(codec.EVENT, "/axr", data=["a,b", 1])),
        (b'3/axr,0[{"x":1}]', Decoded(codec.ACK, "/axr", 0, [{"x": 1}])),
        (b"1/axr,", Decoded(codec.DISCONNECT, "/axr")),
    ],
)
def test_packets_of_real_clients(text: bytes, found: Decoded) -> None:
    assert decode(text) == found


def test_packets_of_the_real_server() -> None:
    assert packet(codec.CONNECT, "/axr") == b"0/axr,"
    assert packet(codec.CONNECT, "/") == b"0"
    assert packet(codec.EVENT, "/axr", b'["msg",1]') == b'2/axr,["msg",1]'
    assert packet(codec.ACK, "/axr", b'[{"x":1}]', id=0) == b'3/axr,0[{"x":1}]'
    assert packet(codec.ERROR, "/nope", b'{"message":"Invalid namespace"}') == (
        b'4/nope,{"message":"Invalid namespace"}'
    )
    text = packet(codec.BINARY_EVENT, "/axr", b'["bin",' + PLACE + b"]", attachments=1)
    assert text == b'51-/axr,["bin",{"_placeholder":true,"num":0}]'
    assert codec.frames(text, [b"\x01\x02\xff"], 3).endswith(b"\x82\x04\x04\x01\x02\xff")
    assert codec.frames(text, [b"\x01\x02\xff"], 4).endswith(b"\x82\x03\x01\x02\xff")


def test_binary_events_wait_for_their_attachments() -> None:
    decoder = Decoder()
    text = b'52-/axr,["bin",' + PLACE + b',{"deep":[{"_placeholder":true,"num":1}]}]'
    assert decoder.feed(text, binary=False) is None
    assert decoder.feed(b"\x01", binary=True) is None
    found = decoder.feed(b"\x02", binary=True)
    assert found is not None
    assert found.data[0] == "bin"
    assert decoder.feed(b'2["m"]', binary=False) == Decoded(codec.EVENT, data=["m"])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"9",
        b"x",
        b"2",
        b"2{}",
        b"2[]",
        b"2[1]",
        b'2/axr["m"]',
        b"2nonsense",
        b"3[1]",
        b"30",
        b"0[]",
        b"1{}",
        b'5["m"]',
        b"5-[]",
        b'599999-["m"]',
        b"2\xff",
        b"0/\xff,",
        b"2" + b"9" * 30 + b'["m"]',
    ],
)
def test_garbage_is_malformed(text: bytes) -> None:
    with pytest.raises(Malformed):
        decode(text)


@pytest.mark.parametrize(
    "steps",
    [
        [(b"\x01", True)],
        [(b'51-["m"]', False), (b'2["m"]', False)],
        [(b'51-["m",{"_placeholder":true,"num":1}]', False), (b"\x01", True)],
        [(b'51-["m",{"_placeholder":true,"num":"0"}]', False), (b"\x01", True)],
        [(b'51-["m",{"_placeholder":true,"num":true}]', False), (b"\x01", True)],
    ],
)
def test_attachments_that_do_not_match_their_placeholders_are_malformed(
    steps: list[tuple[bytes, bool]],
) -> None:
    decoder = Decoder()

    def feed() -> None:
        for data, binary in steps:
            assert decoder.feed(data, binary=binary) is None

    with pytest.raises(Malformed):
        feed()


def test_more_attachments_than_clients_accept_are_malformed() -> None:
    assert Decoder().feed(b'510-["m"]', binary=False) is None
    with pytest.raises(Malformed):
        Decoder().feed(b'511-["m"]', binary=False)


def test_attachments_are_not_kept_in_memory() -> None:
    class Attachment(bytes):
        """Bytes that can be observed."""

    decoder = Decoder()
    decoder.feed(b'52-["m"]', binary=False)
    data = Attachment(b"x" * 1000)
    held = sys.getrefcount(data)
    decoder.feed(data, binary=True)
    assert sys.getrefcount(data) == held


def test_large_payloads_are_not_parsed() -> None:
    deep = b"[" * 500 + b"]" * 500
    large = b'2["m",' + b",".join([deep] * 200) + b"]"
    assert decode(large) == Decoded(codec.EVENT)
    with pytest.raises(Malformed):
        decode(b'0{"token":"' + b"x" * 65_536 + b'"}')
    with pytest.raises(Malformed, match="JSON"):
        decode(b'2["m",' + b"[" * 1100 + b"]" * 1100 + b"]")


def filled(value: Any, parts: list[bytes]) -> Any:
    """Decode a packet and its attachments as a client does."""
    if isinstance(value, list):
        return [filled(each, parts) for each in value]
    if isinstance(value, dict):
        if value.get("_placeholder") is True:
            return parts[value["num"]]
        return {name: filled(each, parts) for name, each in value.items()}
    return value


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(codec="utf-8"))
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(codec="utf-8")).filter(lambda name: name != "_placeholder"),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
names = st.text(st.characters(codec="utf-8"), min_size=1)
namespaces = st.sampled_from(["/", "/axr", "/ä.b-c"])


@given(names, st.lists(json_values, max_size=3), namespaces, st.none() | st.integers(0, 2**50))
def test_events_survive_encoding_and_decoding(
    name: str, args: list[Any], namespace: str, number: int | None
) -> None:
    payload, parts = deconstruct([name, *args])
    if len(parts) > codec.MAX_ATTACHMENTS:
        return
    kind = codec.BINARY_EVENT if parts else codec.EVENT
    decoder = Decoder()
    text = packet(kind, namespace, payload, id=number, attachments=len(parts))
    found = decoder.feed(text, binary=False)
    for part in parts:
        found = decoder.feed(part, binary=True)
    assert found is not None
    assert (found.namespace, found.id) == (namespace, number)
    assert filled(found.data, parts) == [name, *args]


@given(st.binary())
def test_random_bytes_are_a_packet_or_malformed(text: bytes) -> None:
    try:
        found = decode(text)
    except Malformed:
        return
    assert codec.CONNECT <= found.kind <= codec.BINARY_ACK


def test_values_that_json_lacks_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="not JSON"):
        deconstruct(["m", object()])
    assert orjson.loads(deconstruct(["m", float("nan")])[0]) == ["m", None]
