"""Aborts closing sockets that have not flushed their buffers in time.

All sockets share one timer. One timer for each would be expensive when a host disconnects all its
clients at shutdown.
"""

from __future__ import annotations

from typing import Protocol

from relay.transports.socket.deadlines import Deadlines


class Abortable(Protocol):
    """A connection that can be aborted."""

    def abort(self) -> None:
        """Close immediately and drop pending data."""


class Reaper:
    """Aborts each socket `grace_s` after `watch`, unless `forget` is called first."""

    def __init__(self, *, grace_s: float = 5.0) -> None:
        self._due: Deadlines[Abortable] = Deadlines(grace_s, lambda socket: socket.abort())

    def __len__(self) -> int:
        return len(self._due)

    def watch(self, socket: Abortable) -> None:
        """Start the socket's timeout. A second call does not extend it."""
        if socket not in self._due:
            self._due.add(socket)

    def forget(self, socket: Abortable) -> None:
        """Cancel the timeout of a socket that has closed."""
        self._due.remove(socket)
