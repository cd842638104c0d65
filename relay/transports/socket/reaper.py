"""Aborts sockets that did not flush their last bytes in time: one timer for all of them.

A timer for each closing client would cost the most just when a whole node says goodbye.
"""

from __future__ import annotations

from typing import Protocol

from relay.transports.socket.deadlines import Deadlines


class Abortable(Protocol):
    """What the reaper needs of a socket."""

    def abort(self) -> None:
        """Drop the connection and whatever still waits in its buffer."""


class Reaper:
    """Every watched socket is aborted `grace_s` after `watch`, unless `forget` comes first."""

    def __init__(self, *, grace_s: float = 5.0) -> None:
        self._due: Deadlines[Abortable] = Deadlines(grace_s, lambda socket: socket.abort())

    def __len__(self) -> int:
        return len(self._due)

    def watch(self, socket: Abortable) -> None:
        """Start the socket's time; a second call does not prolong it."""
        if socket not in self._due:
            self._due.add(socket)

    def forget(self, socket: Abortable) -> None:
        """The socket has closed by itself."""
        self._due.remove(socket)
