"""Commands to all workers, through one short stream that every worker reads from its end.

What is not an event never enters a workspace's stream. A worker that was away reads on from where
it was; one that starts begins at the end, for it has nothing yet that a command could concern.
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
    """Close every connection of a user, in one door or in every."""

    user: str
    door: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsubscribeUser:
    """End a user's subscriptions to one channel or, without, to all, in one door or in every; they
    may subscribe again if their rights allow."""

    user: str
    channel: Channel | None = None
    door: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRights:
    """Forget what rights sources answered, for one channel, one user, both or, without, for all;
    whoever is connected is asked for again."""

    channel: Channel | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorCommand:
    """What only one door understands, as its producer wrote it."""

    door: str
    payload: str


ControlCommand = DisconnectUser | UnsubscribeUser | DropRights | DoorCommand
_NAMES = {DisconnectUser: "disconnect", UnsubscribeUser: "unsubscribe", DropRights: "drop-rights"}


def encode(command: ControlCommand) -> list[bytes]:
    """Flat fields for XADD."""
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
    """The command in these flat fields; None, and a log line, where it is not understood.

    A newer relay on the same Redis may know more commands than this one.
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
                log.warning("control entry %s is skipped: cannot do %.50r", entry_id, name)
    except ValueError as exc:
        log.warning("control entry %s is skipped: %s", entry_id, exc)
    return None


def append(keys: Keys, command: ControlCommand) -> list[bytes | str | int]:
    """The XADD that tells every worker; each acts on it within its next wake-up."""
    return ["XADD", keys.control, "MAXLEN", "~", KEEP, "*", *encode(command)]


async def publish(client: RedisClient, keys: Keys, command: ControlCommand) -> EntryID:
    """Append the command."""
    return EntryID.parse(await connect.command(client, *append(keys, command)))
