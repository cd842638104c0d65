"""Engine.IO bodies and frames: captures of real clients and servers, and round trips."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.transports.engineio import packets
from relay.transports.engineio.packets import (
    MESSAGE,
    Body,
    Malformed,
    Packet,
    decode_payload,
    encode_payload,
    frame,
    jsonp_answer,
    jsonp_body,
    unframe,
)

BIN_EVENT = b'51-/axr,["bin",{"_placeholder":true,"num":0}]'
BYTES = bytes((1, 2, 0xFF))

texts = st.text(st.characters(codec="utf-8", exclude_characters="\x1e")).map(str.encode)
any_packets = st.one_of(
    st.tuples(st.integers(0, 6), texts).map(lambda pair: Packet(*pair)),
    st.binary().map(lambda data: Packet(MESSAGE, data, True)),
)


# ---- captured: socket.io-client 2.5.0, 3.1.3 and 4.8.4 against socket.io 4.8.4 ------------------


def test_protocol_3_counts_characters_and_allows_two_packets_in_the_open_response() -> None:
    opened = Packet(packets.OPEN, b'{"sid":"x"}')
    body = encode_payload([opened, Packet(MESSAGE, b"0")], 3, base64_only=True)
    assert body == Body(b'12:0{"sid":"x"}2:40')


def test_protocol_3_with_b64_writes_binary_data_as_base64_with_its_type() -> None:
    both = [Packet(MESSAGE, BIN_EVENT), Packet(MESSAGE, BYTES, True)]
    assert encode_payload(both, 3, base64_only=True) == Body(
        b'46:451-/axr,["bin",{"_placeholder":true,"num":0}]6:b4AQL/'
    )


def test_protocol_3_without_b64_sends_binary_data_as_an_octet_stream() -> None:
    both = [Packet(MESSAGE, BIN_EVENT), Packet(MESSAGE, BYTES, True)]
    body = encode_payload(both, 3, base64_only=False)
    assert body.binary
    assert body.data == b"\x00\x04\x06\xff4" + BIN_EVENT + bytes.fromhex("0104ff040102ff")
    assert decode_payload(body.data, 3, binary=True) == both
    text = encode_payload([Packet(MESSAGE, b"0")], 3, base64_only=False)
    assert text == Body(b"2:40")


def test_protocol_4_joins_packets_with_a_record_separator() -> None:
    both = [Packet(MESSAGE, BIN_EVENT), Packet(MESSAGE, BYTES, True)]
    body = encode_payload(both, 4, base64_only=False)
    assert body == Body(b"4" + BIN_EVENT + b"\x1ebAQL/")
    assert decode_payload(body.data, 4, binary=False) == both


def test_binary_frames_of_protocol_3_begin_with_the_packet_s_type() -> None:
    assert frame(Packet(MESSAGE, BYTES, True), 3) == b"\x82\x04\x04\x01\x02\xff"
    assert frame(Packet(MESSAGE, BYTES, True), 4) == b"\x82\x03\x01\x02\xff"


@pytest.mark.parametrize("version", [3, 4])
def test_heartbeats_and_the_upgrade_are_the_same_in_both(version: int) -> None:
    for text, packet in {
        b"2": Packet(packets.PING),
        b"3": Packet(packets.PONG),
        b"2probe": Packet(packets.PING, b"probe"),
        b"3probe": Packet(packets.PONG, b"probe"),
        b"5": Packet(packets.UPGRADE),
        b"6": Packet(packets.NOOP),
    }.items():
        assert packets.from_text(text) == packet
        assert frame(packet, version) == bytes((0x81, len(text))) + text


def test_lengths_of_protocol_3_count_utf_16_units() -> None:
    smile = Packet(MESSAGE, '2["😀ü"]'.encode())
    body = encode_payload([smile, Packet(MESSAGE, b"x")], 3, base64_only=True)
    assert body.data == '9:42["😀ü"]2:4x'.encode()
    assert decode_payload(body.data, 3, binary=False) == [smile, Packet(MESSAGE, b"x")]


def test_jsonp_responses_are_scripts_without_line_breaks() -> None:
    answer = jsonp_answer(0, '2:4"\u2028\n'.encode())
    assert answer == b'___eio[0]("2:4\\"\\u2028\\n");'


def test_line_breaks_in_jsonp_bodies_are_escaped() -> None:
    # engine.io-client 3.5 escapes a line break as `\n`, and a literal `\n` as `\\n`.
    assert jsonp_body(rb"5:4a\nb") == b"5:4a\nb"
    assert jsonp_body(rb"6:4a\\nb") == rb"6:4a\nb"


# ---- whatever comes --------------------------------------------------------------------------


@given(st.lists(any_packets, min_size=1), st.sampled_from([3, 4]), st.booleans())
def test_decoding_a_body_returns_its_packets(
    sent: list[Packet], version: int, base64_only: bool
) -> None:
    body = encode_payload(sent, version, base64_only=base64_only)
    assert decode_payload(body.data, version, binary=body.binary) == sent


@given(st.lists(any_packets), st.sampled_from([3, 4]))
def test_decoding_frames_returns_their_packets(sent: list[Packet], version: int) -> None:
    assert unframe(b"".join(frame(packet, version) for packet in sent), version) == sent


@pytest.mark.parametrize("size", [125, 126, 65535, 65536])
def test_frames_of_every_length_encoding_are_decoded(size: int) -> None:
    packet = Packet(MESSAGE, b"x" * (size - 1))
    assert unframe(frame(packet, 4) + frame(Packet(6), 4), 4) == [packet, Packet(6)]


@given(st.binary(), st.sampled_from([3, 4]), st.booleans())
def test_random_bytes_raise_only_malformed(body: bytes, version: int, binary: bool) -> None:
    try:
        found = decode_payload(body, version, binary=binary)
    except Malformed:
        return
    assert all(isinstance(packet, Packet) for packet in found)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"4:4",
        b":",
        b"x:4",
        b"0:",
        b"-1:4",
        b"999999999999:4",
        b"1:9",
        "²:40".encode(),
        b"3:b4*",
    ],
)
def test_malformed_protocol_3_bodies(body: bytes) -> None:
    if not body:
        assert decode_payload(body, 3, binary=False) == []
        return
    with pytest.raises(Malformed):
        decode_payload(body, 3, binary=False)


@pytest.mark.parametrize("body", [b"", b"7", b"\x1e", b"4a\x1e", b"b*"])
def test_malformed_protocol_4_bodies(body: bytes) -> None:
    with pytest.raises(Malformed):
        decode_payload(body, 4, binary=False)


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("binary", [False, True])
def test_a_body_has_a_limited_number_of_packets(version: int, binary: bool) -> None:
    most = [Packet(MESSAGE, b"x", binary)] * packets.MAX_PACKETS
    body = encode_payload(most, version, base64_only=False)
    assert len(decode_payload(body.data, version, binary=body.binary)) == packets.MAX_PACKETS
    body = encode_payload([*most, most[0]], version, base64_only=False)
    with pytest.raises(Malformed):
        decode_payload(body.data, version, binary=body.binary)
