"""Aborts closing sockets whose clients do not receive the rest of their data.

All sockets share one timer. One timer for each would be expensive when a host disconnects all its
clients at shutdown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from relay.transports.socket.deadlines import Deadlines

if TYPE_CHECKING:
    import asyncio


# Closing sockets are not counted among a user's connections, so they must end at some time.
_LONGEST_S = 60.0


class Abortable(Protocol):
    """A connection that can be aborted."""

    def abort(self) -> None:
        """Close immediately and drop pending data."""


class ClosingSocket(Abortable, Protocol):
    """A socket that is closed after its last data."""

    @property
    def carrier(self) -> asyncio.Transport | None:
        """The connection to the client."""


class Reaper:
    """Aborts each socket `grace_s` after `watch`, unless `forget` is called first.

    A socket whose client receives data has more time, up to a minute.
    """

    def __init__(self, *, grace_s: float = 5.0) -> None:
        self._due: Deadlines[ClosingSocket] = Deadlines(
            grace_s,
            lambda socket: socket.abort(),
            carrier=lambda socket: socket.carrier,
            longest_s=_LONGEST_S,
        )

    def __len__(self) -> int:
        return len(self._due)

    def watch(self, socket: ClosingSocket) -> None:
        """Start the socket's timeout. A second call does not extend it."""
        if socket not in self._due:
            self._due.add(socket)

    def forget(self, socket: ClosingSocket) -> None:
        """Cancel the timeout of a socket that has closed."""
        self._due.remove(socket)
