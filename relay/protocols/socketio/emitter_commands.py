"""Commands of Socket.IO emitters: `socketsJoin`, `socketsLeave` and `disconnectSockets`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import orjson
from typing_extensions import override

from relay.core.model import EntryID
from relay.core.slices import in_slices
from relay.doorkit.contract import CommandHandler
from relay.protocols.socketio.entry_format import channels_of

if TYPE_CHECKING:
    from relay.hub.session import Subscription
    from relay.protocols.socketio.client import SocketClient

_log = logging.getLogger(__name__)


class _Command(NamedTuple):
    """A command for the clients in any of `rooms` (empty: all), except those in `without`.

    `names` are the rooms to join or leave. A room that is joined has a position in its stream.
    """

    action: str
    rooms: frozenset[str]
    without: frozenset[str]
    names: Mapping[str, EntryID | None]

    def matches(self, client: SocketClient) -> bool:
        if client.session is None:
            return False
        if not self.rooms and not self.without:
            return True
        mine = client.names()
        return (not self.rooms or not mine.isdisjoint(self.rooms)) and mine.isdisjoint(self.without)


class EmitterCommands(CommandHandler):
    """Applies the commands to the clients of this worker."""

    def __init__(self, clients: Iterable[SocketClient]) -> None:
        self._clients = clients

    @override
    def concerned(self, payload: str) -> Collection[Subscription]:
        command = _parse(payload)
        if command is None or command.action == "join":
            # A client receives the events after the position at which it joins the room.
            return ()
        left = set(channels_of(command.names))
        found: list[Subscription] = []
        for client in self._clients:
            if (session := client.session) is None or not command.matches(client):
                continue
            if command.action == "disconnect":
                found += session.subscriptions.values()
            else:
                both = left & session.subscriptions.keys()
                found += [session.subscriptions[channel] for channel in both]
        return found

    @override
    async def apply(self, payload: str) -> None:
        command = _parse(payload)
        if command is None:
            _log.warning("Ignored an emitter's command: malformed")
            return
        async for client in in_slices(list(self._clients)):
            if not command.matches(client):
                continue
            if command.action == "disconnect":
                client.server_disconnect()
            for name, place in command.names.items():
                if command.action == "join":
                    client.join(name, place)
                elif command.action == "leave":
                    client.leave(name)


def _parse(payload: str) -> _Command | None:
    try:
        values = orjson.loads(payload)
        return _Command(
            values["do"],
            frozenset(values["rooms"]),
            frozenset(values["except"]),
            {name: EntryID.parse(at) if at else None for name, at in values["names"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
