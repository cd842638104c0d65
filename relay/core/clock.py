"""The clocks of relay. There are three, and each has its use:

- Entry IDs contain the time of Redis. They are compared only with `RedisClock.now_ms`.
- Durations, timeouts and periods use `time.monotonic` or the event loop's clock, because an
  administrator or NTP may change the other two at any time.
- The expiry time in a credential is that of the program that signed it. It is compared with
  `time.time`, the clock of this host.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

_log = logging.getLogger(__name__)

# Clocks that NTP synchronizes differ by much less.
_JUMP_MS = 2000.0
_APART_S = 2.0
_JUMPS = 8


class RedisClock:
    """The time of Redis, known from its last measurement and the monotonic clock.

    Before the first measurement it is the time of this host. `is_measured` is False then.
    """

    def __init__(
        self,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._host_offset_s = wall() - monotonic()
        # The time of Redis in milliseconds is this plus the monotonic clock.
        self.offset_ms = self._host_offset_s * 1000
        # Whether the time of Redis is known.
        self.is_measured = False
        self._measured_at = 0.0
        # Offsets before the clock of Redis was set, with the monotonic times of their ends.
        self._earlier: deque[tuple[float, float]] = deque(maxlen=_JUMPS)
        # Called after the clock of Redis was set forward, with the number of seconds: keys with an
        # expiry time may be gone, as after a freeze of that duration.
        self.on_jump: list[Callable[[float], None]] = []

    def now_ms(self) -> float:
        """Return the time of Redis in milliseconds since the epoch."""
        return self._monotonic() * 1000 + self.offset_ms

    def at_ms(self, monotonic_s: float) -> float:
        """Return the time that Redis had at this monotonic time, in milliseconds."""
        for until, offset_ms in self._earlier:
            if monotonic_s < until:
                return monotonic_s * 1000 + offset_ms
        return self.now_ms() - (self._monotonic() - monotonic_s) * 1000

    def now(self) -> float:
        """Return the time of Redis in seconds since the epoch."""
        return self.now_ms() / 1000

    def host_lead_s(self) -> float:
        """Return by how many seconds the clock of this host is ahead of that of Redis."""
        return self._wall() - self.now() if self.is_measured else 0.0

    def problem(self) -> str:
        """Return one line if the clock of this host is far from that of Redis, or ''."""
        lead_s = self.host_lead_s()
        if abs(lead_s) <= _APART_S:
            return ""
        direction = "ahead of" if lead_s > 0 else "behind"
        return (
            f"The clock of this host is {_rounded(abs(lead_s))} s {direction} the clock of Redis."
            " Tokens may expire at the wrong time; synchronize both with NTP"
        )

    def measured(self, redis_ms: float, asked_at: float) -> None:
        """Store what Redis has answered to TIME. `asked_at` is the monotonic time of the question.

        The answer is up to one round trip old, which is far less than the differences that matter.
        """
        host_offset_s = self._wall() - self._monotonic()
        if abs(host_offset_s - self._host_offset_s) * 1000 > _JUMP_MS:
            _log.warning(
                "The clock of this host was set %s by %s s",
                "forward" if host_offset_s > self._host_offset_s else "back",
                _rounded(abs(host_offset_s - self._host_offset_s)),
            )
        self._host_offset_s = host_offset_s
        now = self._monotonic()
        offset_ms = redis_ms - now * 1000
        known = self.offset_ms if self.is_measured else None
        jitter_ms = (now - asked_at) * 1000
        if known is not None and abs(offset_ms - known) <= _JUMP_MS and jitter_ms > 100:
            # A slow answer says less than the last quick one.
            return
        before_s, self._measured_at = self._measured_at, now
        self.offset_ms, self.is_measured = offset_ms, True
        if known is not None and abs(offset_ms - known) - jitter_ms > _JUMP_MS:
            _log.warning(
                "The clock of Redis was set %s by %s s",
                "forward" if offset_ms > known else "back",
                _rounded(abs(offset_ms - known) / 1000),
            )
            # The exact time of the change is unknown. In doubt a time must not be too late: events
            # up to it count as received by a client.
            self._earlier.append((now if offset_ms > known else before_s, known))
            if offset_ms > known:
                for notify in self.on_jump:
                    notify((offset_ms - known) / 1000)


def _rounded(seconds: float) -> str:
    # Two digits, so that the text of a problem does not change with every measurement.
    return f"{float(f'{seconds:.2g}'):g}" if seconds < 1000 else f"{round(seconds, -2):.0f}"
