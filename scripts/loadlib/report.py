"""Prints results as Markdown tables, and as JSON for later comparison."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def say(text: str = "") -> None:
    """Print one line to standard output and flush it."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def percentile(sorted_values: Sequence[float], share: float) -> float:
    """Return the percentile `share` (0 to 1), computed as wsink does. Return 0 for no values."""
    return sorted_values[int((len(sorted_values) - 1) * share)] if sorted_values else 0.0


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a Markdown table. The columns are the keys of all rows."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    for number, line in enumerate(cells):
        parts = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        say(f"| {' | '.join(parts)} |")
        if not number:
            say(f"| {' | '.join('-' * width for width in widths)} |")


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def machine() -> dict[str, Any]:
    """Describe the test machine. The result contains no host name and no path."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit,
    }


def finish(command: str, options: Mapping[str, Any], rows: Sequence[Any], out: str) -> None:
    """Write the JSON to the file `out`, or print it on one line if `out` is empty."""
    text = json.dumps(
        {"command": command, "options": dict(options), "machine": machine(), "rows": list(rows)}
    )
    if out:
        Path(out).write_text(text + "\n")
        say(f"\nJSON written to {out}")
    else:
        say("\n" + text)
