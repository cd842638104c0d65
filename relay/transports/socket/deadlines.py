"""One timer for many items with the same timeout."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Generic, TypeVar

from relay.transports.socket.progress import acknowledged_bytes, is_receiving

T = TypeVar("T")


class Deadlines(Generic[T]):
    """Calls `on_due` for each item `delay_s` after it was added, unless it was removed first.

    With `carrier`, which returns the connection of an item, an item whose peer is receiving data
    gets another `delay_s`, but at most `longest_s` in total.
    """

    def __init__(
        self,
        delay_s: float,
        on_due: Callable[[T], None],
        *,
        carrier: Callable[[T], asyncio.Transport | None] | None = None,
        longest_s: float = math.inf,
    ) -> None:
        self._delay_s = delay_s
        self._on_due = on_due
        self._carrier = carrier
        self._longest_s = longest_s
        # With `carrier`: how much the peer had received, and the time when the item was added.
        self._known: dict[T, tuple[int, float]] = {}
        # All have the same delay, so the order of insertion is the order of the deadlines.
        self._due: dict[T, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, item: T) -> bool:
        return item in self._due

    def add(self, item: T) -> None:
        """Start the item's timeout, or restart it."""
        now = asyncio.get_running_loop().time()
        if self._carrier is not None:
            self._known[item] = acknowledged_bytes(self._carrier(item)), now
        self._start(item, now)

    def _start(self, item: T, now: float) -> None:
        self._due.pop(item, None)
        self._due[item] = due = now + self._delay_s
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(due, self._on_timer)

    def remove(self, item: T) -> None:
        """Cancel the item's timeout."""
        self._due.pop(item, None)
        self._known.pop(item, None)
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
            if self._due.pop(item, None) is not None and not self._has_more_time(item, now):
                self._on_due(item)
        if self._due and self._timer is None:
            self._timer = loop.call_at(next(iter(self._due.values())), self._on_timer)

    def _has_more_time(self, item: T, now: float) -> bool:
        known = self._known.pop(item, None)
        if known is None or self._carrier is None:
            return False
        carrier, (before, added_at) = self._carrier(item), known
        is_late = now - added_at >= self._longest_s
        if is_late or not is_receiving(carrier, before, self._delay_s):
            return False
        self._known[item] = acknowledged_bytes(carrier), added_at
        self._start(item, now)
        return True
