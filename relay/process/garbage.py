"""Run full garbage collections rarely, because they block the event loop.

A full collection visits every object of the process in one step: 150 ms for 10,000 subscriptions.
By default, Python starts one whenever the number of objects has grown by a quarter, so that
connecting clients would block the worker repeatedly.

Connections, sessions and subscriptions are freed by their reference counts. Reference cycles that
are still young are freed by Python's partial collections, which take a few milliseconds. So a full
collection is only needed for old cycles. Those use memory, so it runs when the process has become
larger.
"""

from __future__ import annotations

import gc
import logging
import resource
import time
from typing import Self

_log = logging.getLogger(__name__)

CHECK_S = 10.0
_GROWTH = 1.25
_GROWTH_KB = 64 * 1024
_NEVER = 2**31 - 1


class RareCollections:
    """While entered, full collections run only in `collect_if_grown`."""

    def __init__(self) -> None:
        self._size_kb = _largest_kb()
        self._thresholds = gc.get_threshold()

    def __enter__(self) -> Self:
        self._thresholds = gc.get_threshold()
        gc.collect()
        # Modules and classes are kept for the life of the process, so collections can skip them.
        gc.freeze()
        gc.set_threshold(*self._thresholds[:2], _NEVER)
        self._size_kb = _largest_kb()
        return self

    def __exit__(self, *_: object) -> None:
        gc.set_threshold(*self._thresholds)
        gc.unfreeze()

    async def collect_if_grown(self) -> None:
        """Run a full collection if the process has become larger since the last one."""
        if is_due(self._size_kb, _largest_kb()):
            began = time.perf_counter()
            found = gc.collect()
            self._size_kb = _largest_kb()
            took_ms = (time.perf_counter() - began) * 1000
            _log.debug("Freed %d objects in a full collection of %.0f ms", found, took_ms)


def is_due(before_kb: int, now_kb: int) -> bool:
    """Return True if the process has grown enough since its last full collection to need one."""
    return now_kb >= max(before_kb * _GROWTH, before_kb + _GROWTH_KB)


def _largest_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
