"""Events that could not be sent, in a local file, until they can: in order, none lost, none twice.

`PATH` has one JSON object a line, oldest first; the producers of other languages append to it too.
`PATH.state` is the lock between processes and holds two numbers: how often the file was emptied,
and how many bytes at its start are delivered. `PATH.refused` collects lines that can never be
delivered, with the reason.

The lock is held for disk work only, never while something is sent. So two processes may send the
same lines at the same time; each line's uid makes that harmless, and as each begins with the first
line not known to be delivered, their order holds. Whoever is told later that a batch has arrived
finds by the first number that the file has been emptied meanwhile.
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

from producers.outgoing import OutgoingEvent, PublishFailed, outgoing

_STATE_BYTES = 42  # two numbers of 20 digits: always overwritten as a whole
_ANY_SIZE = 10**20
# A batch must get through a slow network within a publisher's limit.
BATCH_LINES = 100
BATCH_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class SpoolLine:
    """One line: the event, or None and what is wrong with it; and where the next one begins."""

    event: OutgoingEvent | None
    text: bytes
    reason: str
    end: int


@dataclass(frozen=True, slots=True)
class SpoolBatch:
    """The oldest lines that are not known to be delivered."""

    emptied: int
    lines: tuple[SpoolLine, ...]


class Spool:
    """One spool file, shared with every process that names the same path.

    All methods but `pending` work on the disk and block; whoever waits for the lock longer than
    `limit_s` gets PublishFailed.
    """

    def __init__(self, path: str | os.PathLike[str], *, limit_s: float, limit_bytes: int) -> None:
        self.path = Path(path)
        self._state = self.path.with_name(self.path.name + ".state")
        self._refused = self.path.with_name(self.path.name + ".refused")
        self._limit_s = limit_s
        self._limit_bytes = limit_bytes

    def pending(self) -> bool:
        """Whether something waits: a file whose lines are all delivered is emptied."""
        try:
            return self.path.stat().st_size > 0
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise PublishFailed(f"spool {self.path}: {exc}") from exc

    def append(self, event: OutgoingEvent) -> None:
        """Keep `event`, which has a uid: it is on the disk when this returns.

        PublishFailed where that cannot be; then nothing of it is in the file.
        """
        line = json.dumps(_plain(event), ensure_ascii=False).encode() + b"\n"
        with self._locked() as file:
            size = _whole(file)
            if size + len(line) > self._limit_bytes:
                raise PublishFailed(f"spool {self.path}: full, {size} bytes")
            if not size:
                self._begin_anew()
            try:
                _write(file, line, size)
                self._sync_folder(new=not size)
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise

    def batch(self) -> SpoolBatch:
        """The oldest lines, up to a limit; without lines where nothing waits."""
        with self._locked() as file:
            size = _whole(file)
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

    def done(self, batch: SpoolBatch, count: int) -> None:
        """The first `count` lines of `batch` are delivered, or kept with the refused."""
        if not count:
            return
        with self._locked() as file:
            size = _whole(file)
            emptied, done = self._read_state(size)
            if emptied != batch.emptied:
                return  # another process has delivered them all, and these are others
            done = max(done, batch.lines[count - 1].end)
            if done >= size:
                # The number first: a crash between the two leaves delivered lines to be sent once
                # more, which their uids make harmless; never new lines to be skipped.
                self._write_state(emptied + 1, 0)
                os.ftruncate(file.fileno(), 0)
                os.fsync(file.fileno())
            else:
                self._write_state(emptied, done)

    def refuse(self, line: SpoolLine, reason: str) -> None:
        """Keep a line that cannot be delivered, with the reason, for whoever looks."""
        kept = {"reason": reason, "line": line.text.decode(errors="replace").rstrip("\n")}
        with self._locked(), _open(self._refused) as file:
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(kept, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    # inner workings

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
                # Its holder may be stopped for good, and flock knows no time limit.
                if time.monotonic() > deadline:
                    raise PublishFailed(f"spool {self.path}: locked by others") from None
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

    def _begin_anew(self) -> None:
        # After `rm PATH` the number of delivered bytes would be one of another file.
        emptied, done = self._read_state(size=_ANY_SIZE)
        if done:
            self._write_state(emptied + 1, 0)

    def _sync_folder(self, *, new: bool) -> None:
        if new:  # its name must outlive a power cut too
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _open(path: Path) -> BinaryIO:
    # For its owner alone: events may hold anything.
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")


def _write(file: BinaryIO, line: bytes, size: int) -> None:
    if os.pwrite(file.fileno(), line, size) < len(line):
        raise OSError(ENOSPC, os.strerror(ENOSPC))  # there was room for a part of it
    os.fsync(file.fileno())


def _whole(file: BinaryIO) -> int:
    """The file's size, after a last line was cut off whose writer died while it wrote."""
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
    }
    return {name: value for name, value in values.items() if value is not None}


def _line(text: bytes, end: int) -> SpoolLine:
    try:
        found = json.loads(text)
        event = outgoing(
            found["channel"],
            found["data"],
            uid=found["uid"],
            type=found.get("type"),
            to=found.get("to"),
            client=found.get("client"),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        return SpoolLine(None, text, f"not a line of a spool: {exc}", end)
    if event.uid is None:
        return SpoolLine(None, text, "not a line of a spool: no uid", end)
    return SpoolLine(event, text, "", end)
