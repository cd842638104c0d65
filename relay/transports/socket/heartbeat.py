"""Beats to all clients of one door by one timer, and the end of those that do not answer.

The clients are spread over slots and each tick serves one slot, so that 100,000 clients are not
written to in one turn of the loop. Time is counted in ticks: a process that was stopped for a
minute does not find all of its clients overdue when it goes on.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

_TICK_S = 0.1
# A client that is full and does not drain gets no beat, for that would wait behind the rest. It is
# slow rather than silent as long as it takes something, so it has this many intervals instead.
_STALLED_INTERVALS = 4


class HeartbeatClient(Protocol):
    """A client as the heartbeat sees it: a `ClientSocket`, or a session over several requests.

    The last four are the heartbeat's notes. The owner of the client sets `silent_since` to 0 when
    the client has sent something, and `pinged` when that was a ping of its own.
    """

    full: bool
    closing: bool
    beat_slot: int
    quiet: bool
    pinged: bool
    silent_since: int

    def write(self, data: bytes) -> None:
        """Send the beat."""

    def close(self, last: bytes = b"") -> None:
        """It does not answer."""

    def abort(self) -> None:
        """It does not even take anything."""


class Heartbeat:
    """Writes `beat` to each client every `interval_s`.

    With `deadline_s` an answer is expected (anything that the client sends is one): a client that
    is silent for so long after a beat is closed with `farewell`. A client that was sent no beat is
    never closed for its silence.

    `only_quiet` saves beats. Without `deadline_s`, a client that was written to since its last beat
    needs none. With `deadline_s`, a client that has sent a ping since then needs none: it has shown
    that it is there. Events that were written to it would show nothing.
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
            raise ValueError("a heartbeat's times are greater than 0")
        self._beat = beat
        self._farewell = farewell
        self._only_quiet = only_quiet
        self._tick_s = min(_TICK_S, interval_s / 2)
        count = max(2, round(interval_s / self._tick_s))
        self._slots: list[set[HeartbeatClient]] = [set() for _ in range(count)]
        self._deadline = None if deadline_s is None else max(1, round(deadline_s / self._tick_s))
        self._stalled = _STALLED_INTERVALS * count + (self._deadline or 0)
        # How long after its beat a slot is looked at again, within one round.
        self._look = (self._deadline or 0) % count
        self._tick = 1
        self._next_slot = 0
        self._members = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return self._members

    def add(self, client: HeartbeatClient) -> None:
        """Begin with `client`: its first beat comes within one interval."""
        # By turns, not by the time of arrival: a reconnect storm must not share one slot.
        client.beat_slot = self._next_slot
        self._next_slot = (self._next_slot + 1) % len(self._slots)
        self._slots[client.beat_slot].add(client)
        self._members += 1
        if self._timer is None:
            self._schedule()

    def remove(self, client: HeartbeatClient) -> None:
        """Forget `client`; without clients there is no timer."""
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
        # However late this is, it is one tick. asyncio, and libuv since 1.45, read the sockets
        # before they run timers: the answers that came during a stall have been seen by now.
        self._timer = None
        self.turn()
        if self._members and self._timer is None:
            self._schedule()

    def turn(self) -> None:
        """One tick: beat one slot, judge another."""
        self._tick += 1
        count = len(self._slots)
        for client in tuple(self._slots[self._tick % count]):
            self._beat_one(client)
        for client in tuple(self._slots[(self._tick - self._look) % count]):
            self._judge(client)

    def _beat_one(self, client: HeartbeatClient) -> None:
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

    def _judge(self, client: HeartbeatClient) -> None:
        if client.closing or not client.silent_since:
            return
        silent = self._tick - client.silent_since
        if client.full:
            if silent >= self._stalled:
                client.abort()
        elif self._deadline is not None and silent >= self._deadline:
            client.close(self._farewell)
