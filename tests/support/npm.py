"""The other systems' clients from npm, and Node to run them.

`tests/npm/` lists them. They are installed once, and again only after the lock file has changed. If
Node or npm is missing, the test is skipped; in CI it fails.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
from pathlib import Path

from tests.support.programs import program

_FOLDER = Path(__file__).parents[1] / "npm"
_LOCK = _FOLDER / "package-lock.json"
_MODULES = _FOLDER / "node_modules"
# A copy of the lock file of the installed packages, written last.
_STAMP = _MODULES / ".installed-lock.json"


def node() -> str:
    """Return the path of Node."""
    return program("node", "nodejs")


@functools.cache
def node_modules() -> Path:
    """Return the folder with the packages of `tests/npm/package.json`, for NODE_PATH or a page."""
    npm = program("npm", "npm")
    node()
    with _LOCK.open() as lock:
        # Test runs that start at the same time must not install into the same folder.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _STAMP.exists() or _STAMP.read_bytes() != _LOCK.read_bytes():
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
            done = subprocess.run(
                command, cwd=_FOLDER, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, f"npm ci: {done.stderr[-2000:]}"
            shutil.copyfile(_LOCK, _STAMP)
    return _MODULES


def environment() -> dict[str, str]:
    """Return the environment of a Node process in which `require` finds the packages."""
    return {**os.environ, "NODE_PATH": str(node_modules())}
