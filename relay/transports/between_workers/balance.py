"""Hands a new connection on to a sibling that has clearly fewer clients.

SO_REUSEPORT spreads connections by a hash, blindly. Measured on loopback, the fullest of 2, 4 and 8
workers had at worst 7, 15 and 24 % more than its share of 1,000 connections (1, 3 and 5 % of
5,000); and after a worker died all its clients are at the others, and stay there. So each worker
accepts by itself, for no single process to be in everybody's way, and passes on (SCM_RIGHTS) what
is too much for it. Nothing has been read of such a connection, and it is handed on only once.

In the same way a request goes to the sibling that has its session, with its connection: a websocket
that this worker kept would have to be passed on message by message.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.core.worker_memory import Worker

# What a worker may have beyond the emptiest: less would only pass connections back and forth.
_SHARE, _COUNT = 1.03, 3
# Before what was read of a connection: which listener it came to.
_HEAD = struct.Struct("!B")
# A longer request stays where it is.
_EARLY_BYTES = 65536

# A connection, the listener's index, and what has been read of it.
Take = Callable[[socket.socket, int, bytes], object]

_log = logging.getLogger(__name__)


class Balance:
    """One worker's view. `clients` says how many it has."""

    def __init__(self, worker: Worker, clients: Callable[[], int]) -> None:
        self._number = worker.number
        self._memory = worker.memory
        self._inbox = worker.inbox
        self._outboxes = worker.outboxes
        self._clients = clients
        # Since the last beat: what was taken and may not be a client yet, and what was handed on
        # and may not have been taken there yet.
        self._taken = 0
        self._known = 0
        self._given: Counter[int] = Counter()
        self._seen: Counter[int] = Counter()
        self._take: Take | None = None

    def beat(self) -> None:
        """Again and again: what was on its way has arrived."""
        self._taken = 0
        self._given.clear()
        self.tell()

    def tell(self) -> None:
        """The number of clients here has changed."""
        before, self._known = self._known, self._clients()
        # One that was on its way has become a client.
        self._taken = max(0, self._taken - max(0, self._known - before))
        self._memory.set_connections(self._number, self._known + self._taken)

    def give(self, connection: socket.socket) -> bool:
        """Whether a sibling has it now; then this process closes its own descriptor of it."""
        mine = self._clients() + self._taken
        others = [
            (self._load(number), number)
            for number in self._outboxes
            if number != self._number and self._memory.ready(number)
        ]
        if others:
            least, number = min(others)
            if mine > least * _SHARE + _COUNT and self._send(number, connection):
                self._given[number] += 1
                return True
        self._taken += 1
        self.tell()
        return False

    def _load(self, number: int) -> int:
        before, now = self._seen[number], self._memory.connections(number)
        self._seen[number] = now
        # What it has more than at the last look may be what was handed to it.
        self._given[number] = max(0, self._given[number] - max(0, now - before))
        return now + self._given[number]

    def give_first(self, connection: socket.socket, listener: int, early: bytes) -> bool:
        """Give a request, as `pass_on`, to the first worker of this host whose listeners are open.
        Return False if this is that worker."""
        number = self._memory.first_listening()
        if number in (None, self._number) or len(early) > _EARLY_BYTES:
            return False
        return self._send(number or 0, connection, listener, early)

    def pass_on(
        self, instance: str, connection: socket.socket, listener: int, early: bytes
    ) -> bool:
        """Whether the worker of this name, on this host, has it now, with the `early` bytes that
        were read here; then this process closes its own descriptor of it."""
        number = self._memory.number_of(instance)
        if number in (None, self._number) or len(early) > _EARLY_BYTES:
            return False
        return self._send(number or 0, connection, listener, early)

    def receive(self, take: Take) -> None:
        """From now on `take` gets what siblings hand over, until `stop`."""
        self._take = take
        asyncio.get_running_loop().add_reader(self._inbox.fileno(), self._read, take)

    def stop(self) -> None:
        """Take what has been handed over, and nothing more; siblings read in the shared memory that
        this worker does not listen."""
        take, self._take = self._take, None
        if take is not None:
            asyncio.get_running_loop().remove_reader(self._inbox.fileno())
            self._read(take)

    def _send(
        self, number: int, connection: socket.socket, listener: int = 0, early: bytes = b""
    ) -> bool:
        message = _HEAD.pack(listener) + early
        try:
            socket.send_fds(self._outboxes[number], [message], [connection.fileno()])
        except OSError:
            # It does not keep up.
            return False
        return True

    def _read(self, take: Take) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    size = _HEAD.size + _EARLY_BYTES
                    message, descriptors, _, _ = socket.recv_fds(self._inbox, size, 1)
                except BlockingIOError:
                    raise
                except OSError as exc:
                    _log.warning("a connection from a sibling is lost: %s", exc)
                    return
                if not descriptors:
                    # No descriptor was left for it: the kernel has closed it.
                    return
                self._taken += 1
                self.tell()
                early = message[_HEAD.size :]
                take(socket.socket(fileno=descriptors[0]), _HEAD.unpack_from(message)[0], early)
