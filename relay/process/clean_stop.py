"""Proof that a restart of the embedded Valkey has lost nothing.

Redis has a new replication ID after each start, and its exit code says nothing: Valkey ends with 0
on SIGTERM although the last entries could not be written. Therefore relay stops all writes, checks
that Valkey has written everything, and signs the files off after it has ended. The next start
compares the files with that record before Valkey opens them.

The record proves one restart, also if the folder is set back to a copy or a snapshot later. It has
inodes and change times, and a random number that is stored in the memory of the machine. Both are
deleted before Valkey starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from relay.stream.connection.primary import certificate_of

_RECORD, _CONTINUED = "clean-stop.json", "replication.json"
# In memory on Linux: not part of a snapshot of the data folder, and gone after a reboot.
_MEMORY = Path("/dev/shm")  # noqa: S108  # files there are opened exclusively
_MANIFEST_LINE = re.compile(r"^file (\S+) seq \d+ type ([bi])\b", re.MULTILINE)
# Streams that were not read for so many restarts are reported as possibly incomplete.
_MOST_CERTIFICATES = 1000


def aof_bytes(folder: Path) -> int:
    """Return the size of all append-only files, -1 if they cannot be found."""
    try:
        return _files(folder)[1]
    except (OSError, ValueError):
        return -1


def sign_off(folder: Path, replid: str, size: int) -> bool:
    """Record that the append-only files are complete. Call after Valkey has ended.

    Args:
        folder: The data folder.
        replid: The replication ID until now.
        size: The size of all append-only files after the last write.

    Returns:
        Whether the files are complete and on disk.
    """
    try:
        paths, total = _files(folder)
        if total != size:
            return False
        for path in (*paths, folder / "appendonlydir"):
            _sync(path)
        certificates = [*continued(folder, replid.encode()), certificate_of(replid.encode())]
        record = {
            "number": _store_number(folder),
            "files": _facts(paths),
            "certificates": certificates[-_MOST_CERTIFICATES:],
        }
        _write(folder, _RECORD, record)
    except (OSError, ValueError):
        return False
    return True


def take_record(folder: Path) -> list[int]:
    """Delete the record. Return the certificates of the restarts that lost nothing, if it holds.

    Call before Valkey starts.
    """
    path, number = folder / _RECORD, _take_number(folder)
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        record = {}
    try:
        path.unlink()
        _sync(folder)
        paths, _ = _files(folder)
        if record["files"] == _facts(paths) and number == record["number"]:
            return [int(each) for each in record["certificates"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return []


def continue_as(folder: Path, replid: str, certificates: list[int]) -> None:
    """Store that the data under this replication ID continues that of earlier ones."""
    _write(folder, _CONTINUED, {"replid": replid, "certificates": certificates})


def continued(folder: Path, replid: bytes) -> list[int]:
    """Return the certificates of earlier replication IDs that this one continues without loss."""
    try:
        found: dict[str, Any] = json.loads((folder / _CONTINUED).read_bytes())
        if found["replid"].encode() == replid:
            return [int(each) for each in found["certificates"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return []


def _number_file(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return _MEMORY / f"relay-clean-stop-{os.getuid()}-{name}"


def _store_number(folder: Path) -> str:
    """Store a random number in the memory of the machine. OSError if it has no such memory."""
    _take_number(folder)
    number = secrets.token_hex(16)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(_number_file(folder), flags, 0o600), "w") as file:
        file.write(number)
    return number


def _take_number(folder: Path) -> str | None:
    """Delete the number and return it, or None if there is none of this user."""
    path = _number_file(folder)
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(file) as opened:
            number = opened.read(64) if os.fstat(file).st_uid == os.getuid() else None
        path.unlink()
    except OSError:
        return None
    return number


def _files(folder: Path) -> tuple[list[Path], int]:
    """Return the append-only files with their manifest, and the size of all but that."""
    (manifest,) = (folder / "appendonlydir").glob("*.manifest")
    names = [name for name, _ in _MANIFEST_LINE.findall(manifest.read_text())]
    data = [manifest.parent / name for name in names]
    return [*data, manifest], sum(path.stat().st_size for path in data)


def _facts(paths: list[Path]) -> list[list[object]]:
    facts = [(path, path.stat()) for path in paths]
    return [[path.name, each.st_size, each.st_ino, each.st_ctime_ns] for path, each in facts]


def _write(folder: Path, name: str, value: object) -> None:
    """Replace a file durably."""
    path = folder / f"{name}.new"
    path.write_text(json.dumps(value))
    _sync(path)
    path.replace(folder / name)
    _sync(folder)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
