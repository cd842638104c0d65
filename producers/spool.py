"""A local file of events that could not be sent. They keep their order; none is lost or sent twice.

`PATH` has one JSON object per line, oldest first. Producers in other languages append to it too.
`PATH.state` is the lock between processes. It contains two numbers: how often the file was emptied,
and how many bytes at its start were delivered. `PATH.refused` collects lines that can never be
delivered, with the reason.

The lock is held during disk operations only, not while events are sent. Two processes may therefore
send the same lines at the same time. The lines' uids prevent duplicates, and the order is kept,
because both start with the first line that is not marked as delivered. The first number in
`PATH.state` shows a process that the file was emptied while it was sending a batch.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import BinaryIO

from producers.outgoing import OutgoingEvent, PublishFailed, outgoing_event

_STATE_BYTES = 42  # two numbers of 20 digits, so that a write always replaces all of it
_ANY_SIZE = 10**20
# A slow network must be able to transfer a batch within a publisher's time limit.
BATCH_LINES = 100
BATCH_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class SpoolLine:
    """One line. `event` is None if the line is invalid; `end` is the offset of the next line."""

    event: OutgoingEvent | None
    text: bytes
    reason: str
    end: int


@dataclass(frozen=True, slots=True)
class SpoolBatch:
    """The oldest lines that are not marked as delivered."""

    emptied: int
    lines: tuple[SpoolLine, ...]


class Spool:
    """One spool file, shared by all processes that use the same path.

    All methods except `pending` block on disk operations. They raise PublishFailed if the lock is
    not free within `limit_s`.
    """

    def __init__(self, path: str | os.PathLike[str], *, limit_s: float, limit_bytes: int) -> None:
        self.path = Path(path)
        self._state = self.path.with_name(self.path.name + ".state")
        self._refused = self.path.with_name(self.path.name + ".refused")
        self._limit_s = limit_s
        self._limit_bytes = limit_bytes

    def pending(self) -> bool:
        """Return True if the spool has undelivered lines."""
        try:
            return self.path.stat().st_size > 0
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise PublishFailed(f"spool {self.path}: {exc}") from exc

    def append(self, event: OutgoingEvent) -> None:
        """Append `event`, which must have a uid, and wait until it is on the disk.

        Raises:
            PublishFailed: The event could not be written. The file is unchanged.
        """
        line = json.dumps(_plain(event), ensure_ascii=False).encode() + b"\n"
        with self._locked() as file:
            size = _size_of_whole_lines(file)
            if size + len(line) > self._limit_bytes:
                raise PublishFailed(f"spool {self.path}: full, {size} bytes")
            if not size:
                self._reset_offset()
            try:
                _write(file, line, size)
                self._sync_folder(new=not size)
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise

    def batch(self) -> SpoolBatch:
        """Return the oldest undelivered lines, up to a limit; no lines if there are none."""
        with self._locked() as file:
            size = _size_of_whole_lines(file)
            emptied, done = self._read_state(size)
            lines: list[SpoolLine] = []
            file.seek(done)
            while done < size and len(lines) < BATCH_LINES:
                text = file.readline()
                if lines and done + len(text) - (lines[0].end - len(lines[0].text)) > BATCH_BYTES:
                    break
                done += len(text)
                lines.append(_line(text, done))
            return SpoolBatch(emptied, tuple(lines))

    def mark_delivered(self, batch: SpoolBatch, count: int) -> None:
        """Remove the first `count` lines of `batch`, which were delivered or rejected."""
        if not count:
            return
        with self._locked() as file:
            size = _size_of_whole_lines(file)
            emptied, done = self._read_state(size)
            if emptied != batch.emptied:
                return  # another process delivered these lines; the file contains newer ones
            done = max(done, batch.lines[count - 1].end)
            if done >= size:
                # Write the state first. After a crash between the two steps, delivered lines are
                # sent again, which their uids make harmless, but no new line is skipped.
                self._write_state(emptied + 1, 0)
                os.ftruncate(file.fileno(), 0)
                os.fsync(file.fileno())
            else:
                self._write_state(emptied, done)

    def reject(self, line: SpoolLine, reason: str) -> None:
        """Append a line that can never be delivered to `PATH.refused`, with the reason."""
        kept = {"reason": reason, "line": line.text.decode(errors="replace").rstrip("\n")}
        with self._locked(), _open(self._refused) as file:
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(kept, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        try:
            with _open(self._state) as state:
                self._lock(state)
                with _open(self.path) as file:
                    yield file
        except OSError as exc:
            raise PublishFailed(f"spool {self.path}: {exc}") from exc

    def _lock(self, state: BinaryIO) -> None:
        deadline = time.monotonic() + self._limit_s
        while True:
            try:
                fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                # The holder may hang, and flock has no time limit.
                if time.monotonic() > deadline:
                    raise PublishFailed(f"spool {self.path}: locked by another process") from None
                time.sleep(0.002)

    def _read_state(self, size: int) -> tuple[int, int]:
        words = self._state.read_bytes().split()
        if len(words) != 2 or not all(word.isdigit() for word in words):
            return 0, 0
        emptied, done = int(words[0]), int(words[1])
        return emptied, done if done <= size else 0

    def _write_state(self, emptied: int, done: int) -> None:
        with self._state.open("r+b") as file:
            file.write(b"%020d %020d\n" % (emptied, done))
            file.truncate(_STATE_BYTES)
            file.flush()
            os.fsync(file.fileno())

    def _reset_offset(self) -> None:
        # After `rm PATH` the number of delivered bytes refers to the deleted file.
        emptied, done = self._read_state(size=_ANY_SIZE)
        if done:
            self._write_state(emptied + 1, 0)

    def _sync_folder(self, *, new: bool) -> None:
        if new:  # the directory entry must survive a power failure as well
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _open(path: Path) -> BinaryIO:
    # Readable by the owner only, since events may contain private data.
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")


def _write(file: BinaryIO, line: bytes, size: int) -> None:
    if os.pwrite(file.fileno(), line, size) < len(line):
        raise OSError(ENOSPC, os.strerror(ENOSPC))  # the disk had room for a part of the line only
    os.fsync(file.fileno())


def _size_of_whole_lines(file: BinaryIO) -> int:
    """Remove an incomplete last line, whose writer died, and return the file's size."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return 0
    start = size
    while start and os.pread(file.fileno(), 1, start - 1) != b"\n":
        start = max(start - 65536, 0)
        start += os.pread(file.fileno(), 65536, start)[: size - start].rfind(b"\n") + 1
    if start < size:
        os.ftruncate(file.fileno(), start)
    return start


def _plain(event: OutgoingEvent) -> dict[str, object]:
    values = {
        "uid": event.uid,
        "channel": event.channel,
        "data": event.data.decode(),
        "type": event.type,
        "to": None if event.to is None else list(event.to),
        "client": event.client,
        "durability": None if event.durability is None else str(event.durability),
    }
    return {name: value for name, value in values.items() if value is not None}


def _line(text: bytes, end: int) -> SpoolLine:
    try:
        found = json.loads(text)
        event = outgoing_event(
            found["channel"],
            found["data"],
            uid=found["uid"],
            type=found.get("type"),
            to=found.get("to"),
            client=found.get("client"),
            durability=found.get("durability"),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        return SpoolLine(None, text, f"invalid spool line: {exc}", end)
    if event.uid is None:
        return SpoolLine(None, text, "invalid spool line: no uid", end)
    return SpoolLine(event, text, "", end)
