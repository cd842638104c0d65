"""Shared memory of the workers of one `relay serve --workers N`.

Each worker has one slot, which only that worker writes; the supervisor clears it when the worker
dies. A slot consists of aligned 8-byte numbers, so that a reader never sees a partial write.
After the slots, each worker has two buffers for its metrics, which it writes in turn. They survive
the worker, so that its successor continues its counters.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from relay.core.errors import StartError

BEAT_S = 0.25
# A worker that hangs is detected within 2 s: this time plus the interval of its beats.
PATIENCE_S = 1.5

# Lines that a worker writes to its supervisor.
READY, ERROR = "ready", "error "
# Messages of a supervisor to its workers: four bytes of length, then one of these, or a Config.
REOPEN_LOG = b"reopen"
# Followed by the instance name of a worker that has died.
DIED = b"died "
# Send the listening sockets to the supervisor. Later: another relay has them, so stop.
SEND_SOCKETS, HANDED_OVER = b"send sockets", b"handed over"
_PR_SET_PDEATHSIG = 1
# A slot has the size of whole cache lines, so that workers do not invalidate each other's caches.
_SLOT = 16
_READY_AT, _CONNECTIONS, _INSTANCE, _LISTENS_AT, _DEAD = range(5)
_DEATHS = 5
# How often the metrics were written, and the length of each of the two buffers.
_METRICS_COUNT = _DEAD + _DEATHS
_METRICS_SIZES = _METRICS_COUNT + 1
# The kernel provides only the pages that are used.
_METRICS_BYTES = 1 << 19


class WorkerMemory:
    """The slots of all workers, numbered from 1."""

    def __init__(self, descriptor: int) -> None:
        """Map the memory of `descriptor`, which `shared_memory` returned and which stays open."""
        self._map = mmap.mmap(descriptor, 0)
        self._bytes = memoryview(self._map)
        self.count = len(self._bytes) // (_SLOT * 8 + 2 * _METRICS_BYTES)
        self._cells = self._bytes[: self.count * _SLOT * 8].cast("d")

    def set_connections(self, number: int, connections: int) -> None:
        """Store the number of this worker's clients."""
        self._cells[(number - 1) * _SLOT + _CONNECTIONS] = connections

    def beat(self, number: int, *, ready: bool) -> None:
        """Report this worker as ready for PATIENCE_S, or as not ready."""
        # CLOCK_MONOTONIC is one clock for all processes of a host.
        self._cells[(number - 1) * _SLOT + _READY_AT] = time.monotonic() if ready else 0.0

    def set_listening(self, number: int, *, open: bool) -> None:
        """Record whether this worker's listeners are open, also while it stops."""
        self._cells[(number - 1) * _SLOT + _LISTENS_AT] = time.monotonic() if open else 0.0

    def first_listening(self) -> int | None:
        """Return the lowest number of a worker whose listeners are open."""
        for number in range(1, self.count + 1):
            if time.monotonic() - self._cells[(number - 1) * _SLOT + _LISTENS_AT] < PATIENCE_S:
                return number
        return None

    def clear(self, number: int) -> None:
        """Mark the worker as not serving."""
        self.set_listening(number, open=False)
        self.beat(number, ready=False)
        self.set_connections(number, 0)

    def register(self, number: int, instance: str) -> None:
        """Store the worker's instance name, which ends with eight random digits."""
        self._cells[(number - 1) * _SLOT + _INSTANCE] = _digits(instance)

    def number_of(self, instance: str) -> int | None:
        """Return the number of the worker with this instance name or address, or None.

        The worker may be stopping or hanging, but it has not died.
        """
        digits = _digits(instance)
        for number in range(1, self.count + 1):
            if self._cells[(number - 1) * _SLOT + _INSTANCE] == digits:
                return number
        return None

    def mark_dead(self, number: int) -> str:
        """Mark the worker as dead and keep its instance name for the next `_DEATHS` deaths.
        Return the eight random digits of the name, '' if it has stored none.

        The supervisor increases the delay before each restart, so that the name is kept until all
        data of the dead worker in Redis has expired.
        """
        self.clear(number)
        first = (number - 1) * _SLOT
        last = first + _DEAD + _DEATHS
        earlier = self._cells[first + _DEAD : last - 1].tolist()
        for cell, name in enumerate(earlier, first + _DEAD + 1):
            self._cells[cell] = name
        dead = self._cells[first + _INSTANCE]
        self._cells[first + _DEAD] = dead
        self._cells[first + _INSTANCE] = 0.0
        return f"{int(dead):08x}" if dead else ""

    def is_dead(self, instance: str) -> bool:
        """Return True if the instance was a worker of this host that has died."""
        digits = _digits(instance)
        return any(
            digits in self._cells[first + _DEAD : first + _DEAD + _DEATHS].tolist()
            for first in range(0, len(self._cells), _SLOT)
        )

    def ready(self, number: int) -> bool:
        """Return True if the worker has reported ready within PATIENCE_S."""
        return time.monotonic() - self._cells[(number - 1) * _SLOT + _READY_AT] < PATIENCE_S

    def connections(self, number: int) -> int:
        """Return the number of the worker's clients, including those being handed over to it."""
        return int(self._cells[(number - 1) * _SLOT + _CONNECTIONS])

    def is_running(self, number: int) -> bool:
        """Return True if the worker has registered and not died. It may hang."""
        return self._cells[(number - 1) * _SLOT + _INSTANCE] != 0.0

    def metrics_count(self, number: int) -> int:
        """Return how often the worker and its predecessors have written their metrics."""
        return int(self._cells[(number - 1) * _SLOT + _METRICS_COUNT])

    def set_metrics(self, number: int, data: bytes) -> bool:
        """Store the metrics of this worker. Return False if they do not fit."""
        if len(data) > _METRICS_BYTES:
            return False
        count = self.metrics_count(number) + 1
        first = (number - 1) * _SLOT
        at = self._metrics_at(number, count)
        self._bytes[at : at + len(data)] = data
        self._cells[first + _METRICS_SIZES + count % 2] = len(data)
        # From now on, others read this buffer.
        self._cells[first + _METRICS_COUNT] = count
        return True

    def metrics(self, number: int) -> bytes:
        """Return the metrics that the worker has stored last, empty if there are none."""
        while True:
            count = self.metrics_count(number)
            size = int(self._cells[(number - 1) * _SLOT + _METRICS_SIZES + count % 2])
            at = self._metrics_at(number, count)
            data = bytes(self._bytes[at : at + size])
            # The worker writes the other buffer next, and this one only after that.
            if self.metrics_count(number) <= count + 1:
                return data

    def _metrics_at(self, number: int, count: int) -> int:
        buffer = 2 * (number - 1) + count % 2
        return self.count * _SLOT * 8 + buffer * _METRICS_BYTES

    def not_ready(self) -> list[int]:
        """Return the numbers of the workers that are not ready."""
        return [number for number in range(1, self.count + 1) if not self.ready(number)]


@dataclass(frozen=True, slots=True)
class Worker:
    """Number, shared memory and sockets that the supervisor passes to a worker process."""

    number: int
    memory: WorkerMemory
    # Sockets for handing over connections: from other workers, and to each of them by number.
    inbox: socket.socket
    outboxes: Mapping[int, socket.socket]
    # Socket for sending the listening sockets to the supervisor.
    upward: socket.socket | None = None
    # Listening sockets that relay has inherited: descriptor, name, and whether another process
    # keeps it open.
    inherited: Sequence[tuple[int, str, bool]] = ()
    # Whether the workers of another relay still serve.
    is_upgrade: bool = False

    @staticmethod
    def argument(
        number: int,
        memory: int,
        inbox: int,
        outboxes: Sequence[int],
        upward: int,
        inherited: Sequence[tuple[int, str, bool]],
        *,
        is_upgrade: bool,
    ) -> str:
        """Return the value of --worker, which contains inherited descriptors."""
        own = ":".join(map(str, (number, memory, os.getpid(), inbox, *outboxes)))
        return f"{own} {json.dumps([upward, inherited, is_upgrade])}"

    @classmethod
    def parse(cls, text: str) -> Worker:
        """Parse the value of --worker. From now on, this process dies with its supervisor."""
        own, _, rest = text.partition(" ")
        number, memory, parent, inbox, *outboxes = (int(part) for part in own.split(":"))
        upward, inherited, is_upgrade = json.loads(rest)
        die_with_parent(parent)
        return cls(
            number,
            WorkerMemory(memory),
            socket.socket(fileno=inbox),
            {index: socket.socket(fileno=each) for index, each in enumerate(outboxes, 1)},
            socket.socket(fileno=upward),
            inherited,
            is_upgrade,
        )

    @staticmethod
    def message(payload: bytes) -> bytes:
        """Return `payload` as written to a worker's standard input."""
        return len(payload).to_bytes(4, "big") + payload

    @staticmethod
    def first_message() -> bytes:
        """Read the first message of the supervisor, the configuration; blocks."""
        # Read without a buffer, because the event loop reads the following messages.
        size = int.from_bytes(_read_exactly(4), "big")
        return _read_exactly(size)

    @staticmethod
    async def messages() -> AsyncIterator[bytes]:
        """Yield the further messages of the supervisor until it ends."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb", 0, closefd=False)
        )
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big")
                yield await reader.readexactly(size)
        except asyncio.IncompleteReadError:
            return
        finally:
            transport.close()

    @staticmethod
    def report_ready() -> None:
        """Report to the supervisor that the listeners are open."""
        print(READY, flush=True)  # noqa: T201  # the supervisor reads it

    @staticmethod
    def report_error(line: str) -> None:
        """Report to the supervisor why this worker cannot start."""
        print(f"{ERROR}{line}", flush=True)  # noqa: T201  # the supervisor reads it


def _read_exactly(size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = os.read(0, size - len(data))
        if not chunk:
            # The supervisor has ended.
            os._exit(1)
        data += chunk
    return data


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when `parent` dies, even by SIGKILL."""
    # Use SIGKILL: while a worker drained its clients, its port would keep the next relay from
    # starting. Clients resume without loss in any case.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # The parent died before prctl().
        os._exit(1)


def _digits(instance: str) -> float:
    try:
        # A double represents 32 bits exactly.
        return float(int(instance.rpartition(":")[2], 16))
    except ValueError:
        return -1.0


def shared_memory(workers: int) -> int:
    """Create the memory of `WorkerMemory` and return its descriptor, to be inherited."""
    if not hasattr(os, "memfd_create"):
        raise StartError("several workers per host need Linux; use --workers 1")
    descriptor = os.memfd_create("relay-workers")
    os.ftruncate(descriptor, workers * (_SLOT * 8 + 2 * _METRICS_BYTES))
    return descriptor
