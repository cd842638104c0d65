"""What the workers of one `relay serve --workers N` tell each other: bytes in memory they share.

Each worker has one slot and is the only one who writes there, but for the supervisor, who clears
the slot of a dead one. A slot is a few 8-byte numbers, aligned, so that no reader sees half of one.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from relay.core.errors import StartError

BEAT_S = 0.25
# A worker that hangs is noticed within 2 s: this, and the beat it may have made just before.
PATIENCE_S = 1.5

# Lines that a worker writes to its supervisor.
READY, ERROR = "ready", "error "
# Messages of a supervisor to its workers: four bytes of length, then one of these or a Config.
REOPEN_LOG = b"reopen"
_PR_SET_PDEATHSIG = 1
# Whole cache lines a slot: a worker's beats do not disturb its neighbour's.
_SLOT = 16
_READY_AT, _CONNECTIONS, _INSTANCE, _LISTENS_AT, _DEAD = range(5)
_DEATHS = 5


class Siblings:
    """The slots of all workers, numbered from 1."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is that of `shared_memory`, which stays open."""
        self._map = mmap.mmap(descriptor, 0)
        self._cells = memoryview(self._map).cast("d")
        self.count = len(self._cells) // _SLOT

    def tell(self, number: int, connections: int) -> None:
        """How many clients this worker has."""
        self._cells[(number - 1) * _SLOT + _CONNECTIONS] = connections

    def beat(self, number: int, *, ready: bool) -> None:
        """This worker lives; a beat holds for PATIENCE_S."""
        # CLOCK_MONOTONIC is one clock for all processes of a host.
        self._cells[(number - 1) * _SLOT + _READY_AT] = time.monotonic() if ready else 0.0

    def listen(self, number: int, *, open: bool) -> None:
        """Record whether this worker's listeners are open, also while it stops."""
        self._cells[(number - 1) * _SLOT + _LISTENS_AT] = time.monotonic() if open else 0.0

    def first_listening(self) -> int | None:
        """Return the lowest number of a worker whose listeners are open."""
        for number in range(1, self.count + 1):
            if time.monotonic() - self._cells[(number - 1) * _SLOT + _LISTENS_AT] < PATIENCE_S:
                return number
        return None

    def clear(self, number: int) -> None:
        """The worker does not serve."""
        self.listen(number, open=False)
        self.beat(number, ready=False)
        self.tell(number, 0)

    def enter(self, number: int, instance: str) -> None:
        """The worker's name in Redis; it ends with eight random digits."""
        self._cells[(number - 1) * _SLOT + _INSTANCE] = _digits(instance)

    def number_of(self, instance: str) -> int | None:
        """The worker of this host that has this name; None if there is none that serves."""
        digits = _digits(instance)
        for number in range(1, self.count + 1):
            if self._cells[(number - 1) * _SLOT + _INSTANCE] == digits:
                return number if self.ready(number) else None
        return None

    def bury(self, number: int) -> None:
        """The worker has died. What it was called is remembered for a few more deaths, and so for
        longer than anything of it in Redis matters: after each, its successor waits longer."""
        self.clear(number)
        first = (number - 1) * _SLOT
        last = first + _DEAD + _DEATHS
        earlier = self._cells[first + _DEAD : last - 1].tolist()
        for cell, name in enumerate(earlier, first + _DEAD + 1):
            self._cells[cell] = name
        self._cells[first + _DEAD] = self._cells[first + _INSTANCE]
        self._cells[first + _INSTANCE] = 0.0

    def is_dead(self, instance: str) -> bool:
        """Whether it was a worker of this host that is known to have died."""
        digits = _digits(instance)
        return any(
            digits in self._cells[first + _DEAD : first + _DEAD + _DEATHS].tolist()
            for first in range(0, len(self._cells), _SLOT)
        )

    def ready(self, number: int) -> bool:
        """Whether it said so lately."""
        return time.monotonic() - self._cells[(number - 1) * _SLOT + _READY_AT] < PATIENCE_S

    def connections(self, number: int) -> int:
        """How many clients it has, those included that are just coming."""
        return int(self._cells[(number - 1) * _SLOT + _CONNECTIONS])

    def not_ready(self) -> list[int]:
        """The numbers of those who did not."""
        return [number for number in range(1, self.count + 1) if not self.ready(number)]


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker process was told by its supervisor."""

    number: int
    siblings: Siblings
    # Connections that siblings hand over come from the one, and go to them through the others.
    inbox: socket.socket
    outboxes: Mapping[int, socket.socket]

    @staticmethod
    def argument(number: int, memory: int, inbox: int, outboxes: Sequence[int]) -> str:
        """The value of --worker, with descriptors that are inherited."""
        return ":".join(map(str, (number, memory, os.getpid(), inbox, *outboxes)))

    @classmethod
    def parse(cls, text: str) -> Worker:
        """From `argument`. The process ends from now on with the one that started it."""
        number, memory, parent, inbox, *outboxes = (int(part) for part in text.split(":"))
        die_with_parent(parent)
        return cls(
            number,
            Siblings(memory),
            socket.socket(fileno=inbox),
            {index: socket.socket(fileno=each) for index, each in enumerate(outboxes, 1)},
        )

    @staticmethod
    def message(payload: bytes) -> bytes:
        """Return `payload` as written to a worker's standard input."""
        return len(payload).to_bytes(4, "big") + payload

    @staticmethod
    def first_message() -> bytes:
        """Read the first message of the supervisor, the configuration; blocks."""
        # Unbuffered: the messages that follow are read by the event loop.
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
    def say_ready() -> None:
        """The listeners are open."""
        print(READY, flush=True)  # noqa: T201  # the supervisor reads it

    @staticmethod
    def say_error(line: str) -> None:
        """Why this worker does not start; it ends with exit code 1."""
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
    """The kernel kills this process when `parent` dies, even by SIGKILL."""
    # Not SIGTERM: a port that is still being drained would keep the next relay from starting, and
    # clients resume without loss anyway.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It died before the kernel was asked.
        os._exit(1)


def _digits(instance: str) -> float:
    try:
        # 32 bits: a double holds them exactly.
        return float(int(instance.rpartition(":")[2], 16))
    except ValueError:
        return -1.0


def shared_memory(workers: int) -> int:
    """A descriptor for `Siblings`, to be inherited; nobody is ready yet."""
    if not hasattr(os, "memfd_create"):
        raise StartError("several workers need Linux: --workers 1")
    descriptor = os.memfd_create("relay-workers")
    os.ftruncate(descriptor, workers * _SLOT * 8)
    return descriptor
