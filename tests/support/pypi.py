"""The other systems' backend libraries from PyPI, each with its dependencies in its own folder.

`tests/pypi/NAME.txt` lists them. A folder is filled once, and again only after its file has
changed.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PINS = Path(__file__).parents[1] / "pypi"


@functools.cache
def packages(name: str) -> Path:
    """Return the folder with the packages of `tests/pypi/NAME.txt`, for PYTHONPATH."""
    pins = _PINS / f"{name}.txt"
    folder = Path(sys.prefix) / "clients" / name
    # A copy of the list of the installed packages, written last.
    stamp = folder / ".installed.txt"
    with pins.open() as lock:
        # Test runs that start at the same time must not install into the same folder.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_bytes() != pins.read_bytes():
            shutil.rmtree(folder, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input"]
            command += ["--disable-pip-version-check", "--target", str(folder), "-r", str(pins)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, f"pip install: {done.stderr[-2000:]}"
            shutil.copyfile(pins, stamp)
    return folder


def run(name: str, arguments: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python with these packages, without relay. `text` is its standard input."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(packages(name))},
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
