"""Apply commands from the control stream to this worker's clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from relay.core.reasons import Reason
from relay.stream.write.control import (
    ControlCommand,
    DisconnectUser,
    DoorCommand,
    DropRights,
    UnsubscribeUser,
)

if TYPE_CHECKING:
    from relay.hub.hub import Hub
    from relay.process.admission import ReadRights


class ControlCommands:
    """Applies each command to local sessions, rights or a protocol."""

    def __init__(self, *, hub: Hub, rights: ReadRights) -> None:
        self._hub = hub
        self._rights = rights
        # By protocol: its handler for the commands that only it understands.
        self.on_command: dict[str, Callable[[str], None]] = {}

    def apply(self, command: ControlCommand) -> None:
        """Apply one command."""
        match command:
            case DisconnectUser():
                self._hub.disconnect_user(command.user, Reason.DISCONNECTED, command.door)
            case UnsubscribeUser():
                self._hub.drop_subscription(
                    command.channel, command.user, Reason.UNSUBSCRIBED, command.door
                )
            case DoorCommand():
                # A protocol that is disabled here has no clients to apply it to.
                if command.door in self.on_command:
                    self.on_command[command.door](command.payload)
            case DropRights():
                self._rights.drop(command.channel, command.user)
                self._hub.recheck(command.channel)

    def lost(self) -> None:
        """Recheck all clients: commands may have been missed."""
        self._rights.drop(None, None)
        self._hub.recheck(None)
