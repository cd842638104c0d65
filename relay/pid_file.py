"""The file that names the process to signal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from relay.errors import StartError


@contextlib.contextmanager
def pid_file(path: str) -> Iterator[None]:
    """The file holds this process's number inside; '' for none. StartError where it cannot be."""
    if not path:
        yield
        return
    file = Path(path)
    try:
        file.write_text(f"{os.getpid()}\n")
    except OSError as exc:
        raise StartError(f"[node] pid_file: {path} cannot be written: {exc.strerror}") from exc
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
