"""Socket.IO packets of protocols 4 (over Engine.IO 3) and 5 (over Engine.IO 4). Pure functions.

    <type>[<attachments>-][<namespace>,][<ack id>][<JSON>]

The protocols differ only in the payloads of CONNECT and CONNECT_ERROR. Binary arguments follow the
packet as separate messages and are replaced by `{"_placeholder":true,"num":n}` in its JSON.
Sources: socket.io-protocol, revisions 4 and 5, and captures of real clients.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from relay.transports.engineio.packets import MESSAGE, Malformed, Packet, frame

CONNECT, DISCONNECT, EVENT, ACK, ERROR, BINARY_EVENT, BINARY_ACK = range(7)
_BINARY = frozenset({BINARY_EVENT, BINARY_ACK})
# The default of current versions of socket.io-parser (4.2.7 and 3.3.6).
MAX_ATTACHMENTS = 10
# No protocol here has larger events or tokens. Parsing JSON takes up to 0.2 ms per kilobyte.
_JSON_BYTES = 65_536
_ID_DIGITS = 18
_PLACEHOLDER = re.compile(rb'"_placeholder":\s*true\s*,\s*"num":\s*([^\s,}]*)')


class Decoded(NamedTuple):
    """A received packet.

    `query` is the query string that a 2.x client appends to the namespace in CONNECT. Binary
    arguments are represented by their placeholders. `data` is None if the payload is too large to
    be parsed.
    """

    kind: int
    namespace: str = "/"
    id: int | None = None
    data: Any = None
    query: str = ""
    attachments: int = 0


def packet(
    kind: int,
    namespace: str,
    payload: bytes = b"",
    *,
    id: int | None = None,
    attachments: int = 0,
) -> bytes:
    """Encode one packet. `payload` is JSON text, or empty."""
    head = b"%d" % kind
    if attachments:
        head += b"%d-" % attachments
    if namespace != "/":
        head += namespace.encode() + b","
    if id is not None:
        head += b"%d" % id
    return head + payload


def frames(text: bytes, attachments: Sequence[bytes], version: int) -> bytes:
    """Encode a packet and its attachments as WebSocket frames of Engine.IO `version`."""
    data = frame(Packet(MESSAGE, text), version)
    for each in attachments:
        data += frame(Packet(MESSAGE, each, True), version)
    return data


def deconstruct(value: object) -> tuple[bytes, list[bytes]]:
    """Return `value` as JSON with placeholders, and its binary parts in order.

    Raises:
        ValueError: The value contains something other than JSON types and bytes.
    """
    attachments: list[bytes] = []

    def take(part: object) -> object:
        if isinstance(part, bytes | bytearray | memoryview):
            attachments.append(bytes(part))
            return {"_placeholder": True, "num": len(attachments) - 1}
        raise TypeError(f"{type(part).__name__} is not JSON")

    try:
        return orjson.dumps(value, default=take), attachments
    except orjson.JSONEncodeError as exc:
        raise ValueError(str(exc)) from exc


def decode(text: bytes) -> Decoded:
    """Return the packet in a text message; its attachments follow. Raises Malformed."""
    kind = text[0] - 0x30 if text else -1
    if not CONNECT <= kind <= BINARY_ACK:
        raise Malformed("not a Socket.IO packet")
    at, attachments = 1, 0
    if kind in _BINARY:
        digits, dash, _ = text[1:12].partition(b"-")
        if not (dash and digits.isdigit()):
            raise Malformed("not a number of attachments")
        attachments, at = int(digits), len(digits) + 2
        if attachments > MAX_ATTACHMENTS:
            raise Malformed(f"more than {MAX_ATTACHMENTS} attachments")
    namespace, query = "/", ""
    if text[at : at + 1] == b"/":
        end = text.find(b",", at)
        end = len(text) if end < 0 else end
        try:
            name = text[at:end].decode()
        except UnicodeDecodeError:  # WebSocket text was validated, polling bodies were not
            raise Malformed("the namespace is not UTF-8") from None
        namespace, _, query = name.partition("?")
        at = end + 1
    end = at
    while end < len(text) and 0x30 <= text[end] <= 0x39:
        end += 1
    if end - at > _ID_DIGITS:
        raise Malformed("the ID has too many digits")
    number = int(text[at:end]) if end > at else None
    found = Decoded(kind, namespace, number, None, query, attachments)
    if len(text) - end > _JSON_BYTES:
        if kind not in (EVENT, ACK, BINARY_EVENT, BINARY_ACK):
            raise Malformed(f"more than {_JSON_BYTES} bytes")
        return found
    payload = text[end:]
    if payload:
        found = found._replace(data=_json(payload))
    if attachments:
        _check_placeholders(payload, attachments)
    _check(found)
    return found


def _check_placeholders(payload: bytes, attachments: int) -> None:
    for number in _PLACEHOLDER.findall(payload):
        if not (number.isdigit() and int(number[:9]) < attachments):
            raise Malformed("a placeholder without an attachment")


def _json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Malformed("not JSON") from None


def _check(found: Decoded) -> None:
    """Check the payload of each kind of packet (socket.io-parser, isPayloadValid)."""
    kind, data = found.kind, found.data
    if kind in (EVENT, BINARY_EVENT):
        if not (isinstance(data, list) and data and isinstance(data[0], str)):
            raise Malformed("an event without a name")
    elif kind in (ACK, BINARY_ACK):
        if not isinstance(data, list) or found.id is None:
            raise Malformed("an acknowledgement without an ID")
    elif kind == CONNECT:
        if data is not None and not isinstance(data, dict):
            raise Malformed("the payload of CONNECT must be an object")
    elif kind == DISCONNECT and data is not None:
        raise Malformed("DISCONNECT must not have a payload")


class Decoder:
    """Turns the messages of one connection into packets.

    No protocol uses binary arguments of clients, so attachments are counted and discarded. Clients
    cannot fill the memory with them.
    """

    __slots__ = ("_missing", "_waiting")

    def __init__(self) -> None:
        self._waiting: Decoded | None = None
        self._missing = 0

    def feed(self, data: bytes, *, binary: bool) -> Decoded | None:
        """Return the packet that this message completes. Raises Malformed."""
        waiting = self._waiting
        if not binary:
            if waiting is not None:
                raise Malformed("an attachment is missing")
            found = decode(data)
            if not found.attachments:
                return found
            self._waiting, self._missing = found, found.attachments
            return None
        if waiting is None:
            raise Malformed("binary data without a packet that announces it")
        self._missing -= 1
        if self._missing:
            return None
        self._waiting = None
        return waiting
