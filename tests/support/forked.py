"""Start `python -m relay` as a fork of a process that has already imported relay.

Imports take most of the CPU time of a start, and the tests start hundreds of relays. The first
`ForkedProcess` of a test run therefore starts this module as a process that only imports relay and
then forks. Each fork gets the arguments, environment, folder and output of the new process, and
then runs `relay/__main__.py` as Python's -m does. Nothing of the test process is in its memory.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_ROOT = Path(__file__).parents[2]
_MODULE = "relay"
_REQUEST_BYTES = 1 << 20
_NUMBER_BYTES = 4


class ForkedProcess:
    """A process like `subprocess.Popen([sys.executable, "-m", "relay", *words])`.

    Its standard output and standard error are one pipe, `stdout`. Its standard input is empty.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.returncode: int | None = None
        self._ended = threading.Event()
        output, theirs = os.pipe()
        self.stdout = os.fdopen(output, encoding="utf-8")
        status, their_status = os.pipe()
        request = {"words": list(words), "environment": dict(environment), "folder": str(folder)}
        control = _control()
        try:
            socket.send_fds(control, [json.dumps(request).encode()], [theirs, their_status])
        finally:
            os.close(theirs)
            os.close(their_status)
        if not (pid := os.read(status, _NUMBER_BYTES)):
            raise RuntimeError("the process that forks relays has ended, see standard error")
        self.pid = _number(pid)
        threading.Thread(target=self._wait_for_end, args=(status,), daemon=True).start()

    def _wait_for_end(self, status: int) -> None:
        # If this is empty, the process that forks has been killed.
        data = os.read(status, _NUMBER_BYTES)
        os.close(status)
        self.returncode = os.waitstatus_to_exitcode(_number(data)) if data else -signal.SIGKILL
        self._ended.set()

    def poll(self) -> int | None:
        """Return the exit code, or None if the process runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: It still runs after `timeout` seconds.
        """
        if not self._ended.wait(timeout):
            assert timeout is not None
            raise subprocess.TimeoutExpired(f"relay (process {self.pid})", timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _control() -> socket.socket:
    """Start the process that forks, and return the socket for requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env={**environment, "PYTHONPATH": str(_ROOT)},
            cwd=_ROOT,
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


# ---- the process that forks -------------------------------------------------------------------


def _main() -> NoReturn:
    # As relay does it during its imports.
    gc.disable()
    # Relay imports these at every start.
    __import__("relay.cli.serving")
    __import__("uvloop")
    # Ctrl+C in a terminal is for the tests.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    request, output = _next_fork(control)
    # In the new process. It has no other open files, as after a start by `subprocess`.
    control.detach()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # As Python opens them for a pipe.
    errors = sys.stdout.errors, sys.stderr.errors
    sys.stdout = open(1, "w", encoding="utf-8", errors=errors[0], closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors=errors[1], closefd=False)  # noqa: SIM115
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    gc.enable()
    # Relay uses it to start its successor.
    sys.orig_argv[:] = [sys.executable, "-m", _MODULE, *request["words"]]
    sys.argv[:] = [_MODULE, *request["words"]]
    runpy.run_module(_MODULE, run_name="__main__", alter_sys=True)
    sys.exit()


def _next_fork(control: socket.socket) -> tuple[dict[str, Any], int]:
    """Fork for each request. Return in the new process only, with its request and output."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    # The process ID and the pipe for the exit status, by the file descriptor of the process.
    running: dict[int, tuple[int, int]] = {}
    while True:
        for descriptor, _ in poll.poll():
            if descriptor != control.fileno():
                poll.unregister(descriptor)
                os.close(descriptor)
                pid, status = running.pop(descriptor)
                _send(status, os.waitpid(pid, 0)[1])
                os.close(status)
                continue
            data, files, _, _ = socket.recv_fds(control, _REQUEST_BYTES, 2)
            if not data:
                # The test process has ended or was killed.
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                sys.exit()
            output, status = files
            pid = os.fork()
            if not pid:
                return json.loads(data), output
            os.close(output)
            _send(status, pid)
            descriptor = os.pidfd_open(pid)
            running[descriptor] = pid, status
            poll.register(descriptor, select.POLLIN)


def _send(status: int, number: int) -> None:
    # The test process may have been killed.
    with contextlib.suppress(BrokenPipeError):
        os.write(status, number.to_bytes(_NUMBER_BYTES, "big"))


if __name__ == "__main__":
    _main()
