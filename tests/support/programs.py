"""Programs that only tests need. `.ci/run` installs them."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/usr/local/sbin"


def program(command: str, package: str) -> str:
    """Return the path of a program. If it is missing, the test is skipped; in CI it fails."""
    return shutil.which(command, path=_PATH) or missing(command, package)


def missing(what: str, package: str) -> NoReturn:
    """Skip the test, or fail it in CI: a Debian package that it needs is not installed."""
    text = f"needs {what}: apt-get install {package}"
    if os.environ.get("CI"):
        pytest.fail(text)
    pytest.skip(text)
