"""Convert Socket.IO emits to entries of the rooms' streams, and back. Pure functions.

`data` is what clients of any protocol receive, and `type` is the event's name. An emit with one
argument is therefore an entry with these two fields, and every `XADD ... data D type T` is an
emit. Other emits need more fields:

    event         the name, if it cannot be a `type`
    args          the number of arguments, if it is not one; `data` is the list of them
    binary.N      binary argument N; `data` has a placeholder for it (`relay.stream.format.entry`)
    rooms         JSON list: all rooms of an emit to several, or [] for one to the whole namespace
    copies        IDs of this event's entries in the streams of the rooms before this one
    except        JSON list of rooms whose members do not receive it

Earlier versions wrote binary arguments as base64, in `data` and again in `attachment.N`, with the
JSON list [name, args...] with placeholders in `packet`. Such entries can still be read.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import orjson

from relay.core.model import Channel, EntryID, parse_channel
from relay.stream.format import entry

if TYPE_CHECKING:
    from relay.core.model import Event

NAMESPACE = "axr"
# All clients join this room (AcceleratXR's documentation, "Rooms"), so its stream also has the
# events for the whole namespace.
EVERYBODY = "allusers"
# Name of the event that socket.send() emits. Entries without a type have this name.
DEFAULT_EVENT = "message"
# First character of a socket's ID. The ID is also a room, which has no stream: see `is_socket`.
SOCKET = "~"

# Current clients (socket.io-parser 4.2.7 and 3.3.6) close the connection if a packet has more
# attachments, and would receive it again after each reconnect. They receive base64 text instead.
MAX_ATTACHMENTS = 10
_PLACEHOLDER = re.compile(rb'\{"_placeholder":true,"num":([0-9]{1,9})\}')
# Matches every JSON form of this string: each character may be escaped.
_PLACEHOLDER_KEY = re.compile(
    b'"' + b"".join(rb"(?:%c|\\u(?i:%04x))" % (each, each) for each in b"_placeholder") + b'"'
)

_RESERVED_TYPE = "relay:"


class UnusableEmit(ValueError):
    """The emit cannot be stored as an entry, or the entry cannot be sent as a packet."""


def channel_of(room: str) -> Channel:
    """Return the channel of a room. Raise UnusableEmit if the room's name is too long."""
    try:
        return parse_channel(f"{NAMESPACE}:{room}")
    except ValueError as exc:
        raise UnusableEmit(str(exc)) from None


def channels_of(rooms: Iterable[str]) -> Iterator[Channel]:
    """Return the channels of the rooms, without those whose names are too long for any client."""
    for room in rooms:
        try:
            yield channel_of(room)
        except UnusableEmit:
            continue


def room_of(channel: Channel) -> str:
    """Return the room of a channel."""
    return channel.removeprefix(f"{NAMESPACE}:")


def is_socket(room: str) -> bool:
    """Return True if the name is a socket's ID, of a 2.x client or of a later one."""
    return room.startswith(SOCKET) or (room.startswith("/") and f"#{SOCKET}" in room)


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit:
    """One emit. Without `rooms` it is for the whole namespace. Binary arguments are bytes."""

    name: str
    args: tuple[object, ...] = ()
    rooms: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    volatile: bool = False


class EmitCopy(NamedTuple):
    """One entry of an emit: its channel, and the only socket that receives it, or None."""

    channel: Channel
    socket: str | None


def copies(emit: Emit) -> list[EmitCopy]:
    """Return the emit's entries: one for each room's stream, then one for each socket."""
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
    """The fields that are the same in all entries of an emit."""

    data: bytes
    type: str | None
    extra: dict[bytes, bytes]


def contents(emit: Emit) -> EmitContents:
    """Return the fields. Raise UnusableEmit if an argument is neither JSON nor bytes."""
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


# ---- from entries to packets -----------------------------------------------------------------


class EncodedEvent(NamedTuple):
    """The JSON list of a packet, and its binary parts."""

    packet: bytes
    attachments: list[bytes]


def encode_event(event: Event) -> tuple[str, EncodedEvent]:
    """Return the event's name and its packet for Socket.IO clients."""
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
    # Clients throw an exception or close the connection if the packet is not an event with a name.
    if not (isinstance(packet, list) and packet and isinstance(packet[0], str)):
        return None
    if attachments and not _may_be_attached(extra[b"packet"], len(attachments)):
        return None
    return packet[0], EncodedEvent(extra[b"packet"], attachments)


def _may_be_attached(data: bytes, count: int) -> bool:
    """Return True if clients accept `count` binary parts with this JSON.

    There must not be too many, and each placeholder must belong to one of them.
    """
    numbers = _PLACEHOLDER.findall(data)
    return (
        count <= MAX_ATTACHMENTS
        and len(numbers) == len(_PLACEHOLDER_KEY.findall(data))
        and all(int(number) < count for number in numbers)
    )


@dataclass(frozen=True, slots=True)
class Audience:
    """The rooms for which an entry is, and those that are excluded."""

    rooms: tuple[str, ...] | None = None
    earlier: tuple[tuple[str, EntryID], ...] = ()
    without: frozenset[str] = field(default_factory=frozenset)

    def wants(self, room: str | None, mine: Mapping[str, EntryID], names: Iterable[str]) -> bool:
        """Return True if a client receives the entry from the stream of `room`.

        An emit to several rooms has a copy in each room's stream, and a client receives the first
        copy that it can. It skips this copy if it was in an earlier room at the time of that
        room's copy.

        Args:
            room: The room, or None if the entry is addressed to the client's socket.
            mine: The client's rooms, with the position at which it joined each.
            names: The client's socket ID, which `except` may contain too.
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
    """Return the audience of an entry with these extra fields. Ignore invalid fields."""
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
