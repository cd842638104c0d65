"""Aborts sockets that did not flush their last bytes in time: one timer for all of them.

A timer for each closing client would cost the most just when a whole node says goodbye.
"""

from __future__ import annotations

import asyncio
from typing import Protocol


class Abortable(Protocol):
    """What the reaper needs of a socket."""

    def abort(self) -> None:
        """Drop the connection and whatever still waits in its buffer."""


class Reaper:
    """Every watched socket is aborted `grace_s` after `watch`, unless `forget` comes first."""

    def __init__(self, *, grace_s: float = 5.0) -> None:
        self._grace_s = grace_s
        # All have the same grace, so the order of insertion is the order of the deadlines.
        self._due: dict[Abortable, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._due)

    def watch(self, socket: Abortable) -> None:
        """Start the socket's time; a second call does not prolong it."""
        if socket in self._due:
            return
        loop = asyncio.get_running_loop()
        self._due[socket] = due = loop.time() + self._grace_s
        if self._timer is None:
            self._timer = loop.call_at(due, self._reap)

    def forget(self, socket: Abortable) -> None:
        """The socket has closed by itself."""
        self._due.pop(socket, None)
        if not self._due and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _reap(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        now = loop.time()
        overdue = []
        for socket, due in self._due.items():
            if due > now:
                self._timer = loop.call_at(due, self._reap)
                break
            overdue.append(socket)
        for socket in overdue:
            self._due.pop(socket, None)
            socket.abort()
