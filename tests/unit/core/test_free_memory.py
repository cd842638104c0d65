"""Memory that is left, from files in the format of the Linux kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay.core.free_memory import FreeMemory, free_memory

MB = 1 << 20


def host(proc: Path, available_mb: int, group: str = "/") -> None:
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(f"4:memory:/v1\n0::{group}\n")
    (proc / "meminfo").write_text(
        f"MemTotal:       16384000 kB\nMemFree: 1 kB\nMemAvailable:   {available_mb * 1024} kB\n"
    )


def limit(folder: Path, most: str, used_mb: int, cached_mb: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used_mb * MB}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached_mb * MB}\nfile 7\n")


def test_a_host_without_limits(tmp_path: Path) -> None:
    host(tmp_path / "proc", 3000)
    limit(tmp_path / "groups", "max", 900, 0)
    found = free_memory(tmp_path / "proc", tmp_path / "groups")
    assert found == FreeMemory(3000 * MB, 16_384_000 * 1024)
    assert found.short_below == 256 * MB


@pytest.mark.parametrize("group", ["/", "/system.slice/relay.service", "/relay/worker"])
def test_the_limit_of_a_container_counts_without_pages_of_files(tmp_path: Path, group: str) -> None:
    host(tmp_path / "proc", 3000, group)
    own = tmp_path / "groups" / group.strip("/")
    limit(own, "max", 0, 0)
    # The limit may be that of the group or of one above it.
    limit(own if group == "/" else own.parent, str(400 * MB), 380, 30)
    found = free_memory(tmp_path / "proc", tmp_path / "groups")
    assert found == FreeMemory(50 * MB, 400 * MB)
    assert found.short_below == 20 * MB


def test_a_system_without_these_files(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path) is None


def test_this_system() -> None:
    found = free_memory()
    assert found is None or 0 < found.free <= found.limit
