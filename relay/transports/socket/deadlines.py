"""One timer for many items with the same timeout."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Deadlines(Generic[T]):
    """Calls `on_due` for each item `delay_s` after it was added, unless it was removed first."""

    def __init__(self, delay_s: float, on_due: Callable[[T], None]) -> None:
        self._delay_s = delay_s
        self._on_due = on_due
        # All have the same delay, so the order of insertion is the order of the deadlines.
        self._due: dict[T, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, item: T) -> bool:
        return item in self._due

    def add(self, item: T) -> None:
        """Start the item's timeout, or restart it."""
        self._due.pop(item, None)
        loop = asyncio.get_running_loop()
        self._due[item] = due = loop.time() + self._delay_s
        if self._timer is None:
            self._timer = loop.call_at(due, self._on_timer)

    def remove(self, item: T) -> None:
        """Cancel the item's timeout."""
        self._due.pop(item, None)
        if not self._due and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def oldest(self, *, min_age_s: float) -> T | None:
        """Return the item with the nearest deadline, if it was added `min_age_s` ago or earlier."""
        item = next(iter(self._due), None)
        if item is None:
            return None
        age_s = asyncio.get_running_loop().time() - (self._due[item] - self._delay_s)
        return item if age_s >= min_age_s else None

    def _on_timer(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        now = loop.time()
        overdue = []
        for item, due in self._due.items():
            if due > now:
                break
            overdue.append(item)
        for item in overdue:
            # `on_due` of an earlier item may have removed this one.
            if self._due.pop(item, None) is not None:
                self._on_due(item)
        if self._due and self._timer is None:
            self._timer = loop.call_at(next(iter(self._due.values())), self._on_timer)
