"""Run `python -m producers` in its own process, for tests and benchmarks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from tests.support.relay import ROOT
from tests.support.valkey import Server


class ProducerProcess:
    """One producer process. Its output goes to the standard error of the test."""

    def __init__(self, server: Server, name: str, *, settings: Sequence[str] = ()) -> None:
        self.command = [sys.executable, "-m", "producers", name, "--redis", server.url("relay")]
        for setting in settings:
            self.command += ["--set", setting]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Return the process ID."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the process. It is ready some time later."""
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment["PYTHONPATH"] = str(ROOT)
        self._process = subprocess.Popen(self.command, env=environment, cwd=ROOT)

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(how)
        return process.wait(30)
