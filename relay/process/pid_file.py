"""The file with the process ID, for sending signals."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

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


@contextlib.contextmanager
def pid_file(path: str) -> Iterator[None]:
    """Write this process's ID to the file, and remove the file at the end. '' means no file.

    Raises:
        StartError: The file cannot be written, or belongs to a running process.
    """
    if not path:
        yield
        return
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as exc:
        raise StartError(f"[node] pid_file: {path} cannot be written: {exc.strerror}") from exc
    try:
        try:
            # The kernel releases the lock when this process ends, even if it is killed.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 20).decode(errors="replace").strip()
            raise StartError(
                f"[node] pid_file: {path} belongs to process {owner}, which is running; stop it or"
                " name another file"
            ) from None
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        except OSError as exc:
            raise StartError(f"[node] pid_file: {path} cannot be written: {exc.strerror}") from exc
        try:
            yield
        finally:
            Path(path).unlink(missing_ok=True)
    finally:
        os.close(file)
