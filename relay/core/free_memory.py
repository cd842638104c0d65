"""Memory that is left for this process, as reported by Linux for the host and its control groups.

A container or a systemd unit with `MemoryMax` is a control group (version 2) with its own limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
# Below this much, or this share of the limit if that is less, memory is short.
_SHORT_BYTES, _SHORT_SHARE = 256 << 20, 0.05


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Available bytes, and the limit of the host or control group that has the fewest left."""

    free: int
    limit: int

    @property
    def short_below(self) -> float:
        """Number of available bytes below which memory is short."""
        return min(_SHORT_BYTES, self.limit * _SHORT_SHARE)


def free_memory(proc: Path = Path("/proc"), groups: Path = _GROUPS) -> FreeMemory | None:
    """Return the memory that is left, or None if the system has no such figures."""
    found = [*_of_host(proc), *_of_groups(proc, groups)]
    return min(found, key=lambda each: each.free - each.short_below, default=None)


def _of_host(proc: Path) -> Iterator[FreeMemory]:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        figures = {name: int(rest.split()[0]) << 10 for name, _, rest in _split(lines, ":")}
        yield FreeMemory(figures["MemAvailable"], figures["MemTotal"])
    except (OSError, ValueError, KeyError, IndexError):
        return


def _of_groups(proc: Path, groups: Path) -> Iterator[FreeMemory]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for number, _, rest in _split(lines, ":"):
        if number != "0":
            # Version 1.
            continue
        folder = groups / rest.partition(":")[2].strip("/")
        for each in (folder, *folder.parents):
            yield from _of_group(each)
            if each == groups:
                break


def _of_group(folder: Path) -> Iterator[FreeMemory]:
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        # The kernel drops these pages of files when memory is needed.
        cached = {name: int(value) for name, _, value in _split(lines, " ")}["inactive_file"]
        yield FreeMemory(limit - used + cached, limit)
    except (OSError, ValueError, KeyError):
        # "max" is no limit, and the topmost group has no files.
        return


def _split(lines: list[str], separator: str) -> Iterator[tuple[str, str, str]]:
    return (line.partition(separator) for line in lines)
