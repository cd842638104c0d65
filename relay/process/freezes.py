"""Detects that this process did not run for some time, for instance after SIGSTOP.

Other workers may regard a worker that was frozen as dead: its leases in Redis have expired, and its
clients have been removed from presence and from the connection counts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

_PERIOD_S = 1.0
# Shorter freezes cost no lease.
_SHORT_S = 3.0

_log = logging.getLogger(__name__)


class FreezeDetector:
    """Informs all parts of this worker that hold leases."""

    def __init__(self) -> None:
        # Called after a freeze with its duration in seconds.
        self.on_wake: list[Callable[[float], None]] = []
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Watch the clock until `stop`."""
        # Unlike the clock of the event loop, this one includes the sleep of a whole machine.
        self._due = time.clock_gettime(time.CLOCK_BOOTTIME) + _PERIOD_S
        # A timer and not a task: the event loop calls it before it reads what arrived meanwhile.
        self._timer = asyncio.get_running_loop().call_later(_PERIOD_S, self._check)

    def stop(self) -> None:
        """Stop watching."""
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        frozen_s = time.clock_gettime(time.CLOCK_BOOTTIME) - self._due
        self.start()
        if frozen_s >= _SHORT_S:
            _log.warning(
                "This worker did not run for %.1f s; checking what has expired meanwhile", frozen_s
            )
            for notify in self.on_wake:
                notify(frozen_s)
