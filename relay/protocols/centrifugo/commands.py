"""Parsing of Centrifugo v1 commands by the rules of Go's encoding/json.

The bytes of `data` are not changed: they are cut out of the text. Names are case-insensitive, the
last of several equal names counts, null leaves a string empty, and unknown names are ignored
(v1.8.0 source: libcentrifugo/api/v1, and encoding/json of Go 1.9). `type`, `to` and `durability`
are extensions, which v1 ignores as unknown.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed leaves it out
from typing import Any, NamedTuple

import msgspec

from relay.core.durability import Durability
from relay.core.model import RESERVED_NAMESPACES, Channel, namespace_of, parse_channel
from relay.stream.format import entry
from relay.stream.format.json_text import is_json, with_surrogates_replaced

PRIVATE_PREFIX = "$"

_SPACE = " \t\r\n"
_skip = re.compile(r"[ \t\r\n]*").match
# Parts of a larger text are found without creating an object for each of its values, which takes
# up to 350 ms per MB.
_LARGE_BYTES = 16_384
_raw_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
# The name of a member with its colon, space, and the comma after a value.
_name_in = re.compile(rb'[ \t\r\n]*"[^"]*"[ \t\r\n]*:[ \t\r\n]*').match
_space_in = re.compile(rb"[ \t\r\n]*").match
_comma_in = re.compile(rb"[ \t\r\n]*,?").match
_raw_elements = msgspec.json.Decoder(list[msgspec.Raw]).decode
# How the client libraries write a publish, up to the data. Other spellings are parsed member by
# member, with the same result.
_PLAIN = re.compile(
    rb'\{[ ]?"method":[ ]?"publish",[ ]?"params":[ ]?\{[ ]?'
    rb'"channel":[ ]?"([^"\\\x00-\x1f]+)",[ ]?"data":[ ]?'
).match


class InvalidCommand(ValueError):
    """The command cannot be executed. The text is the reason."""


class NamespaceNotFound(InvalidCommand):
    """The channel belongs to another protocol."""

    def __init__(self) -> None:
        super().__init__("namespace not found")


class UndeliverableEvent(InvalidCommand):
    """The channel name, event type, recipients or durability are invalid."""


class CentrifugoCommand(NamedTuple):
    """One command. `params` is JSON text, or None if there is none."""

    method: str
    params: str | None
    uid: str


class PublishParams(NamedTuple):
    """Parameters of publish. `to` are the recipients for `entry.encode`, or None for everyone."""

    channel: Channel
    data: bytes
    client: str | None = None
    uid: str | None = None
    type: str | None = None
    to: tuple[str, ...] | None = None
    durability: Durability | None = None
    traceparent: str | None = None


class BroadcastParams(NamedTuple):
    """Parameters of broadcast. The channel names have not been checked."""

    channels: list[str]
    data: bytes
    client: str | None = None
    type: str | None = None
    to: tuple[str, ...] | None = None
    durability: Durability | None = None
    traceparent: str | None = None

    def publication(self, name: str) -> PublishParams:
        """Return the publish for one channel. Raise InvalidCommand if its name is invalid."""
        channel = checked_channel(name)
        return PublishParams(channel, self.data, self.client, None, *self[3:])


def _refuse(word: str) -> object:
    raise InvalidCommand(f"{word} is not JSON")


# Parse integers as floats: only their position in the text is used, and int() rejects long ones.
_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(
    parse_constant=_refuse, parse_int=float
).scan_once  # type: ignore[attr-defined]  # typeshed leaves it out


@lru_cache(4096)
def checked_channel(name: str) -> Channel:
    """Return the channel with this name. Raise InvalidCommand if the name is invalid."""
    try:
        channel = parse_channel(name)
    except ValueError as exc:
        raise UndeliverableEvent(str(exc)) from None
    if namespace_of(Channel(name.removeprefix(PRIVATE_PREFIX))) in RESERVED_NAMESPACES:
        raise NamespaceNotFound
    return channel


def plain_publish(text: bytes) -> PublishParams | None:
    """Parse a publish in its usual spelling. Return None if `one` has to parse it."""
    found = _PLAIN(text)
    if found is None or not text.endswith(b"}}"):
        return None
    # The text ends with the two closing braces. If the part between is one JSON value, it is the
    # data.
    data = text[found.end() : -2].strip(b" \t\r\n")
    if not is_json(data):
        return None
    try:
        name = found[1].decode()
    except ValueError:
        return None
    return PublishParams(checked_channel(name), data)


def one(text: bytes) -> CentrifugoCommand:
    """Parse one command object."""
    return _command(text)


def many(text: bytes) -> list[CentrifugoCommand]:
    """Parse an array of commands."""
    return [_command(part) for part in _parts(text)]


def read(text: bytes) -> list[PublishParams | CentrifugoCommand]:
    """Parse one command object or an array of them, each with the fast path if possible."""
    if not text.startswith(b"["):
        return [_fast_publish(text) or one(text)]
    return [_fast_publish(part) or _command(part) for part in _parts(text)]


def _parts(text: bytes) -> list[bytes]:
    """Return the text of each element of an array."""
    if len(text) > _LARGE_BYTES:
        with contextlib.suppress(UnicodeDecodeError, msgspec.DecodeError, RecursionError):
            text.decode()  # msgspec does not check the values
            return _large_elements(text)
    whole = _complete(text)
    if not whole.startswith("["):
        raise InvalidCommand("not an array")
    return [whole[start:end].encode() for start, end in _elements(whole)]


def _fast_publish(text: bytes) -> PublishParams | None:
    try:
        return plain_publish(text)
    except InvalidCommand:
        # Parsing the parameters raises the same error when the command is executed.
        return None


def queued(text: bytes) -> list[bytes]:
    """Return the texts of the commands of a queue item, to be parsed by `one`.

    An item is a command, or {"data": [commands]} as before Centrifugo 1.6.0.
    """
    given = _struct(text, raws=("data",), strings=("method",))
    old = given.get("data")
    if isinstance(old, str) and "method" not in given:
        return _parts(old.encode())
    return [text]


def publish(params: str | None) -> PublishParams:
    """Parse the parameters of a publish."""
    given = fields(
        params,
        strings=("channel", "client", "uid", "type", "durability", "traceparent"),
        raws=("data",),
        names=("to",),
    )
    if not given.get("channel"):
        raise InvalidCommand("publish without channel")
    if "data" not in given:
        raise InvalidCommand("publish without data")
    return PublishParams(
        checked_channel(given["channel"]),
        given["data"].encode(),
        given.get("client") or None,
        given.get("uid") or None,
        *_addressed(given),
        given.get("traceparent") or None,
    )


def broadcast(params: str | None) -> BroadcastParams:
    """Parse the parameters of a broadcast. Channels and data may be empty."""
    given = fields(
        params,
        strings=("client", "type", "durability", "traceparent"),
        raws=("data",),
        lists=("channels",),
        names=("to",),
    )
    data = given.get("data", "").encode()
    client = given.get("client") or None
    parent = given.get("traceparent") or None
    return BroadcastParams(given.get("channels", []), data, client, *_addressed(given), parent)


def _addressed(
    given: dict[str, Any],
) -> tuple[str | None, tuple[str, ...] | None, Durability | None]:
    """Return type, recipients and durability. An empty `to` is an error."""
    kind, to = given.get("type") or None, given.get("to")
    durability = given.get("durability") or None
    try:
        if kind is not None:
            entry.checked_type(kind)
        return (
            kind,
            None if to is None else tuple(sorted(entry.recipients(to))),
            Durability.parse(durability) if durability else None,
        )
    except ValueError as exc:
        raise UndeliverableEvent(str(exc)) from None


def fields(params: str | None, **kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return the parameters with the given names. Missing parameters are not in the result.

    Args:
        params: JSON text of an object.
        kinds: Names by type: `strings`, `raws` (JSON text, unchanged), `lists` (of strings),
            `bools` and `names` (a string or a list of strings).

    Raise InvalidCommand if `params` is None or a parameter has the wrong type.
    """
    if params is None:
        raise InvalidCommand("no params")
    return _struct(params, **kinds)


def _command(text: bytes) -> CentrifugoCommand:
    given = _struct(text, strings=("uid", "method"), raws=("params",))
    return CentrifugoCommand(given.get("method", ""), given.get("params"), given.get("uid", ""))


def _complete(text: bytes) -> str:
    """Return the text without surrounding white space. Raise InvalidCommand if it is not JSON."""
    try:
        whole = text.decode().strip(_SPACE)
    except UnicodeDecodeError:
        raise InvalidCommand("not UTF-8") from None
    if _value(whole, 0)[1] != len(whole):
        raise InvalidCommand("not JSON")
    return whole


def _value(text: str, at: int) -> tuple[Any, int]:
    try:
        return _scan(text, at)
    except StopIteration:
        raise InvalidCommand("not JSON") from None
    except InvalidCommand:
        raise
    except ValueError:
        raise InvalidCommand("not JSON") from None
    except RecursionError:
        raise InvalidCommand("nested too deeply") from None


def _elements(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each element of an array. The text must be valid JSON."""
    at = _end(_skip(text, 1))
    while text[at] != "]":
        _, end = _value(text, at)
        yield at, end
        at = _end(_skip(text, end))
        if text[at] == ",":
            at = _end(_skip(text, at + 1))


def _members(text: str) -> Iterator[tuple[str, Any, str]]:
    """Yield name, value and text of each member of an object. The object must be valid JSON."""
    at = _end(_skip(text, 1))
    while text[at] != "}":
        name, at = scanstring(text, at + 1, True)
        at = _end(_skip(text, _end(_skip(text, at)) + 1))
        value, end = _value(text, at)
        yield name, value, text[at:end]
        at = _end(_skip(text, end))
        if text[at] == ",":
            at = _end(_skip(text, at + 1))


def _lazy_members(text: bytes, wanted: Collection[str]) -> Iterator[tuple[str, Any, str]] | None:
    """Yield name, value and text of each member of a large object.

    The value is None unless the member's name is in `wanted`, so that no object is created for the
    others. Return None if `_members` has to read the object.
    """
    try:
        text.decode()  # msgspec does not check the values
        found = _large_members(text)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return None
    if len({name.casefold() for name, _ in found}) < len(found):
        return None
    return (
        (name, _value(raw, 0)[0] if name.casefold() in wanted else None, raw) for name, raw in found
    )


def _large_members(text: bytes) -> list[tuple[str, str]]:
    """Return name and text of each member. Equal names are returned once."""
    try:
        return [(name, bytes(raw).decode()) for name, raw in _raw_members(text).items()]
    except msgspec.DecodeError:
        if b"\\u" not in text:
            raise
    # The members have the same lengths in both texts.
    found: list[tuple[str, str]] = []
    at = text.index(b"{") + 1
    for name, raw in _raw_members(with_surrogates_replaced(text)).items():
        start = _name_in(text, at)
        if start is None or b"\\" in start[0]:
            raise msgspec.DecodeError("a name with an escape")
        at = start.end() + len(raw)
        found.append((name, text[start.end() : at].decode()))
        at = _end(_comma_in(text, at))
    return found


def _large_elements(text: bytes) -> list[bytes]:
    """Return the text of each element of a large array."""
    try:
        return [bytes(part) for part in _raw_elements(text)]
    except msgspec.DecodeError:
        if b"\\u" not in text:
            raise
    found: list[bytes] = []
    at = text.index(b"[") + 1
    for part in _raw_elements(with_surrogates_replaced(text)):
        at = _end(_space_in(text, at))
        found.append(text[at : at + len(part)])
        at = _end(_comma_in(text, at + len(part)))
    return found


def _end(found: re.Match[str] | re.Match[bytes] | None) -> int:
    # Never None: the pattern matches the empty string.
    return found.end() if found else 0


def _struct(
    text: str | bytes,
    *,
    strings: tuple[str, ...] = (),
    raws: tuple[str, ...] = (),
    lists: tuple[str, ...] = (),
    bools: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the members as Go's decoder would store them in a struct. See `fields`.

    A str must be valid JSON. Bytes are checked.
    """
    found: dict[str, Any] = {}
    members = None
    if len(text) > _LARGE_BYTES:
        encoded = text.encode() if isinstance(text, str) else text
        members = _lazy_members(encoded, {*strings, *lists, *bools, *names})
    if members is None:
        whole = text if isinstance(text, str) else _complete(text)
        if whole == "null":
            return {}
        if not whole.startswith("{"):
            raise InvalidCommand("not an object")
        members = _members(whole)
    for spelled, value, raw in members:
        name = spelled.casefold()
        if name in raws:
            found[name] = raw
        elif name in strings:
            if value is not None:
                found[name] = _text(name, value)
        elif name in lists:
            if not isinstance(value, list | None):
                raise InvalidCommand(f"{name} is not a list")
            found[name] = ["" if each is None else _text(name, each) for each in value or ()]
        elif name in bools and value is not None:
            if not isinstance(value, bool):
                raise InvalidCommand(f"{name} is not a boolean")
            found[name] = value
        elif name in names and value is not None:
            many = isinstance(value, list)
            found[name] = [_text(name, each) for each in value] if many else _text(name, value)
    return found


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidCommand(f"{name} is not a string")
    if value.isascii():
        return value
    # Go replaces unpaired surrogates by U+FFFD.
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
