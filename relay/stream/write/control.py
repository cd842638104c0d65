"""Commands to all workers, in one short control stream.

Commands are kept out of the channels' streams, which contain only events. After a reconnect a
worker continues at its last position. A worker that starts begins at the end of the stream, because
it has no clients yet that an older command could affect.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from relay.core.model import Channel, EntryID, parse_channel
from relay.stream.connection import connect
from relay.stream.connection.connect import RedisClient
from relay.stream.format.keys import Keys

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


def decode(entry_id: EntryID, fields: Sequence[bytes]) -> ControlCommand | None:
    """Parse flat fields. Log and return None if the command is unknown or malformed.

    A newer relay on the same Redis may send commands that this version does not have.
    """
    try:
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
    except ValueError as exc:
        log.warning("Ignored control entry %s: %s", entry_id, exc)
    return None


def append(keys: Keys, command: ControlCommand) -> list[bytes | str | int]:
    """Return the XADD that sends the command to all workers."""
    return ["XADD", keys.control, "MAXLEN", "~", KEEP, "*", *encode(command)]


async def publish(client: RedisClient, keys: Keys, command: ControlCommand) -> EntryID:
    """Send the command to all workers. Return the ID of its entry."""
    return EntryID.parse(await connect.command(client, *append(keys, command)))
