"""Common pace at which a worker reads large data from all its clients.

In one turn of the event loop, uvloop reads up to 8 MiB from each connection. A hundred clients that
send large requests at the same time would fill the turns of all other clients. A connection that
has received `LARGE_READ_BYTES` or more at once therefore pauses reading and calls `read_later`.
The connections then continue in their order, `_READS_AT_ONCE` of them every `_PAUSE_S`. One worker
reads at most about 100 MB/s in this way. The number of requests is limited by `request_pace`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

LARGE_READ_BYTES = 65536
_PAUSE_S = 0.005
# Each reads 256 KiB, which is uvloop's buffer.
_READS_AT_ONCE = 2


class _Pace:
    """The paused connections of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[Callable[[], None]] = deque()

    def add(self, read_on: Callable[[], None]) -> None:
        if not self._waiting:
            self.loop.call_later(_PAUSE_S, self._continue)
        self._waiting.append(read_on)

    def _continue(self) -> None:
        for _ in range(min(_READS_AT_ONCE, len(self._waiting))):
            self._waiting.popleft()()
        if self._waiting:
            self.loop.call_later(_PAUSE_S, self._continue)


_pace: _Pace | None = None


def read_later(read_on: Callable[[], None]) -> None:
    """Call `read_on` when it is the connection's turn to read again.

    The connection may have closed by then, which `read_on` has to check.
    """
    global _pace
    loop = asyncio.get_running_loop()
    if _pace is None or _pace.loop is not loop:
        _pace = _Pace(loop)
    _pace.add(read_on)
