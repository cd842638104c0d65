"""What a Socket.IO emit is as an entry of a room's stream, and back. Pure; the door reads it too.

`data` is what a client of any protocol shall see, and `type` the event's name, so that an emit of
one argument is an entry of these two fields and any `XADD ... data D type T` is an emit. What does
not fit stands in further fields:

    event         the name where it cannot be a `type`
    args          how many arguments, where it is not one; `data` is the list of them
    binary.N      binary argument N; `data` has a placeholder for it (`relay.stream.format.entry`)
    rooms         JSON list: all rooms of an emit to several, or [] for one to the whole namespace
    copies        IDs of this event's entries in the streams of the rooms before this one
    except        JSON list of rooms whose members do not get it

Earlier versions wrote binary arguments as base64, in `data` and again in `attachment.N`, with the
JSON list [name, args...] with placeholders in `packet`. Such entries can still be read.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import orjson

from relay.core.model import Channel, EntryID, parse_channel
from relay.stream.format import entry

if TYPE_CHECKING:
    from relay.core.model import Event

NAMESPACE = "axr"
# Everybody is in this room (AcceleratXR's documentation, "Rooms"), so that its stream has what
# goes to the whole namespace too.
EVERYBODY = "allusers"
# What socket.send() calls its event: the name of an entry without a type.
DEFAULT_EVENT = "message"
# A socket is a room of its own by its ID, but has no stream: see `is_socket`.
SOCKET = "~"

# Current clients (socket.io-parser 4.2.7 and 3.3.6) close the connection for a packet with more,
# and would get it again each time they come back. They get base64 text instead.
MAX_ATTACHMENTS = 10
_PLACEHOLDER = re.compile(rb'\{"_placeholder":true,"num":([0-9]{1,9})\}')
# Any way in which JSON can write the string: each character may be an escape.
_PLACEHOLDER_KEY = re.compile(
    b'"' + b"".join(rb"(?:%c|\\u(?i:%04x))" % (each, each) for each in b"_placeholder") + b'"'
)

_RESERVED_TYPE = "relay:"


class UnusableEmit(ValueError):
    """No entry can be made of this emit, or no packet of this entry; the reason."""


def channel_of(room: str) -> Channel:
    """Return the channel of a room. Raise Unusable if the room's name is too long."""
    try:
        return parse_channel(f"{NAMESPACE}:{room}")
    except ValueError as exc:
        raise UnusableEmit(str(exc)) from None


def room_of(channel: Channel) -> str:
    """Return the room of a channel."""
    return channel.removeprefix(f"{NAMESPACE}:")


def is_socket(room: str) -> bool:
    """Whether the name is the ID of one of our sockets, of either generation."""
    return room.startswith(SOCKET) or (room.startswith("/") and f"#{SOCKET}" in room)


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit:
    """One emit. `rooms` empty: the whole namespace. Arguments hold bytes where they are binary."""

    name: str
    args: tuple[object, ...] = ()
    rooms: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    volatile: bool = False


class EmitCopy(NamedTuple):
    """One entry of an emit: where, for which socket alone if any, and in place of which rooms'
    copies (those before it)."""

    channel: Channel
    socket: str | None


def copies(emit: Emit) -> list[EmitCopy]:
    """Where the emit's entries go: one for each room's stream, then one for each socket."""
    if not emit.rooms:
        return [EmitCopy(channel_of(EVERYBODY), None)]
    return [
        EmitCopy(channel_of(EVERYBODY), room)
        if is_socket(room)
        else EmitCopy(channel_of(room), None)
        for room in _in_order(emit.rooms)
    ]


def _in_order(rooms: Iterable[str]) -> list[str]:
    """Return the rooms in the order of their entries: a socket's ID comes after all others."""
    return sorted(rooms, key=is_socket)


class EmitContents(NamedTuple):
    """What all entries of an emit have alike."""

    data: bytes
    type: str | None
    extra: dict[bytes, bytes]


def contents(emit: Emit) -> EmitContents:
    """Unusable where the arguments are not what JSON and bytes can say."""
    extra: dict[bytes, bytes] = {}
    kind: str | None = emit.name
    if emit.name.startswith(_RESERVED_TYPE) or not emit.name.isprintable():
        kind, extra[b"event"] = None, _utf8(emit.name)
    attachments: list[bytes] = []

    def placeholder(part: object) -> object:
        if isinstance(part, bytes):
            attachments.append(part)
            return orjson.Fragment(entry.placeholder(len(attachments) - 1))
        raise TypeError(f"{type(part).__name__} is not JSON")

    try:
        seen = emit.args[0] if len(emit.args) == 1 else list(emit.args)
        data = orjson.dumps(seen, default=placeholder)
    except (orjson.JSONEncodeError, RecursionError) as exc:
        raise UnusableEmit(str(exc)) from None
    if len(emit.args) != 1:
        extra[b"args"] = b"%d" % len(emit.args)
    for number, part in enumerate(attachments):
        extra[b"binary.%d" % number] = part
    if len(emit.rooms) != 1:
        extra[b"rooms"] = orjson.dumps(_in_order(emit.rooms))
    if emit.without:
        extra[b"except"] = orjson.dumps(emit.without)
    return EmitContents(data, kind, extra)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UnusableEmit("a lone surrogate") from None


# ---- back ------------------------------------------------------------------------------------


class EncodedEvent(NamedTuple):
    """An event as a packet's JSON list, and its binary parts."""

    packet: bytes
    attachments: list[bytes]


def said(event: Event) -> tuple[str, EncodedEvent]:
    """The event's name, and what a Socket.IO client gets."""
    extra = event.extra
    if b"event" in extra:
        name = extra[b"event"].decode(errors="replace")
    else:
        name = DEFAULT_EVENT if event.type is None else event.type
    if b"packet" in extra:
        found = _earlier_version(extra)
        if found is not None:
            return found
    attachments: list[bytes] = []
    while (part := extra.get(b"binary.%d" % len(attachments))) is not None:
        attachments.append(part)
    if attachments and not _may_be_attached(extra[b"data"], len(attachments)):
        attachments = []
    data = extra[b"data"] if attachments else event.data
    if not event.is_json:
        data = orjson.dumps(data.decode())
    head = b"[" + orjson.dumps(name)
    if b"args" in extra and event.is_json:
        inner = data.strip()
        if inner[:1] == b"[":
            args = inner[1:-1].strip()
            return name, EncodedEvent(head + (b"," + args if args else b"") + b"]", attachments)
    return name, EncodedEvent(head + b"," + data + b"]", attachments)


def _earlier_version(extra: Mapping[bytes, bytes]) -> tuple[str, EncodedEvent] | None:
    """Read the fields of earlier versions. Return None if `data` must be used instead."""
    attachments: list[bytes] = []
    try:
        while (part := extra.get(b"attachment.%d" % len(attachments))) is not None:
            attachments.append(base64.b64decode(part, validate=True))
        packet = orjson.loads(extra[b"packet"])
    except (binascii.Error, ValueError):
        return None
    # Anything but an event with a name makes clients throw, or close the connection.
    if not (isinstance(packet, list) and packet and isinstance(packet[0], str)):
        return None
    if attachments and not _may_be_attached(extra[b"packet"], len(attachments)):
        return None
    return packet[0], EncodedEvent(extra[b"packet"], attachments)


def _may_be_attached(data: bytes, count: int) -> bool:
    """Return whether clients accept `count` binary parts with this JSON: there must not be too
    many, and each placeholder must belong to one of them."""
    numbers = _PLACEHOLDER.findall(data)
    return (
        count <= MAX_ATTACHMENTS
        and len(numbers) == len(_PLACEHOLDER_KEY.findall(data))
        and all(int(number) < count for number in numbers)
    )


@dataclass(frozen=True, slots=True)
class Audience:
    """Which of a stream's readers get an entry: see `wants`."""

    rooms: tuple[str, ...] | None = None
    earlier: tuple[tuple[str, EntryID], ...] = ()
    without: frozenset[str] = field(default_factory=frozenset)

    def wants(self, room: str | None, mine: Mapping[str, EntryID], names: Iterable[str]) -> bool:
        """Whether a client gets it from the stream of `room` (None: addressed to its socket).

        `mine` are the client's rooms and where in their streams it joined; `names` is its socket
        ID, which `except` may name too. Of an emit to several rooms a client takes the first copy
        that it can get: it skips this one if it was in an earlier room when that room's copy came.
        """
        if self.without and (
            not self.without.isdisjoint(mine) or not self.without.isdisjoint(names)
        ):
            return False
        if room is not None and room not in mine and self.rooms != ():
            return False
        return not any(each in mine and mine[each] < at for each, at in self.earlier)


EVERYONE = Audience()


def audience(extra: Mapping[bytes, bytes]) -> Audience:
    """Of an entry with these extra fields; fields that are not right are as none."""
    rooms: tuple[str, ...] | None = None
    if b"rooms" in extra:
        rooms = _names(extra[b"rooms"])
    earlier: list[tuple[str, EntryID]] = []
    for room, text in zip(rooms or (), extra.get(b"copies", b"").split(), strict=False):
        try:
            earlier.append((room, EntryID.parse(text)))
        except ValueError:
            break
    without = _names(extra[b"except"]) if b"except" in extra else ()
    return Audience(rooms, tuple(earlier), frozenset(without or ()))


def _names(text: bytes) -> tuple[str, ...] | None:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        return None
    return tuple(found)
