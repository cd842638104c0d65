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
from relay.process.handover import READY_S
from relay.process.pid_file import outcome_path

_POLL_S = 0.1
# The new relay reports that it is not ready before this ends.
_LIMIT_S = READY_S + 10.0


def upgrade(options: argparse.Namespace) -> int:
    """Send SIGUSR2 to the running relay and wait for the outcome."""
    path = configuration(options).node.pid_file
    if not path:
        raise ConfigError("[node] pid_file is not set; set it, or send SIGUSR2 to relay yourself")
    pid = _running(Path(path))
    if not _handles_upgrades(pid):
        raise RelayError(f"process {pid} is a version that cannot be replaced; restart it")
    outcome = outcome_path(path)
    outcome.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR2)
    end = time.monotonic() + _LIMIT_S
    while not outcome.exists():
        if not _exists(pid) and not outcome.exists():
            raise RelayError(f"process {pid} has ended before another one had taken over")
        if time.monotonic() > end:
            raise RelayError(f"process {pid} has not replaced itself within {_LIMIT_S:g} s")
        time.sleep(_POLL_S)
    # The file stays, because another `relay upgrade` may be waiting for the same upgrade.
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


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _handles_upgrades(pid: int) -> bool:
    """Return whether the process handles SIGUSR2, whose default action would end it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        # Without /proc.
        return True
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signal.SIGUSR2 - 1) & 1)
