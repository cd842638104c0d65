"""What Socket.IO's emitters write to Redis, read without I/O.

`socket.io-emitter` 3.2 and `@socket.io/redis-emitter` 5.x publish `[uid, packet, opts]` in msgpack
(or JSON, where the 5.x parser was replaced) on `<key>#<namespace>#[<room>#]`, and 5.x control
messages in JSON on `<key>-request#<namespace>#`; the streams emitter appends entries with the
fields uid, nsp, type and data. All captured. What the rooms are is read from the message, never
from the channel's name, where they are not escaped.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgpack
import orjson

from relay.protocols.socketio.entry_format import Emit, UnusableEmit

# Clients fire these themselves. 5.x refuses to emit them, 3.2 does not.
_RESERVED = frozenset(
    {"connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener"}
)
_EVENTS = (2, 5)
# Of @socket.io/redis-emitter 5.x; socket.io-redis 5.x has other meanings for the same numbers, and
# its requests have no `opts`.
_CONTROLS = {2: "join", 3: "leave", 4: "disconnect"}
_STREAM_BROADCAST = 3
_STREAM_CONTROLS = {4: "join", 5: "leave", 6: "disconnect"}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Undefined:
    """JavaScript's: nothing in an object, null in a list."""


_UNDEFINED = _Undefined()


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """Something to do with the sockets in any of `rooms` (all where empty) and in none of
    `without`: put them into `names` or take them out, or end them."""

    what: str
    rooms: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def broadcast(payload: bytes, namespace: str) -> Emit | None:
    """The emit in a message on the broadcast channel; None where it is another namespace's."""
    parts = _json(payload) if payload[:1] == b"[" else _msgpack(payload)
    if not isinstance(parts, list) or len(parts) < 2:
        raise UnusableEmit("not [uid, packet, opts]")
    packet, opts = parts[1], parts[2] if len(parts) > 2 else {}
    if not isinstance(packet, dict) or not isinstance(opts, dict):
        raise UnusableEmit("not [uid, packet, opts]")
    return _emit(packet, opts, namespace)


def request(payload: bytes) -> Control | None:
    """A control message of the 5.x emitter; None for every other kind of request."""
    if payload[:1] != b"{":
        return None
    values = _json(payload)
    if not isinstance(values, dict) or not isinstance(kind := values.get("type"), int):
        return None
    what = _CONTROLS.get(kind)
    if what is None or not isinstance(values.get("opts"), dict):
        return None
    return _control(what, values)


def entry(fields: Mapping[bytes, bytes], namespace: str) -> Emit | Control | None:
    """An entry of the streams emitter or adapter; None where it is none for us."""
    if fields.get(b"nsp", b"").decode(errors="replace") != namespace:
        return None
    kind = fields.get(b"type", b"")
    number = int(kind) if kind.isdigit() and len(kind) < 4 else -1
    if number != _STREAM_BROADCAST and number not in _STREAM_CONTROLS:
        return None
    text = fields.get(b"data", b"")
    try:
        values = (
            _json(text) if text[:1] == b"{" else _msgpack(base64.b64decode(text, validate=True))
        )
    except binascii.Error:
        raise UnusableEmit("data is neither JSON nor base64") from None
    if not isinstance(values, dict):
        raise UnusableEmit("data is not an object")
    if number in _STREAM_CONTROLS:
        return _control(_STREAM_CONTROLS[number], values)
    packet, opts = values.get("packet"), values.get("opts")
    if not isinstance(packet, dict) or not isinstance(opts, dict):
        raise UnusableEmit("no packet and opts")
    return _emit({"nsp": namespace, **packet}, opts, namespace)


def _emit(packet: dict[Any, Any], opts: dict[Any, Any], namespace: str) -> Emit | None:
    if packet.get("nsp", "/") != namespace:
        return None
    data = packet.get("data")
    if packet.get("type") not in _EVENTS or not isinstance(data, list) or not data:
        raise UnusableEmit("not an event")
    name, *args = data
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise UnusableEmit("an event without a name")
    if str(name) in _RESERVED:
        raise UnusableEmit(f"reserved event name {name}")
    flags = opts.get("flags")
    try:
        plain = tuple(map(_in_list, args))
    except RecursionError:
        raise UnusableEmit("nested too deeply") from None
    return Emit(
        name=str(name),
        args=plain,
        rooms=_names(opts.get("rooms")),
        without=_names(opts.get("except")),
        volatile=isinstance(flags, dict) and bool(flags.get("volatile")),
    )


def _control(what: str, values: dict[Any, Any]) -> Control:
    opts = values.get("opts")
    if not isinstance(opts, dict):
        raise UnusableEmit("no opts")
    return Control(
        what=what,
        rooms=_names(opts.get("rooms")),
        without=_names(opts.get("except")),
        names=_names(values.get("rooms")) if what != "disconnect" else (),
    )


def _names(value: object) -> tuple[str, ...]:
    if value is None or value is _UNDEFINED:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str | int) for each in value):
        raise UnusableEmit("rooms are not a list of names")
    return tuple(dict.fromkeys(map(str, value)))


def _json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise UnusableEmit("not JSON") from None


def _msgpack(data: bytes) -> Any:
    try:
        return msgpack.unpackb(
            data, strict_map_key=False, ext_hook=_extension, timestamp=0, unicode_errors="replace"
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
        raise UnusableEmit(f"not msgpack: {type(exc).__name__}") from None


def _extension(code: int, data: bytes) -> object:
    # notepack 2 has type 0 for both, of 8 bytes or 1; notepack 3 the standard's -1 for dates, which
    # msgpack reads by itself.
    if code == 0 and len(data) == 8:
        return _Date(int.from_bytes(data, "big", signed=True))
    if code == 0 and len(data) == 1:
        return _UNDEFINED
    raise UnusableEmit(f"unknown extension {code}")


@dataclass(frozen=True, slots=True)
class _Date:
    ms: int


def _in_list(value: object) -> object:
    return None if value is _UNDEFINED else _plain(value)


def _plain(value: object) -> object:
    """As JSON.stringify has it: dates as text, nothing for undefined."""
    if isinstance(value, dict):
        return {_key(name): _plain(each) for name, each in value.items() if each is not _UNDEFINED}
    if isinstance(value, list):
        return list(map(_in_list, value))
    if isinstance(value, msgpack.Timestamp):
        return _iso(value.seconds * 1000 + value.nanoseconds // 1_000_000)
    if isinstance(value, _Date):
        return _iso(value.ms)
    return value


def _key(name: object) -> str:
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise UnusableEmit("a key that is no text")
    return str(name)


def _iso(ms: int) -> str | None:
    try:
        at = _EPOCH + timedelta(milliseconds=ms)
    except OverflowError:
        return None
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03}Z"


def channels(key: str, namespace: str) -> tuple[bytes, bytes, bytes]:
    """The pattern of the broadcasts, what each begins with, and the channel of requests."""
    start = f"{key}#{namespace}#".encode()
    return _escaped(start) + b"*", start, f"{key}-request#{namespace}#".encode()


def _escaped(text: bytes) -> bytes:
    return b"".join(
        b"\\" + bytes((byte,)) if byte in b"*?[]^\\" else bytes((byte,)) for byte in text
    )


def flat(fields: Iterable[bytes]) -> dict[bytes, bytes]:
    """An entry's fields by name."""
    listed = list(fields)
    return dict(zip(listed[::2], listed[1::2], strict=False))
