"""Engine.IO packets and payloads, protocols 3 (clients of Socket.IO 2) and 4 (3 and 4). Pure.

A packet is one digit and its data; over websocket it is one frame, over polling several share a
body. The protocols differ in that body and in the frames of binary data; the rest is the same.
Facts: docs of engine.io-protocol at revisions 3 and 4, and captures of real clients, which
tests/unit/transports/engineio repeats.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import orjson

from relay.transports.socket.websocket import frame_binary, frame_text

OPEN, CLOSE, PING, PONG, MESSAGE, UPGRADE, NOOP = range(7)
# Engine.IO has no limit on the packets of one body. A megabyte of empty packets would hold the
# event loop for a second; real clients send a few at a time (python-engineio accepts 16).
MAX_PACKETS = 1000
_SEPARATOR = b"\x1e"
# How a packet of protocol 3 begins in a text body, in ASCII and in UTF-16.
_LENGTH, _WIDE_LENGTH = re.compile(rb"([0-9]{1,10}):"), re.compile(rb"((?:[0-9]\0){1,10}):\0")


class Malformed(Exception):
    """The client's bytes are no packet of its protocol; its connection is closed."""


class Packet(NamedTuple):
    """One packet; text is UTF-8. Only a MESSAGE can be binary."""

    kind: int
    data: bytes = b""
    binary: bool = False


# ---- websocket frames ------------------------------------------------------------------------


def frame(packet: Packet, version: int) -> bytes:
    """The whole websocket frame of one packet, the same bytes for every client."""
    if not packet.binary:
        return frame_text(b"%d" % packet.kind + packet.data)
    # Protocol 3 says with a byte that it is a message (`04` + bytes), 4 sends the bytes alone.
    return frame_binary(bytes((packet.kind,)) + packet.data if version == 3 else packet.data)


def from_text(text: bytes) -> Packet:
    """The packet of a text frame; Malformed."""
    kind = text[0] - 0x30 if text else -1
    if not 0 <= kind <= NOOP:
        raise Malformed("not an Engine.IO packet")
    return Packet(kind, text[1:])


def from_binary(data: bytes, version: int) -> Packet:
    """The packet of a binary frame; Malformed."""
    if version != 3:
        return Packet(MESSAGE, data, True)
    if not data or data[0] > NOOP:
        raise Malformed("not an Engine.IO packet")
    return Packet(data[0], data[1:], True)


def unframe(frames: bytes, version: int) -> list[Packet]:
    """The packets of websocket frames that `frame` made: polling sends the same ones."""
    packets = []
    at, end = 0, len(frames)
    while at < end:
        size = frames[at + 1]
        binary = frames[at] & 0x0F == 2
        at += 2
        if size == 126:
            size, at = int.from_bytes(frames[at : at + 2], "big"), at + 2
        elif size == 127:
            size, at = int.from_bytes(frames[at : at + 8], "big"), at + 8
        data = frames[at : at + size]
        packets.append(from_binary(data, version) if binary else from_text(data))
        at += size
    return packets


# ---- bodies of polling -----------------------------------------------------------------------


class Body(NamedTuple):
    """A polling answer's body; `binary` chooses its content type."""

    data: bytes
    binary: bool = False


def encode_payload(packets: Sequence[Packet], version: int, *, base64_only: bool) -> Body:
    """The body of a polling answer. `base64_only`: the client asked for b64=1."""
    if version == 4:
        return Body(_SEPARATOR.join(_text_form(packet, 4) for packet in packets))
    if not base64_only and any(packet.binary for packet in packets):
        return Body(b"".join(map(_binary_form, packets)), binary=True)
    return Body(b"".join(_with_length(_text_form(packet, 3)) for packet in packets))


def decode_payload(body: bytes, version: int, *, binary: bool) -> list[Packet]:
    """Return the packets of a POST's body.

    Args:
        binary: The body came as application/octet-stream.

    Raises:
        Malformed: The body is not a payload of this protocol, or has more than `MAX_PACKETS`.
    """
    if version == 4:
        if body.count(_SEPARATOR) >= MAX_PACKETS:
            raise Malformed("too many packets in one body")
        return [_from_text_form(part, 4) for part in body.split(_SEPARATOR)]
    packets: list[Packet] = []
    for packet in _decode_binary(body) if binary else _decode_lengths(body):
        if len(packets) >= MAX_PACKETS:
            raise Malformed("too many packets in one body")
        packets.append(packet)
    return packets


def _text_form(packet: Packet, version: int) -> bytes:
    if not packet.binary:
        return b"%d" % packet.kind + packet.data
    kind = b"b%d" % packet.kind if version == 3 else b"b"
    return kind + base64.b64encode(packet.data)


def _from_text_form(text: bytes, version: int) -> Packet:
    if text[:1] != b"b":
        return from_text(text)
    try:
        if version == 4:
            return Packet(MESSAGE, base64.b64decode(text[1:], validate=True), True)
        return Packet(from_text(text[1:2]).kind, base64.b64decode(text[2:], validate=True), True)
    except binascii.Error:
        raise Malformed("not base64") from None


def _utf16_units(text: str) -> int:
    # JavaScript counts characters beyond the basic plane twice.
    return len(text.encode("utf-16-le")) // 2


def _with_length(packet: bytes) -> bytes:
    count = len(packet) if packet.isascii() else _utf16_units(packet.decode())
    return b"%d:" % count + packet


def _decode_lengths(body: bytes) -> Iterable[Packet]:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise Malformed("not UTF-8") from None
    # Lengths count UTF-16 units. In ASCII text these are its bytes.
    width = 1 if text.isascii() else 2
    units = body if width == 1 else text.encode("utf-16-le")
    length = _LENGTH if width == 1 else _WIDE_LENGTH
    at, size = 0, len(units)
    while at < size:
        found = length.match(units, at)
        if found is None:
            raise Malformed("a packet's length is missing")
        digits, at = found[1][::width], found.end()
        end = at + int(digits) * width
        if end > size or end == at:
            raise Malformed("a packet is shorter than it says")
        packet = units[at:end]
        if width == 2:
            try:
                packet = packet.decode("utf-16-le").encode()
            except UnicodeError:
                raise Malformed("a packet's length cuts a character") from None
        yield _from_text_form(packet, 3)
        at = end


def _binary_form(packet: Packet) -> bytes:
    """00 or 01, the length's decimal digits as a byte each, FF, the packet."""
    data = (
        bytes((packet.kind,)) + packet.data if packet.binary else b"%d" % packet.kind + packet.data
    )
    digits = bytes(digit - 0x30 for digit in b"%d" % len(data))
    return bytes((packet.binary,)) + digits + b"\xff" + data


def _decode_binary(body: bytes) -> Iterable[Packet]:
    at = 0
    while at < len(body):
        mark = body.find(b"\xff", at, at + 12)
        digits = body[at + 1 : mark] if mark > 0 else b""
        if body[at] > 1 or not digits or max(digits) > 9:
            raise Malformed("a packet's length is missing")
        size = int("".join(map(str, digits)))
        data = body[mark + 1 : mark + 1 + size]
        if not size or len(data) < size:
            raise Malformed("a packet is shorter than it says")
        yield from_binary(data, 3) if body[at] else from_text(data)
        at = mark + 1 + size


# ---- JSONP, for browsers without CORS --------------------------------------------------------

_SLASHES = re.compile(rb"(\\)?\\n")


def jsonp_answer(index: int, body: bytes) -> bytes:
    """A script that hands `body` to the page's callback number `index`."""
    # U+2028 and U+2029 end a line in older JavaScript, also within a string.
    text = orjson.dumps(body.decode()).replace(b"\xe2\x80\xa8", b"\\u2028")
    return b"___eio[%d](%b);" % (index, text.replace(b"\xe2\x80\xa9", b"\\u2029"))


def jsonp_body(field: bytes) -> bytes:
    r"""The body in a form's field `d`: a form would turn line ends into CRLF, so the client sends
    `\\n` for one and `\\\\n` for those two characters (engine.io-client, polling-jsonp.js)."""
    unescaped = _SLASHES.sub(lambda found: found[0] if found[1] else b"\n", field)
    return unescaped.replace(b"\\\\n", b"\\n")
