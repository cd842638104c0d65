"""Gather the clients that join the same stream within a few milliseconds.

If thousands of clients return at once, a few of them arrive in each turn of the event loop, and all
of them wait for an examination of their stream and for the page after it. The stream is examined at
once for the first client. Those that arrive within `WINDOW_S` after it share the next examination,
at the end of the window.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.core.stream_interface import Followed

WINDOW_S = 0.02


class JoinWindow:
    """Delays examinations for new clients of streams that were examined for others just now."""

    def __init__(self, examine: Callable[[Followed], None]) -> None:
        self._examine = examine
        # When the window of each stream has begun, oldest first.
        self._began: dict[Followed, float] = {}
        # Streams with clients that wait for the end of the window.
        self._gathered: dict[Followed, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def join(self, stream: Followed) -> None:
        """Examine the stream for a new client, now or at the end of its window."""
        now = asyncio.get_running_loop().time()
        self._end_windows(now)
        if stream in self._began:
            self._gathered[stream] = None
            self._start_timer()
        else:
            self._began[stream] = now
            self._examine(stream)

    def discard(self, stream: Followed) -> None:
        """Forget the stream: it has no clients here, or another server has it."""
        self._began.pop(stream, None)
        self._gathered.pop(stream, None)

    def _end_windows(self, now: float) -> None:
        while self._began:
            oldest = next(iter(self._began))
            if now < self._began[oldest] + WINDOW_S:
                break
            del self._began[oldest]

    def _start_timer(self) -> None:
        if self._timer is None:
            # The window of another stream may end earlier. That costs a call without effect.
            end = self._began[next(iter(self._began))] + WINDOW_S
            self._timer = asyncio.get_running_loop().call_at(end, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        self._end_windows(now)
        for stream in [each for each in self._gathered if each not in self._began]:
            del self._gathered[stream]
            # Another examination may have served them in the meantime.
            if stream.has_waiting:
                self._began[stream] = now
                self._examine(stream)
        if self._gathered:
            self._start_timer()
