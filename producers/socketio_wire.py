"""Parse the messages that Socket.IO's emitters write to Redis. No I/O.

`socket.io-emitter` 3.2 and `@socket.io/redis-emitter` 5.x publish `[uid, packet, opts]` in msgpack
(or JSON, if the 5.x parser was replaced) on `<key>#<namespace>#[<room>#]`. 5.x also publishes
control messages in JSON on `<key>-request#<namespace>#`. The streams emitter appends entries with
the fields uid, nsp, type and data. All formats were captured from these packages. The rooms are
taken from the message, because they are not escaped in the channel's name.
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

from relay.core.client_libraries import SOCKETIO_RESERVED
from relay.protocols.socketio.entry_format import Emit, UnusableEmit

_EVENTS = (2, 5)
# Numbers of @socket.io/redis-emitter 5.x. socket.io-redis 5.x uses the same numbers for other
# requests, which have no `opts`.
_CONTROLS = {2: "join", 3: "leave", 4: "disconnect"}
_STREAM_BROADCAST = 3
_STREAM_CONTROLS = {4: "join", 5: "leave", 6: "disconnect"}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Undefined:
    """JavaScript's undefined: omitted in an object, null in a list."""


_UNDEFINED = _Undefined()


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A command for sockets: join or leave the rooms `names`, or disconnect.

    It applies to the sockets in any of `rooms` (empty: all sockets), except those in `without`.
    """

    action: str
    rooms: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def parse_broadcast(payload: bytes, namespace: str) -> Emit | None:
    """Parse a message on the broadcast channel. Return None if it is for another namespace."""
    parts = _json(payload) if payload[:1] == b"[" else _msgpack(payload)
    if not isinstance(parts, list) or len(parts) < 2:
        raise UnusableEmit("not [uid, packet, opts]")
    packet, opts = parts[1], parts[2] if len(parts) > 2 else {}
    if not isinstance(packet, dict) or not isinstance(opts, dict):
        raise UnusableEmit("not [uid, packet, opts]")
    return _emit(packet, opts, namespace)


def parse_request(payload: bytes) -> Control | None:
    """Parse a control message of the 5.x emitter. Return None for other kinds of requests."""
    if payload[:1] != b"{":
        return None
    values = _json(payload)
    if not isinstance(values, dict) or not isinstance(kind := values.get("type"), int):
        return None
    action = _CONTROLS.get(kind)
    if action is None or not isinstance(values.get("opts"), dict):
        return None
    return _control(action, values)


def parse_entry(fields: Mapping[bytes, bytes], namespace: str) -> Emit | Control | None:
    """Parse an entry of the streams emitter or adapter.

    Returns:
        None if the entry is for another namespace or of a type that the emitter does not send.
    """
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
        raise UnusableEmit("event without a name")
    # The emitter of 5.x refuses to send these, that of 3.2 does not.
    if str(name) in SOCKETIO_RESERVED[4]:
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


def _control(action: str, values: dict[Any, Any]) -> Control:
    opts = values.get("opts")
    if not isinstance(opts, dict):
        raise UnusableEmit("no opts")
    return Control(
        action=action,
        rooms=_names(opts.get("rooms")),
        without=_names(opts.get("except")),
        names=_names(values.get("rooms")) if action != "disconnect" else (),
    )


def _names(value: object) -> tuple[str, ...]:
    # Some emitters write an empty text instead of an empty list (PyPI's socket.io-emitter).
    if value in (None, "") or value is _UNDEFINED:
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
    # notepack 2 uses type 0 for dates (8 bytes) and undefined (1 byte). notepack 3 uses the
    # standard type -1 for dates, which msgpack decodes itself.
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
    """Convert a value as JSON.stringify does: dates become text, undefined is omitted."""
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
        raise UnusableEmit("object key is not a string")
    return str(name)


def _iso(ms: int) -> str | None:
    try:
        at = _EPOCH + timedelta(milliseconds=ms)
    except OverflowError:
        return None
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03}Z"


def channels(key: str, namespace: str) -> tuple[bytes, bytes, bytes]:
    """Return the pattern of the broadcast channels, their prefix, and the channel of requests."""
    start = f"{key}#{namespace}#".encode()
    return _escaped(start) + b"*", start, f"{key}-request#{namespace}#".encode()


def _escaped(text: bytes) -> bytes:
    return b"".join(
        b"\\" + bytes((byte,)) if byte in b"*?[]^\\" else bytes((byte,)) for byte in text
    )


def fields_by_name(fields: Iterable[bytes]) -> dict[bytes, bytes]:
    """Return the flat list of an entry's fields as a dictionary."""
    listed = list(fields)
    return dict(zip(listed[::2], listed[1::2], strict=False))
