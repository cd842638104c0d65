"""Commands to all workers, in one short control stream.

Commands are kept out of the channels' streams, which contain only events. After a reconnect a
worker continues at its last position. A worker that starts begins at the end of the stream, because
it has no clients yet that an older command could affect.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from relay.core.model import Channel, EntryID, parse_channel
from relay.stream.connection import connect
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import ShardClients

KEEP = 10_000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DisconnectUser:
    """Close all connections of a user, of one protocol or of all (None)."""

    user: str
    door: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsubscribeUser:
    """End the subscriptions of a user to one channel or to all (None), in one protocol or in all.

    The user may subscribe again if permitted.
    """

    user: str
    channel: Channel | None = None
    door: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRights:
    """Drop cached rights of a channel, a user, both, or all. Clients are checked again."""

    channel: Channel | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorCommand:
    """A command for one protocol. Only that protocol interprets the payload."""

    door: str
    payload: str


ControlCommand = DisconnectUser | UnsubscribeUser | DropRights | DoorCommand

_AT = b"at:"


@dataclass(frozen=True, slots=True)
class SentCommand:
    """A command with the ID of its entry.

    `at` maps channels to entries of their streams: the command takes effect directly after them.
    """

    id: EntryID
    command: ControlCommand
    at: Mapping[Channel, EntryID] = field(default_factory=dict)


_NAMES = {DisconnectUser: "disconnect", UnsubscribeUser: "unsubscribe", DropRights: "drop-rights"}


def encode(command: ControlCommand) -> list[bytes]:
    """Return the command as flat fields for XADD."""
    if isinstance(command, DoorCommand):
        words = ["command", "door", "door", command.door, "payload", command.payload]
        return [word.encode() for word in words]
    channel = None if isinstance(command, DisconnectUser) else command.channel
    fields = ["command", _NAMES[type(command)]]
    if channel is not None:
        fields += "channel", channel
    if command.user is not None:
        fields += "user", command.user
    if not isinstance(command, DropRights) and command.door is not None:
        fields += "door", command.door
    return [field.encode() for field in fields]


def at_field(channel: Channel) -> bytes:
    """Return the name of the field that contains a command's position in this channel."""
    return _AT + channel.encode()


def decode(entry_id: EntryID, fields: Sequence[bytes]) -> SentCommand | None:
    """Parse flat fields. Log and return None if the command is unknown or malformed.

    A newer relay on the same Redis may send commands that this version does not have.
    """
    try:
        command = _decode(entry_id, fields)
        if command is None:
            return None
        at = {
            parse_channel(name.removeprefix(_AT).decode()): EntryID.parse(value)
            for name, value in zip(fields[::2], fields[1::2], strict=False)
            if name.startswith(_AT)
        }
        return SentCommand(entry_id, command, at)
    except ValueError as exc:
        log.warning("Ignored control entry %s: %s", entry_id, exc)
    return None


def _decode(entry_id: EntryID, fields: Sequence[bytes]) -> ControlCommand | None:
    values = {
        name.decode(): value.decode()
        for name, value in zip(fields[::2], fields[1::2], strict=False)
    }
    channel = parse_channel(values["channel"]) if "channel" in values else None
    user, door = values.get("user"), values.get("door")
    match values.get("command"), channel, user:
        case "disconnect", None, str():
            return DisconnectUser(user=user, door=door)
        case "unsubscribe", _, str():
            return UnsubscribeUser(channel=channel, user=user, door=door)
        case "door", None, None if door is not None and "payload" in values:
            return DoorCommand(door=door, payload=values["payload"])
        case "drop-rights", _, _:
            return DropRights(channel=channel, user=user)
        case name, _, _:
            log.warning("Ignored control entry %s: unknown command %.50r", entry_id, name)
    return None


def newest(keys: Keys, command: ControlCommand) -> list[bytes | str | int] | None:
    """Return the XREVRANGE whose reply `append` needs, or None if it needs none.

    Its reply contains the newest entry of the channel that the command names.
    """
    if not isinstance(command, UnsubscribeUser) or command.channel is None:
        return None
    return ["XREVRANGE", keys.stream(command.channel), "+", "-", "COUNT", 1]


def append(
    keys: Keys, command: ControlCommand, newest: Sequence[Sequence[bytes]] | None = None
) -> list[bytes | str | int]:
    """Return the XADD that sends the command to all workers."""
    fields = encode(command)
    if newest is not None and isinstance(command, UnsubscribeUser) and command.channel:
        fields += at_field(command.channel), newest[0][0] if newest else b"0-0"
    return ["XADD", keys.control, "MAXLEN", "~", KEEP, "*", *fields]


async def publish(clients: ShardClients, keys: Keys, command: ControlCommand) -> EntryID:
    """Send the command to all workers. Return the ID of its entry."""
    found: Sequence[Sequence[bytes]] | None = None
    if (read := newest(keys, command)) is not None:
        stream = cast(bytes, read[1])
        found = await connect.command(clients.for_key(stream), *read)
    return EntryID.parse(await connect.command(clients.home, *append(keys, command, found)))
