"""Output of operators' commands: tables, JSON lines, messages and progress.

rich is imported only by the functions that need it, because it is slow to import.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from rich.status import Status

# Control characters (C0 and C1), line separators, and characters that change the direction of
# text: an entry could use any of them to forge lines on the operator's terminal.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PROGRESS_S = 0.2


def safe(text: str) -> str:
    """Return `text` on one line, with control characters escaped."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def emit(value: dict[str, Any]) -> None:
    """Print one JSON object as a line: in UTF-8, or in ASCII if the terminal uses neither."""
    is_utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
    text = orjson.dumps(value).decode() if is_utf8 else json.dumps(value, separators=(",", ":"))
    sys.stdout.write(text + "\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print a table. The columns numbered in `right` are aligned to the right.

    A row with one cell is a remark about the previous row and may be wider than its column.
    """
    # Don't use rich.table: it takes 90 times as long, 1.2 ms for a row of eight cells, and there
    # may be 100,000 streams.
    from rich.cells import cell_len

    lines = [list(head), *([safe(cell) for cell in row] for row in rows)]
    widths = [0] * len(head)
    for line in lines:
        if len(line) == len(head):
            widths = [max(width, cell_len(cell)) for width, cell in zip(widths, line, strict=True)]
    for line in lines:
        if len(line) == len(head):
            for column, width in enumerate(widths):
                space = " " * (width - cell_len(line[column]))
                line[column] = space + line[column] if column in right else line[column] + space
        sys.stdout.write("  ".join(line).rstrip() + "\n")


def say(text: str) -> None:
    """Print one line on standard error."""
    sys.stdout.flush()
    sys.stderr.write(f"relay: {safe(text)}\n")
    sys.stderr.flush()


def duration(ms: float | None) -> str:
    """Return a short text such as `12 ms`, `3.4 s`, `5 min`, `2.5 h` or `7 d`."""
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


class Progress:
    """Number of processed items, shown on standard error if that is a terminal.

    Commands that take less than a fifth of a second show nothing.
    """

    def __init__(self, items: str) -> None:
        self._items = items
        self._is_terminal = sys.stderr.isatty()
        self._next_s = time.monotonic() + _PROGRESS_S
        self._status: Status | None = None

    def __call__(self, count: int) -> None:
        """Show that `count` items have been processed."""
        if not self._is_terminal or time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + _PROGRESS_S
        text = f"{count:,} {self._items}"
        if self._status is None:
            from rich.console import Console

            self._status = Console(stderr=True).status(text)
            self._status.start()
        else:
            self._status.update(text)

    def end(self) -> None:
        """Remove the line."""
        if self._status is not None:
            self._status.stop()
            self._status = None
