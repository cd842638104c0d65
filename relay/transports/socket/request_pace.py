"""Common pace at which a worker begins the requests of all its connections.

If thousands of clients send a request at the same moment, uvloop reads all of them in one turn of
the event loop. Parsing and handling them there would delay connected clients for seconds. So each
turn begins at most `_MOST`, and the others wait in their order, unparsed unless they have arrived
behind another request of their connection. Unlike handshakes, they are never rejected.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Protocol

# They take about 10 ms together, as the fewest handshakes of a turn do.
_MOST = 32


class Waiting(Protocol):
    """A request that waits."""

    def begin(self) -> None:
        """Handle the request."""


class RequestPace:
    """The requests that wait, for all listeners of one worker."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Waiting, None] = OrderedDict()
        # Requests of this turn.
        self._begun = 0
        self._in_turns = False

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self) -> None:
        """Wait until a parsed request may begin."""
        turn = _Turn()
        if self.enter(turn):
            return
        try:
            await turn.has_begun
        finally:
            self.leave(turn)

    def enter(self, request: Waiting) -> bool:
        """Return True if the request may begin now, else call `begin` in a later turn."""
        if not self._in_turns:
            self._in_turns = True
            self._begun = 0
            asyncio.get_running_loop().call_soon(self._turn)
        if self._begun < _MOST and not self._waiting:
            self._begun += 1
            return True
        self._waiting[request] = None
        return False

    def leave(self, request: Waiting) -> None:
        """Remove a request whose connection is lost."""
        self._waiting.pop(request, None)

    def _turn(self) -> None:
        """Begin the next requests. Runs in each turn of the event loop while there are any."""
        self._begun = 0
        if not self._waiting:
            self._in_turns = False
            return
        asyncio.get_running_loop().call_soon(self._turn)
        while self._waiting and self._begun < _MOST:
            request, _ = self._waiting.popitem(last=False)
            self._begun += 1
            request.begin()


class _Turn:
    """A parsed request that waits."""

    def __init__(self) -> None:
        self.has_begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self) -> None:
        if not self.has_begun.done():
            self.has_begun.set_result(None)
