"""Common pace at which a worker begins the requests of all its connections.

If thousands of clients send a request at the same moment, uvloop reads all of them in one turn of
the event loop. Parsing and handling them there would delay connected clients for seconds. So each
turn begins at most `_MOST`, and the others wait unparsed, in their order. Unlike handshakes, they
are never rejected.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Protocol

# They take about 10 ms together, as the fewest handshakes of a turn do.
_MOST = 32


class Waiting(Protocol):
    """A connection whose request waits."""

    def begin(self) -> None:
        """Parse and handle the request."""


class RequestPace:
    """The requests that wait, for all listeners of one worker."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Waiting, None] = OrderedDict()
        # Requests of this turn.
        self._begun = 0
        self._in_turns = False

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, connection: Waiting) -> bool:
        """Return True if the request may begin now, else call `begin` in a later turn."""
        if not self._in_turns:
            self._in_turns = True
            self._begun = 0
            asyncio.get_running_loop().call_soon(self._turn)
        if self._begun < _MOST and not self._waiting:
            self._begun += 1
            return True
        self._waiting[connection] = None
        return False

    def leave(self, connection: Waiting) -> None:
        """Remove a connection that is lost."""
        self._waiting.pop(connection, None)

    def _turn(self) -> None:
        """Begin the next requests. Runs in each turn of the event loop while there are any."""
        self._begun = 0
        if not self._waiting:
            self._in_turns = False
            return
        asyncio.get_running_loop().call_soon(self._turn)
        while self._waiting and self._begun < _MOST:
            connection, _ = self._waiting.popitem(last=False)
            self._begun += 1
            connection.begin()
