"""Schema of entries: encode and decode their fields, for readers and producers.

An entry is a flat list of fields, so that `XADD key '*' data '{"hello":1}'` is a complete producer:

    data     the event: JSON, or any other UTF-8 text. Required
    type     type of the event for clients; types that begin with `relay:` are reserved
    uid      ID chosen by the producer, for idempotent appends
    to       recipients: `user:U`, `group:G`, `client:C` or a plain user name, separated by commas
             or white space; or a JSON array of them, for names that contain either
    client   ID of the client that caused the event, so that a page can skip its own events
    info     JSON about that client
    v        schema version; 1 if missing
    revoke   a user: the entry is the position of a revocation, not an event
    grant    a user: without `data`, the entry is the position where a revocation ends, not an event

The fields `binary.0`, `binary.1` ... contain binary parts of `data`, which has placeholders for
them (`placeholder`). Protocols that carry only text receive base64 (`show_binary`).

Unknown fields are kept for the protocol that wrote them (`Event.extra`). An entry that cannot be
delivered is decoded as `Broken` with a reason; it raises no exception.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from zlib import crc32

import orjson

from relay.core.model import Broken, Channel, EntryID, Event, Grant, Record, Revocation
from relay.stream.format.json_text import is_json

SCHEMA = b"1"
RESERVED_TYPES = "relay:"

# How much of an entry that cannot be delivered is kept for the dead letter.
BROKEN_BYTES = 65_536
_LARGE_BYTES = 65_536

_SELECTOR_KINDS = ("user", "group", "client")
_SEPARATORS = re.compile(r"[,\s]+")
# A line break in a type would end an SSE `event:` line and let an entry forge the next one.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_KNOWN = frozenset({b"data", b"type", b"uid", b"to", b"client", b"info", b"v", b"revoke"})


class _Unreadable(ValueError):
    """An invalid entry. The text is the reason for `Broken`, or the error for a producer."""


def digest(fields: Sequence[bytes]) -> int:
    """Return a 16-bit hash of the content, to detect another entry with the same ID."""
    if size(fields) <= _LARGE_BYTES:
        return crc32(b"\0".join(fields)) & 0xFFFF
    # The same without a copy of the whole entry.
    found = 0
    for number, field in enumerate(fields):
        found = crc32(field, crc32(b"\0", found) if number else 0)
    return found & 0xFFFF


def decode(channel: Channel, entry_id: EntryID, fields: Sequence[bytes], max_bytes: int) -> Record:
    """Decode the flat fields (name, value, name, value ...) of an entry."""
    size_bytes = size(fields)
    body: Event | Revocation | Grant | Broken
    try:
        if len(fields) == 2 and fields[0] == b"data" and size_bytes <= max_bytes:
            # Most entries have no other field.
            body = Event(channel, entry_id, fields[1], _is_json(fields[1]))
        else:
            values = dict(zip(fields[::2], fields[1::2], strict=False))
            body = _decode_fields(channel, entry_id, values, size_bytes, max_bytes)
    except _Unreadable as exc:
        body = Broken(entry_id, str(exc), tuple(_shortened(fields)))
    if size_bytes <= _LARGE_BYTES:
        # The same as `digest`, inlined for speed.
        return Record(entry_id, crc32(b"\0".join(fields)) & 0xFFFF, size_bytes, body)
    return Record(entry_id, digest(fields), size_bytes, body)


def _shortened(fields: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield names and values, cut so that many large entries don't fill the memory."""
    left = BROKEN_BYTES
    for name, value in zip(fields[::2], fields[1::2], strict=False):
        yield name[: left + 1], value[: left + 1]
        left = max(0, left - len(name) - len(value))


def _decode_fields(
    channel: Channel, entry_id: EntryID, values: dict[bytes, bytes], size: int, max_bytes: int
) -> Event | Revocation | Grant:
    if b"revoke" in values:
        # Before every other check: a revocation that is overlooked would not take effect.
        return Revocation(entry_id, _user(values, "revoke"))
    data = values.get(b"data")
    if b"grant" in values and data is None:
        return Grant(entry_id, _user(values, "grant"))
    if size > max_bytes:
        raise _Unreadable(f"too large: {size} bytes")
    version = values.get(b"v", SCHEMA)
    if version != SCHEMA:
        raise _Unreadable(f"unknown schema {version[:20].decode(errors='replace')}")
    if data is None:
        raise _Unreadable("no data")
    kind = _text(values, "type")
    to = values.get(b"to")
    extra = {name: value for name, value in values.items() if name not in _KNOWN}
    return Event(
        channel,
        entry_id,
        show_binary(data, extra),
        _is_json(data),
        type=None if kind is None else checked_type(kind),
        uid=_text(values, "uid"),
        to=None if to is None else recipients(_utf8("to", to)),
        client=_text(values, "client"),
        info=_info(values.get(b"info")),
        extra=extra,
    )


def show_binary(data: bytes, extra: dict[bytes, bytes]) -> bytes:
    """Return `data` with base64 text in place of its binary parts, for protocols that carry text.

    The fields `binary.0`, `binary.1` ... of `extra` are the parts. If there are any, `data` as it
    was is added to `extra` under the name `data`.
    """
    if b"binary.0" not in extra:
        return data
    extra[b"data"] = data
    number = 0
    while (part := extra.get(b"binary.%d" % number)) is not None:
        text = b'"' + base64.b64encode(part) + b'"'
        # Replace each placeholder once, so that the result cannot be many times the entry's size.
        data = data.replace(placeholder(number), text, 1)
        number += 1
    return data


def placeholder(number: int) -> bytes:
    """Return the placeholder in `data` for the field `binary.<number>`, as in Socket.IO."""
    return b'{"_placeholder":true,"num":%d}' % number


def _is_json(data: bytes) -> bool:
    if is_json(data):
        return True
    if not data.isascii():
        _utf8("data", data)
    return False


def _utf8(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _Unreadable(f"field {name} is not UTF-8") from None


def _text(values: dict[bytes, bytes], name: str) -> str | None:
    value = values.get(name.encode())
    return None if value is None else _utf8(name, value)


def checked_type(text: str) -> str:
    """Return `text`. Raise ValueError if it is not a valid type."""
    if text.startswith(RESERVED_TYPES):
        raise _Unreadable("reserved type")
    if _CONTROL.search(text):
        raise _Unreadable("type contains a control character")
    return text


def _info(value: bytes | None) -> bytes | None:
    # Protocols insert it unchanged into their frames, so anything but JSON would break a frame.
    if value is not None and not _is_json(value):
        raise _Unreadable("info is not JSON")
    return value


def _user(values: Mapping[bytes, bytes], name: str) -> str:
    user = _utf8(name, values[name.encode()])
    if not user:
        raise _Unreadable(f"{name} has no user")
    return user


def recipients(to: object) -> frozenset[str]:
    """Parse `to` as `selectors` does. The text may also be a JSON array of names."""
    if isinstance(to, str) and to.lstrip().startswith("["):
        try:
            to = orjson.loads(to)
        except orjson.JSONDecodeError:
            raise _Unreadable("to is not a list of names") from None
    return selectors(to)


def selectors(to: object) -> frozenset[str]:
    """Parse `to`, a text or a list of names, into selectors as `Principal.selectors` returns.

    Raises:
        ValueError: There are no names. An empty `to` is probably a mistake of the producer, and
            must not deliver the event to everyone.
    """
    if isinstance(to, str):
        to = [name for name in _SEPARATORS.split(to) if name]
    if not isinstance(to, list):
        raise _Unreadable("to is not a list of names")
    if not to:
        raise _Unreadable("to has no recipients")
    return frozenset([_selector(name) for name in to])


def _selector(name: object) -> str:
    if not isinstance(name, str):
        raise _Unreadable("to is not a list of names")
    kind, colon, rest = name.partition(":")
    if not (colon and kind in _SELECTOR_KINDS):
        kind, rest = "user", name
    if not rest:
        raise _Unreadable("to has no recipients")
    return f"{kind}:{rest}"


def encode(
    data: bytes,
    *,
    type: str | None = None,
    uid: str | None = None,
    to: Iterable[str] | None = None,
    client: str | None = None,
    info: bytes | None = None,
    extra: Mapping[bytes, bytes] | None = None,
    checked: bool = False,
) -> list[bytes]:
    """Return the flat list of fields for XADD.

    The arguments are the fields of the schema. `extra` are further fields, of any bytes. `checked`
    means that the caller has checked that `data` is UTF-8.

    Raises:
        ValueError: `decode` would return `Broken`. The size is not checked, because its limit is a
            setting of relay; see `size`.
    """
    fields = [b"data", data]
    if not checked:
        _is_json(data)
    if type is not None:
        fields += b"type", _bytes("type", checked_type(type))
    if uid is not None:
        fields += b"uid", _bytes("uid", uid)
    if to is not None:
        names = sorted({_selector(name) for name in to})
        if not names:
            raise _Unreadable("to has no recipients")
        plain = not any(_SEPARATORS.search(name) for name in names)
        fields += b"to", _bytes("to", ",".join(names) if plain else orjson.dumps(names).decode())
    if client is not None:
        fields += b"client", _bytes("client", client)
    if info is not None:
        _info(info)
        fields += b"info", info
    for name, value in (extra or {}).items():
        if name in _KNOWN:
            raise _Unreadable(f"field {name.decode()} is part of the schema")
        fields += name, value
    return fields


def encode_revocation(user: str) -> list[bytes]:
    """Return the fields of an entry after which no event is delivered to `user`."""
    return _encode_change("revoke", user)


def encode_grant(user: str) -> list[bytes]:
    """Return the fields of an entry that ends a revocation of `user`."""
    return _encode_change("grant", user)


def _encode_change(name: str, user: str) -> list[bytes]:
    fields = [name.encode(), _bytes(name, user)]
    _user({fields[0]: fields[1]}, name)
    return fields


def size(fields: Sequence[bytes]) -> int:
    """Return the size that `decode` compares with its limit."""
    return sum(map(len, fields)) + max(len(fields) - 1, 0)


def _bytes(name: str, value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        raise _Unreadable(f"field {name} is not UTF-8") from None
