"""Counters and durations of v1's `stats` and `node`, under v1's names. All values are integers.

Counters only grow; `NodeReport` computes the difference over an interval. Durations are in
microseconds with three significant digits, for the current interval and the fourteen before it.
"""

from __future__ import annotations

import math
from collections import Counter, deque

# libcentrifugo of v1.8.0: node/node.go, conns/, server/. Counters without an equivalent in relay
# stay 0, such as those of messages received from other nodes.
COUNTERS = (
    "client_api_num_requests",
    "client_bytes_in",
    "client_bytes_out",
    "client_num_connect",
    "client_num_msg_published",
    "client_num_msg_queued",
    "client_num_msg_sent",
    "client_num_subscribe",
    "http_api_num_requests",
    "http_raw_ws_num_requests",
    "http_sockjs_num_requests",
    "node_num_add_client_conn",
    "node_num_add_client_sub",
    "node_num_add_presence",
    "node_num_admin_msg_published",
    "node_num_admin_msg_received",
    "node_num_client_msg_published",
    "node_num_client_msg_received",
    "node_num_control_msg_published",
    "node_num_control_msg_received",
    "node_num_history",
    "node_num_join_msg_published",
    "node_num_join_msg_received",
    "node_num_last_message_id",
    "node_num_leave_msg_published",
    "node_num_leave_msg_received",
    "node_num_presence",
    "node_num_remove_client_conn",
    "node_num_remove_client_sub",
    "node_num_remove_presence",
)
GAUGES = (
    "node_cpu_usage",
    "node_memory_heap_alloc",
    "node_memory_heap_sys",
    "node_memory_stack_inuse",
    "node_memory_sys",
    "node_num_channels",
    "node_num_clients",
    "node_num_goroutine",
    "node_num_unique_clients",
    "node_rusage_stime",
    "node_rusage_utime",
    "node_uptime_seconds",
)
_WINDOWS = (1, 15)
_QUANTILES = (("50", 0.5), ("90", 0.9), ("99", 0.99), ("99.99", 0.9999))
_DIGITS = 1000


class DurationHistogram:
    """Histogram of durations with one window per interval."""

    def __init__(self, name: str) -> None:
        self._name = name
        # Newest first.
        self._windows: deque[Counter[int]] = deque([Counter()], maxlen=max(_WINDOWS))

    def record(self, seconds: float) -> None:
        """Add one duration."""
        value = max(0, int(seconds * 1e6))
        step = 1
        while value // step >= _DIGITS:
            step *= 10
        self._windows[0][value // step * step] += 1

    def rotate(self) -> None:
        """Start a new window."""
        self._windows.appendleft(Counter())

    def values(self) -> dict[str, int]:
        """Return the statistics of the newest window and of all windows, by metric name."""
        found: dict[str, int] = {}
        for windows in _WINDOWS:
            merged: Counter[int] = Counter()
            for index, window in enumerate(self._windows):
                if index < windows:
                    merged.update(window)
            found |= _describe(f"{self._name}_{windows}", merged)
        return found


def _describe(name: str, counted: Counter[int]) -> dict[str, int]:
    total = counted.total()
    unit = f"{name}_microseconds"
    ordered = sorted(counted.items())
    found = {f"{name}_count": total}
    for label, share in _QUANTILES:
        rank, seen, at = math.ceil(share * total), 0, 0
        for value, count in ordered:
            seen, at = seen + count, value
            if seen >= rank:
                break
        found[f"{unit}_{label}%ile"] = at
    found[f"{unit}_max"] = ordered[-1][0] if ordered else 0
    found[f"{unit}_min"] = ordered[0][0] if ordered else 0
    summed = sum(value * count for value, count in ordered)
    found[f"{unit}_mean"] = summed // total if total else 0
    return found


class Stats:
    """Counters and histograms of this worker."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.http_api = DurationHistogram("http_api")
        self.client_api = DurationHistogram("client_api")

    def count(self, *names: str) -> None:
        """Add 1 to each counter."""
        for name in names:
            self.counts[name] += 1

    def frame_received(self, size_bytes: int) -> None:
        """Count a client's frame."""
        self.counts["client_api_num_requests"] += 1
        self.counts["client_bytes_in"] += size_bytes

    def reply_sent(self, size_bytes: int, seconds: float) -> None:
        """Count the reply to a client's frame, and how long it took."""
        self.client_api.record(seconds)
        self.count("client_num_msg_queued", "client_num_msg_sent")
        self.counts["client_bytes_out"] += size_bytes

    def durations(self) -> dict[str, int]:
        """Return the statistics of both histograms, by metric name."""
        return self.http_api.values() | self.client_api.values()

    def rotate(self) -> None:
        """Start a new interval."""
        self.http_api.rotate()
        self.client_api.rotate()
