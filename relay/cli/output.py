"""What people and scripts read: aligned tables, one JSON object a line, progress on a terminal."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import orjson

from relay.core.model import EntryID

# Also the C1 controls, and those that turn the direction of text: all of them let an entry forge
# what an operator's terminal shows.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PROGRESS_S = 0.2


def safe(text: str) -> str:
    """`text` on one line, control characters escaped."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def emit(value: dict[str, Any]) -> None:
    """One JSON object as a line."""
    sys.stdout.write(orjson.dumps(value).decode() + "\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Columns two spaces apart; those numbered in `right` are aligned to the right.

    A row with one cell is a remark across the columns.
    """
    lines = [list(head), *[[safe(cell) for cell in row] for row in rows]]
    full = [line for line in lines if len(line) == len(head)]
    widths = [max(len(line[column]) for line in full) for column in range(len(head))]
    for line in lines:
        cells = line
        if len(line) == len(head):
            cells = [
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def say(text: str) -> None:
    """One line on standard error."""
    sys.stdout.flush()
    sys.stderr.write(f"relay: {safe(text)}\n")
    sys.stderr.flush()


def duration(ms: float | None) -> str:
    """Short, for people: `12 ms`, `3.4 s`, `5 min`, `2.5 h`, `7 d`."""
    if ms is None:
        return "-"
    if ms < 1000:
        return f"{ms:.0f} ms"
    for unit, size, limit in (("s", 1e3, 6e4), ("min", 6e4, 3.6e6), ("h", 3.6e6, 8.64e7)):
        if ms < limit:
            return f"{_short(ms / size)} {unit}"
    return f"{_short(ms / 8.64e7)} d"


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0") if number < 10 else f"{number:.0f}"


def optional(entry_id: EntryID | None) -> str | None:
    """For JSON."""
    return None if entry_id is None else str(entry_id)


class Progress:
    """A count that grows in place on a terminal's standard error; silent everywhere else."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._on = sys.stderr.isatty()
        # Short work shows none.
        self._due = time.monotonic() + _PROGRESS_S
        self._shown = False

    def __call__(self, count: int) -> None:
        """So many are done."""
        if self._on and time.monotonic() >= self._due:
            self._due = time.monotonic() + _PROGRESS_S
            self._shown = True
            sys.stderr.write(f"\r{count:,} {self._what} ... ")
            sys.stderr.flush()

    def end(self) -> None:
        """Takes the line away."""
        if self._shown:
            self._shown = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
