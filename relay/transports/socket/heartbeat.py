"""Heartbeats for all clients of one protocol with one timer, and timeouts for their responses.

Clients are distributed over slots and each tick serves one slot, so that 100,000 clients are not
written to in one turn of the event loop. Time is counted in ticks. Otherwise all clients would be
overdue when a process continues after it was suspended for a minute.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

_TICK_S = 0.1
# A client with a full send buffer gets no heartbeat, because that would wait behind the other data.
# As long as it receives data, it is slow rather than dead, so it gets this many intervals.
_STALLED_INTERVALS = 4


class HeartbeatClient(Protocol):
    """A `ClientSocket`, or a session over several requests.

    The last four attributes are the heartbeat's state. The owner of the client sets `silent_since`
    to 0 when the client has sent data, and `pinged` to True when it has sent a ping.
    """

    full: bool
    closing: bool
    beat_slot: int
    quiet: bool
    pinged: bool
    silent_since: int

    def write(self, data: bytes) -> None:
        """Send the heartbeat."""

    def close(self, last: bytes = b"") -> None:
        """Close: the client has not responded."""

    def abort(self) -> None:
        """Close immediately: the client has not received anything."""


class Heartbeat:
    """Writes `beat` to each client every `interval_s`.

    With `deadline_s`, the client must respond within this time; any data counts. Otherwise it is
    closed with `farewell`. Clients that were sent no heartbeat are not closed.

    `only_quiet` omits unnecessary heartbeats. Without `deadline_s` these are heartbeats to clients
    that were written to since the last one. With `deadline_s` these are heartbeats to clients that
    have sent a ping since the last one.
    """

    def __init__(
        self,
        *,
        interval_s: float,
        beat: bytes,
        deadline_s: float | None = None,
        farewell: bytes = b"",
        only_quiet: bool = False,
    ) -> None:
        if interval_s <= 0 or (deadline_s is not None and deadline_s <= 0):
            raise ValueError("interval_s and deadline_s must be greater than 0")
        self._beat = beat
        self._farewell = farewell
        self._only_quiet = only_quiet
        self._tick_s = min(_TICK_S, interval_s / 2)
        count = max(2, round(interval_s / self._tick_s))
        self._slots: list[set[HeartbeatClient]] = [set() for _ in range(count)]
        self._deadline = None if deadline_s is None else max(1, round(deadline_s / self._tick_s))
        self._stalled = _STALLED_INTERVALS * count + (self._deadline or 0)
        # Number of ticks within one round after which the responses of a slot are checked.
        self._check_offset = (self._deadline or 0) % count
        self._tick = 1
        self._next_slot = 0
        self._members = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return self._members

    def add(self, client: HeartbeatClient) -> None:
        """Add a client. It gets its first heartbeat within one interval."""
        # Assign slots in turn, so that the clients of a reconnect storm are distributed evenly.
        client.beat_slot = self._next_slot
        self._next_slot = (self._next_slot + 1) % len(self._slots)
        self._slots[client.beat_slot].add(client)
        self._members += 1
        if self._timer is None:
            self._schedule()

    def remove(self, client: HeartbeatClient) -> None:
        """Remove a client."""
        if client.beat_slot < 0:
            return
        self._slots[client.beat_slot].discard(client)
        client.beat_slot = -1
        self._members -= 1
        if not self._members and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._on_timer)

    def _on_timer(self) -> None:
        # This is one tick, however late it is. asyncio, and libuv since 1.45, read sockets before
        # they run timers, so responses that arrived in the meantime have been processed.
        self._timer = None
        self.turn()
        if self._members and self._timer is None:
            self._schedule()

    def turn(self) -> None:
        """Send heartbeats to one slot and check the responses of another one."""
        self._tick += 1
        count = len(self._slots)
        for client in tuple(self._slots[self._tick % count]):
            self._send_one(client)
        for client in tuple(self._slots[(self._tick - self._check_offset) % count]):
            self._check(client)

    def _send_one(self, client: HeartbeatClient) -> None:
        if client.closing:
            return
        expects = self._deadline is not None
        needless = self._only_quiet and (client.pinged if expects else not client.quiet)
        client.quiet, client.pinged = True, False
        if not client.full:
            if needless:
                return
            client.write(self._beat)
            client.quiet = True
        if not client.silent_since and (client.full or expects):
            client.silent_since = self._tick

    def _check(self, client: HeartbeatClient) -> None:
        if client.closing or not client.silent_since:
            return
        silent = self._tick - client.silent_since
        if client.full:
            if silent >= self._stalled:
                client.abort()
        elif self._deadline is not None and silent >= self._deadline:
            client.close(self._farewell)
