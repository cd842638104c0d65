"""Passes sockets to the other workers of this host (SCM_RIGHTS).

Two kinds of connections are passed:

- New connections, to even out the load. SO_REUSEPORT spreads connections by a hash. Measured on
  loopback, the fullest of 2, 4 and 8 workers had at worst 7, 15 and 24 % more than its share of
  1,000 connections, and after a worker has died, all of its clients are on the others.
- Connections whose request belongs to a session of another worker, together with the data that has
  been read. Passing a socket either succeeds or fails, so no request is ever carried out twice. If
  the other worker hangs, the request waits in its inbox; if it dies, its successor answers.

The sockets between the workers are inherited from the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.core.worker_memory import Worker

# Connections that a worker may have beyond the emptiest one. With less, workers would pass
# connections back and forth.
_SHARE, _COUNT = 1.03, 3
# Index of the listener, number of times that the request was passed on, length of the peer address.
_HEAD = struct.Struct("!BBB")
# More data is passed in a memory file, because a message must fit into the socket's buffer.
_INLINE_BYTES = 32768
# A message without a connection, which asks for the receiver's metrics.
_WRITE_METRICS = _HEAD.pack(255, 0, 0)
# Messages read in one turn of the event loop.
_BATCH = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedConnection:
    """A connection from another worker.

    `early` is the data that the other worker has read, empty for a new connection. `hops` counts
    how often the request was passed on. `peer` is set if `connection` is not the client's socket
    but leads to the worker that has it.
    """

    connection: socket.socket
    listener: int
    early: bytes = b""
    hops: int = 0
    peer: str = ""


Take = Callable[[PassedConnection], object]


class Balance:
    """One worker's connections to the others. `clients` returns its number of clients."""

    def __init__(self, worker: Worker, clients: Callable[[], int]) -> None:
        self._number = worker.number
        self._memory = worker.memory
        self._inbox = worker.inbox
        self._outboxes = worker.outboxes
        self._clients = clients
        # Since the last beat: connections that were received and may not be clients yet, and those
        # that were passed on and may not have been received yet.
        self._taken = 0
        self._known = 0
        # Called when another worker asks this one to write its metrics to the shared memory.
        self.on_metrics_wanted: Callable[[], object] = lambda: None
        self._given: Counter[int] = Counter()
        self._seen: Counter[int] = Counter()

    # ---- load -----------------------------------------------------------------------------------

    def beat(self) -> None:
        """Assume that all passed connections have arrived. Called periodically."""
        self._taken = 0
        self._given.clear()
        self.tell()

    def tell(self) -> None:
        """Publish the number of clients of this worker."""
        before, self._known = self._known, self._clients()
        self._taken = max(0, self._taken - max(0, self._known - before))
        self._memory.set_connections(self._number, self._known + self._taken)

    def give(self, connection: socket.socket) -> bool:
        """Pass a new connection to a worker that has clearly fewer clients.

        Return True if it was passed; the caller then closes its own descriptor.
        """
        mine = self._clients() + self._taken
        others = [
            (self._load(number), number)
            for number in self._outboxes
            if number != self._number and self._memory.ready(number)
        ]
        if others:
            least, number = min(others)
            new = PassedConnection(connection=connection, listener=0)
            if mine > least * _SHARE + _COUNT and self._send(number, new):
                self._given[number] += 1
                return True
        self._taken += 1
        self.tell()
        return False

    def _load(self, number: int) -> int:
        before, now = self._seen[number], self._memory.connections(number)
        self._seen[number] = now
        # An increase since the last look may be connections that were passed to it.
        self._given[number] = max(0, self._given[number] - max(0, now - before))
        return now + self._given[number]

    # ---- requests -------------------------------------------------------------------------------

    def is_sibling(self, owner: str) -> bool:
        """Return True if `owner` is another worker of this host that has not died."""
        return self._memory.number_of(owner) not in (None, self._number)

    def pass_on(self, owner: str, passed: PassedConnection) -> bool:
        """Pass a request to the worker with this address.

        Return False if it has died, or if its inbox is full.
        """
        number = self._memory.number_of(owner)
        return number not in (None, self._number) and self._send(number or 0, passed)

    def is_first(self) -> bool:
        """Return True if this worker is the first one of this host whose listeners are open."""
        return self._memory.first_listening() in (None, self._number)

    def pass_to_first(self, passed: PassedConnection) -> bool:
        """Pass a request to the first worker of this host whose listeners are open.

        Return False if this is that worker.
        """
        number = self._memory.first_listening()
        return number not in (None, self._number) and self._send(number or 0, passed)

    # ---- metrics --------------------------------------------------------------------------------

    def want_metrics(self, number: int) -> None:
        """Ask another worker to write its metrics to the shared memory."""
        with contextlib.suppress(OSError):
            # If its inbox is full, its last metrics are used.
            self._outboxes[number].send(_WRITE_METRICS)

    # ---- sockets --------------------------------------------------------------------------------

    def receive(self, take: Take) -> None:
        """Call `take` for each connection that other workers pass, until `stop`."""
        asyncio.get_running_loop().add_reader(self._inbox.fileno(), self._read, take)

    def stop(self) -> None:
        """Stop receiving. Connections in the inbox wait for this worker's successor."""
        asyncio.get_running_loop().remove_reader(self._inbox.fileno())

    def _send(self, number: int, passed: PassedConnection) -> bool:
        peer = passed.peer.encode()
        head = _HEAD.pack(passed.listener, passed.hops, len(peer)) + peer
        descriptors = [passed.connection.fileno()]
        with contextlib.ExitStack() as stack:
            try:
                if len(passed.early) > _INLINE_BYTES:
                    memory = os.memfd_create("relay-request")
                    stack.callback(os.close, memory)
                    os.write(memory, passed.early)
                    descriptors.append(memory)
                else:
                    head += passed.early
                socket.send_fds(self._outboxes[number], [head], descriptors)
            except OSError as exc:
                # Usually EAGAIN: the other worker does not keep up.
                _log.debug("Could not pass a connection to worker %d: %s", number, exc)
                return False
        return True

    def _read(self, take: Take) -> None:
        for _ in range(_BATCH):
            try:
                size = _HEAD.size + 255 + _INLINE_BYTES
                message, descriptors, _, _ = socket.recv_fds(self._inbox, size, 2)
            except BlockingIOError:
                return
            except OSError as exc:
                _log.warning("Lost a connection that another worker passed on: %s", exc)
                return
            if message == _WRITE_METRICS:
                self.on_metrics_wanted()
                continue
            if not descriptors:
                # This process has no free descriptor, so the kernel has closed the connection.
                return
            listener, hops, length = _HEAD.unpack_from(message)
            early = message[_HEAD.size + length :]
            if len(descriptors) > 1:
                early = _contents(descriptors[1])
            elif not early:
                self._taken += 1
                self.tell()
            take(
                PassedConnection(
                    connection=socket.socket(fileno=descriptors[0]),
                    listener=listener,
                    early=early,
                    hops=hops,
                    peer=message[_HEAD.size : _HEAD.size + length].decode(),
                )
            )


def _contents(descriptor: int) -> bytes:
    try:
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as memory:
            return memory[:]
    finally:
        os.close(descriptor)
