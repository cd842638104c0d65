"""Engine.IO packets and payloads. Pure functions.

Socket.IO 2 clients use protocol 3, Socket.IO 3 and 4 clients use protocol 4. A packet is one digit
and its data. A WebSocket frame has one packet, a polling body has several. The protocols differ in
the polling body and in the frames of binary data.

Sources: revisions 3 and 4 of engine.io-protocol, and captures of real clients, which
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
# The length before a packet of protocol 3 in a text body, in ASCII and in UTF-16.
_LENGTH, _WIDE_LENGTH = re.compile(rb"([0-9]{1,10}):"), re.compile(rb"((?:[0-9]\0){1,10}):\0")


class Malformed(Exception):
    """The client sent an invalid packet. Its connection is closed."""


class Packet(NamedTuple):
    """One packet. Text is encoded as UTF-8. Only a MESSAGE can be binary."""

    kind: int
    data: bytes = b""
    binary: bool = False


# ---- websocket frames ------------------------------------------------------------------------


def frame(packet: Packet, version: int) -> bytes:
    """Encode one packet as a WebSocket frame, which all clients of this protocol version share."""
    if not packet.binary:
        return frame_text(b"%d" % packet.kind + packet.data)
    # Protocol 3 puts the packet's kind before the bytes (`04` + bytes), protocol 4 omits it.
    return frame_binary(bytes((packet.kind,)) + packet.data if version == 3 else packet.data)


def from_text(text: bytes) -> Packet:
    """Decode the packet of a text frame. Raise Malformed if it is invalid."""
    kind = text[0] - 0x30 if text else -1
    if not 0 <= kind <= NOOP:
        raise Malformed("not an Engine.IO packet")
    return Packet(kind, text[1:])


def from_binary(data: bytes, version: int) -> Packet:
    """Decode the packet of a binary frame. Raise Malformed if it is invalid."""
    if version != 3:
        return Packet(MESSAGE, data, True)
    if not data or data[0] > NOOP:
        raise Malformed("not an Engine.IO packet")
    return Packet(data[0], data[1:], True)


def unframe(frames: bytes, version: int) -> list[Packet]:
    """Decode WebSocket frames that `frame` has encoded, to send their packets over polling."""
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


# ---- polling bodies --------------------------------------------------------------------------


class Body(NamedTuple):
    """Body of a polling response. `binary` selects the content type application/octet-stream."""

    data: bytes
    binary: bool = False


def encode_payload(packets: Sequence[Packet], version: int, *, base64_only: bool) -> Body:
    """Encode the body of a polling response.

    `base64_only`: the client has requested text only (b64=1).
    """
    if version == 4:
        return Body(_SEPARATOR.join(_text_form(packet, 4) for packet in packets))
    if not base64_only and any(packet.binary for packet in packets):
        return Body(b"".join(map(_binary_form, packets)), binary=True)
    return Body(b"".join(_with_length(_text_form(packet, 3)) for packet in packets))


def decode_payload(body: bytes, version: int, *, binary: bool) -> list[Packet]:
    """Return the packets of a POST's body.

    Args:
        binary: The body's content type is application/octet-stream.

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
            raise Malformed("a packet is shorter than its length")
        packet = units[at:end]
        if width == 2:
            try:
                packet = packet.decode("utf-16-le").encode()
            except UnicodeError:
                raise Malformed("a packet ends within a character") from None
        yield _from_text_form(packet, 3)
        at = end


def _binary_form(packet: Packet) -> bytes:
    """Encode 00 (text) or 01 (binary), the length as one byte per digit, FF, and the packet."""
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
            raise Malformed("a packet is shorter than its length")
        yield from_binary(data, 3) if body[at] else from_text(data)
        at = mark + 1 + size


# ---- JSONP, for browsers without CORS --------------------------------------------------------

_SLASHES = re.compile(rb"(\\)?\\n")


def jsonp_answer(index: int, body: bytes) -> bytes:
    """Return a script that passes `body` to the page's callback number `index`."""
    # In older JavaScript, U+2028 and U+2029 end a line even within a string.
    text = orjson.dumps(body.decode()).replace(b"\xe2\x80\xa8", b"\\u2028")
    return b"___eio[%d](%b);" % (index, text.replace(b"\xe2\x80\xa9", b"\\u2029"))


def jsonp_body(field: bytes) -> bytes:
    r"""Return the body in a form's field `d`.

    Forms convert line breaks to CRLF. The client therefore sends a line break as `\\n` and these
    two characters as `\\\\n` (engine.io-client, polling-jsonp.js).
    """
    unescaped = _SLASHES.sub(lambda found: found[0] if found[1] else b"\n", field)
    return unescaped.replace(b"\\\\n", b"\\n")
