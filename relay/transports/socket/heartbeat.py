"""Heartbeats for all clients of one protocol with one timer, and timeouts for their responses.

Two rules hold for every protocol:

- A client never waits longer than the interval for a byte, unless its send buffer is full. What
  counts is the time of the last write.
- A client that receives data is not closed, however late its response is. The time for the
  response starts when the ping has left, not when it was added to a buffer with other data.

Clients are distributed over slots and each tick serves one slot, so that 100,000 clients are not
written to in one turn of the event loop. Time is counted in ticks. Otherwise all clients would be
overdue when a process continues after it was suspended for a minute.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from relay.core.reasons import Reason
from relay.transports.socket.progress import acknowledged_bytes, unacknowledged_bytes

_TICK_S = 0.1
# A client with a full send buffer gets no heartbeat, because that would wait behind the other data.
# As long as it receives data, it is slow rather than dead, so it gets this many intervals.
_STALLED_INTERVALS = 4
# A round over all slots takes a part of the interval if heartbeats can be omitted. The last write
# happened at some time during a round, and its heartbeat comes before it is an interval old.
_ROUNDS = 2


class HeartbeatClient(Protocol):
    """A `ClientSocket`, or a session over several requests.

    The attributes from `beat_slot` to `silent_since` are the heartbeat's state. The owner of the
    client sets `silent_since` to 0 when the client has sent data, `pinged` to True when it has sent
    a ping, and `quiet` to False when it was written to.
    """

    full: bool
    closing: bool
    beat_slot: int
    beat_age: int
    quiet: bool
    pinged: bool
    silent_since: int
    # Why this side closes the connection.
    ending: Reason | None

    def write(self, data: bytes) -> None:
        """Send the heartbeat."""

    def close(self, last: bytes = b"") -> None:
        """Close: the client has not responded."""

    def abort(self) -> None:
        """Close immediately: the client has not received anything."""

    @property
    def carrier(self) -> asyncio.Transport | None:
        """The connection that carries the data to the client now."""


class Heartbeat:
    """Writes `beat` to each client at least every `interval_s`.

    With `deadline_s`, the client must respond within this time; any data counts. Otherwise it is
    closed with `farewell`. Clients that were sent no heartbeat are not closed.

    `only_quiet` omits unnecessary heartbeats. Without `deadline_s` these are heartbeats to clients
    that were written to less than `interval_s` ago. With `deadline_s` these are heartbeats to
    clients that have sent a ping, which was answered, less than `interval_s` ago.
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
        self._rounds = _ROUNDS if only_quiet else 1
        # Rounded down, and one tick less if only silence counts: proxies close connections that are
        # silent for too long.
        ticks = interval_s / self._tick_s - (1 if only_quiet else 0)
        count = max(2, int(ticks / self._rounds + 1e-6))
        self._slots: list[set[HeartbeatClient]] = [set() for _ in range(count)]
        self._deadline = None if deadline_s is None else max(1, round(deadline_s / self._tick_s))
        self._stalled = _STALLED_INTERVALS * count * self._rounds + (self._deadline or 0)
        # Clients whose response may be late because other data is sent first: the number of bytes
        # that their hosts had acknowledged when this was last checked.
        self._receiving: dict[HeartbeatClient, int] = {}
        # Number of ticks within one round after which the responses of a slot are checked.
        self._check_offset = (self._deadline or 0) % count
        self._tick = 1
        self._next_slot = 0
        self._members = 0
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

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
        self._receiving.pop(client, None)
        self._members -= 1
        if not self._members and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        # From one due time to the next, so that small delays do not add up. After a long one the
        # clients need time to respond before the next tick.
        self._due = max(self._due + self._tick_s, loop.time() + self._tick_s / 2)
        self._timer = loop.call_at(self._due, self._on_timer)

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
        if self._only_quiet and (client.pinged if expects else not client.quiet):
            client.beat_age = 0
        client.quiet, client.pinged = True, False
        client.beat_age += 1
        if client.beat_age < self._rounds and not client.full:
            return
        client.beat_age = 0
        awaits = not client.silent_since and (client.full or expects)
        is_behind = awaits and unacknowledged_bytes(client.carrier) > 0
        if not client.full:
            client.write(self._beat)
            client.quiet = True
        if awaits:
            client.silent_since = self._tick
            if is_behind and client.silent_since:
                self._receiving[client] = acknowledged_bytes(client.carrier)

    def _check(self, client: HeartbeatClient) -> None:
        if not client.silent_since:
            if self._receiving:
                self._receiving.pop(client, None)
            return
        limit = self._stalled if client.full else self._deadline
        if client.closing or limit is None or self._tick - client.silent_since < limit:
            return
        if self._has_received(client):
            client.silent_since = self._tick
        elif client.full:
            client.ending = Reason.WRITE_TIMEOUT
            client.abort()
        else:
            client.ending = Reason.NO_PONG
            client.close(self._farewell)

    def _has_received(self, client: HeartbeatClient) -> bool:
        """Return whether the client has received data since the last check."""
        known = self._receiving.pop(client, None)
        if known is None:
            return False
        now = acknowledged_bytes(client.carrier)
        if now > known and unacknowledged_bytes(client.carrier):
            # Check again. Otherwise the ping has left, and the time for the response starts now.
            self._receiving[client] = now
        return now > known
