"""The file with the process ID, for sending signals."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from relay.core.errors import StartError


def write_error(path: str) -> str:
    """Return why the file cannot be written, or '' if it can. Changes nothing."""
    file = Path(path)
    if file.is_dir():
        return os.strerror(errno.EISDIR)
    if not file.parent.is_dir():
        return os.strerror(errno.ENOENT)
    place, needed = (file, os.W_OK) if file.exists() else (file.parent, os.W_OK | os.X_OK)
    return "" if os.access(place, needed) else os.strerror(errno.EACCES)


def outcome_path(path: str) -> Path:
    """Return the file in which `relay upgrade` finds the outcome, for a PID file."""
    return Path(f"{path}.upgrade")


def write_pid(path: str, file: int) -> None:
    """Write this process's ID to the open file. Raise StartError if that fails."""
    try:
        # Written before it is shortened, so that no reader finds it empty.
        os.ftruncate(file, os.pwrite(file, f"{os.getpid()}\n".encode(), 0))
    except OSError as exc:
        raise StartError(f"[node] pid_file: {path} cannot be written: {exc.strerror}") from exc


@contextlib.contextmanager
def pid_file(path: str, inherited: int | None = None) -> Iterator[int | None]:
    """Write this process's ID to the file, and remove the file at the end. '' means no file.

    Args:
        path: The file.
        inherited: The file's descriptor, locked by the relay that this process replaces. The caller
            writes this process's ID when it has taken over.

    Yields:
        The descriptor of the locked file.

    Raises:
        StartError: The file cannot be written, or belongs to a running process.
    """
    if not path:
        yield None
        return
    with _locked(path) if inherited is None else os.fdopen(inherited, "r+b") as file:
        try:
            yield file.fileno()
        finally:
            # Another process may have taken over.
            if os.pread(file.fileno(), 20, 0).strip() == str(os.getpid()).encode():
                outcome_path(path).unlink(missing_ok=True)
                Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[BinaryIO]:
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
    except OSError as exc:
        raise StartError(f"[node] pid_file: {path} cannot be written: {exc.strerror}") from exc
    with file:
        try:
            # The kernel releases the lock when this process ends, even if it is killed.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file.fileno(), 20).decode(errors="replace").strip()
            raise StartError(
                f"[node] pid_file: {path} belongs to process {owner}, which is running; stop it or"
                " name another file"
            ) from None
        write_pid(path, file.fileno())
        yield file
