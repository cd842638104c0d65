"""`relay upgrade`: replace the running relay by the version that is installed now."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import time
from pathlib import Path

from relay.cli.configured import configuration
from relay.core.errors import ConfigError, RelayError
from relay.process.handover import READY_S, STARTED_S
from relay.process.pid_file import outcome_path

_POLL_S = 0.1
# The new relay reports that it is not ready before this ends.
_LIMIT_S = STARTED_S + READY_S + 10.0


def upgrade(options: argparse.Namespace) -> int:
    """Send SIGUSR2 to the running relay and wait for the outcome."""
    path = configuration(options).node.pid_file
    if not path:
        raise ConfigError("[node] pid_file is not set; set it, or send SIGUSR2 to relay yourself")
    outcome = outcome_path(path)
    # Before the process ID is read, so that the end of another upgrade is not missed.
    earlier = _version(outcome)
    pid = _running(Path(path))
    if not _handles_upgrades(pid):
        raise RelayError(f"process {pid} is a version that cannot be replaced; restart it")
    os.kill(pid, signal.SIGUSR2)
    end = time.monotonic() + _LIMIT_S
    # The file of an earlier upgrade stays, because its `relay upgrade` may not have read it yet.
    while _version(outcome) == earlier:
        if not _exists(pid) and _version(outcome) == earlier:
            raise RelayError(f"process {pid} has ended before another one had taken over")
        if time.monotonic() > end:
            raise RelayError(f"process {pid} has not replaced itself within {_LIMIT_S:g} s")
        time.sleep(_POLL_S)
    line = outcome.read_text().strip()
    if line:
        raise RelayError(line)
    print(f"Process {_running(Path(path))} serves; process {pid} asks its clients to reconnect")
    return 0


def _running(path: Path) -> int:
    """Return the process ID of the relay that has locked the file."""
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read(20))
    except (OSError, ValueError) as exc:
        raise RelayError(f"[node] pid_file: {path} cannot be read: {exc}") from exc
    raise RelayError(f"[node] pid_file: {path} belongs to no running relay")


def _version(path: Path) -> tuple[int, int] | None:
    """Return a value that changes when the file is replaced. None if there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _handles_upgrades(pid: int) -> bool:
    """Return whether the process handles SIGUSR2, whose default action would end it.

    While relay starts, it blocks the signal, and handles it afterwards.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        # Without /proc.
        return True
    masks = [line.split()[1] for line in lines if line.startswith(("SigCgt:", "SigBlk:"))]
    return any(int(mask, 16) >> (signal.SIGUSR2 - 1) & 1 for mask in masks)
