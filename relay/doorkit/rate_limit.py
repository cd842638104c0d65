"""Limit how many messages a client may send."""

from __future__ import annotations

from collections.abc import Callable


class RateLimit:
    """One client's allowance: `burst` messages at once, and `per_s` per second on average."""

    __slots__ = ("_allowance", "_burst", "_clock", "_per_s", "_updated_at")

    def __init__(self, per_s: float, burst: float, clock: Callable[[], float]) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._allowance = burst
        self._updated_at = clock()

    def accept(self) -> bool:
        """Count one message if it is accepted. Return False if there were too many."""
        now = self._clock()
        earned = (now - self._updated_at) * self._per_s
        self._updated_at = now
        self._allowance = min(self._burst, self._allowance + earned)
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True
