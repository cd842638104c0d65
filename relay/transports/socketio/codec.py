"""Socket.IO packets, protocols 4 (over Engine.IO 3) and 5 (over Engine.IO 4). Pure.

    <type>[<attachments>-][<namespace>,][<ack id>][<JSON>]

Both write packets alike; they differ in what a CONNECT and its refusal hold. Binary arguments
travel as messages of their own after the packet, with `{"_placeholder":true,"num":n}` in their
place (docs of socket.io-protocol, revisions 4 and 5; captures of real clients).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from relay.transports.engineio.packets import MESSAGE, Malformed, Packet, frame

CONNECT, DISCONNECT, EVENT, ACK, ERROR, BINARY_EVENT, BINARY_ACK = range(7)
# What the JS client itself fires (socket.io-parser, RESERVED_EVENTS; component-emitter): a packet
# with one of these names makes a 4.x client close with "parse error" and a 3.x client believe it.
RESERVED_EVENTS = frozenset(
    {"connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener"}
)
_BINARY = frozenset({BINARY_EVENT, BINARY_ACK})
_ATTACHMENTS = 64
_ID_DIGITS = 18


class Decoded(NamedTuple):
    """A packet as received. `query` is what a 2.x client repeats behind a CONNECT's namespace."""

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
    """The text of one packet; `payload` is JSON text or nothing."""
    head = b"%d" % kind
    if attachments:
        head += b"%d-" % attachments
    if namespace != "/":
        head += namespace.encode() + b","
    if id is not None:
        head += b"%d" % id
    return head + payload


def frames(text: bytes, attachments: Sequence[bytes], version: int) -> bytes:
    """A packet and its attachments as websocket frames of Engine.IO `version`."""
    data = frame(Packet(MESSAGE, text), version)
    for each in attachments:
        data += frame(Packet(MESSAGE, each, True), version)
    return data


def deconstruct(value: object) -> tuple[bytes, list[bytes]]:
    """`value` as JSON with placeholders, and its binary parts in their order.

    ValueError where it is not made of what JSON and bytes can say.
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
    """The packet in a text message; Malformed. Binary ones lack their attachments yet."""
    kind = text[0] - 0x30 if text else -1
    if not CONNECT <= kind <= BINARY_ACK:
        raise Malformed("not a Socket.IO packet")
    at, attachments = 1, 0
    if kind in _BINARY:
        digits, dash, _ = text[1:12].partition(b"-")
        if not (dash and digits.isdigit() and int(digits) <= _ATTACHMENTS):
            raise Malformed("not a number of attachments")
        attachments, at = int(digits), len(digits) + 2
    namespace, query = "/", ""
    if text[at : at + 1] == b"/":
        end = text.find(b",", at)
        end = len(text) if end < 0 else end
        try:
            name = text[at:end].decode()
        except UnicodeDecodeError:  # a websocket frame is checked, a polling body is not
            raise Malformed("a namespace that is not UTF-8") from None
        namespace, _, query = name.partition("?")
        at = end + 1
    end = at
    while end < len(text) and 0x30 <= text[end] <= 0x39:
        end += 1
    if end - at > _ID_DIGITS:
        raise Malformed("an ID of too many digits")
    number = int(text[at:end]) if end > at else None
    data = _json(text[end:]) if end < len(text) else None
    found = Decoded(kind, namespace, number, data, query, attachments)
    _check(found)
    return found


def _json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Malformed("not JSON") from None


def _check(found: Decoded) -> None:
    """What each kind may carry; after socket.io-parser's isPayloadValid."""
    kind, data = found.kind, found.data
    if kind in (EVENT, BINARY_EVENT):
        if not (isinstance(data, list) and data and isinstance(data[0], str)):
            raise Malformed("an event without a name")
    elif kind in (ACK, BINARY_ACK):
        if not isinstance(data, list) or found.id is None:
            raise Malformed("an acknowledgement of nothing")
    elif kind == CONNECT:
        if data is not None and not isinstance(data, dict):
            raise Malformed("a CONNECT's payload is an object")
    elif kind == DISCONNECT and data is not None:
        raise Malformed("a DISCONNECT has no payload")


def reconstruct(data: Any, attachments: Sequence[bytes]) -> Any:
    """`data` with its placeholders replaced; Malformed where one names no attachment."""
    if isinstance(data, list):
        return [reconstruct(each, attachments) for each in data]
    if isinstance(data, dict):
        if data.get("_placeholder") is True:
            number = data.get("num")
            if isinstance(number, bool) or not isinstance(number, int):
                raise Malformed("a placeholder without a number")
            if not 0 <= number < len(attachments):
                raise Malformed("a placeholder of no attachment")
            return attachments[number]
        return {name: reconstruct(each, attachments) for name, each in data.items()}
    return data


class Decoder:
    """Messages of one connection in, whole packets out."""

    __slots__ = ("_attachments", "_waiting")

    def __init__(self) -> None:
        self._waiting: Decoded | None = None
        self._attachments: list[bytes] = []

    def feed(self, data: bytes, *, binary: bool) -> Decoded | None:
        """The packet that this message completes; Malformed."""
        waiting = self._waiting
        if not binary:
            if waiting is not None:
                raise Malformed("an attachment is missing")
            found = decode(data)
            if not found.attachments:
                # Without attachments no placeholder can be filled (kind 5 with `0-` is allowed).
                return found
            self._waiting, self._attachments = found, []
            return None
        if waiting is None:
            raise Malformed("binary data that nothing announced")
        self._attachments.append(data)
        if len(self._attachments) < waiting.attachments:
            return None
        attachments, self._attachments, self._waiting = self._attachments, [], None
        return waiting._replace(data=reconstruct(waiting.data, attachments))
