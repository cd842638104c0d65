"""`relay upgrade` beside another one, and while relay starts."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.cli import upgrade as command
from relay.cli.arguments import parse
from relay.cli.upgrade import upgrade
from relay.process.handover import write_outcome

# A relay that starts: its PID file is locked, and SIGUSR2 is blocked until it can be handled.
_STARTING = """
import fcntl, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(str(os.getpid()))
file.flush()
print("locked", flush=True)
sys.stdin.readline()
print(signal.SIGUSR2 in signal.sigpending())
"""


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-S", "-E", "-c", _STARTING, str(tmp_path / "pid")]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


class SecondInterrupted(Exception):
    pass


def test_a_second_upgrade_leaves_the_outcome_of_the_first_one(
    starting: subprocess.Popen[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pid_file = tmp_path / "pid"
    file = tmp_path / "a.ini"
    file.write_text(f"[node]\npid_file = {pid_file}\n")
    options = parse(["upgrade", "-c", str(file)])
    # Of an upgrade on another day.
    write_outcome(str(pid_file), "Upgrade failed: long ago")
    looks = 0

    def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            # Between two looks of the first one, its upgrade ends and a second one begins.
            write_outcome(str(pid_file), "")
            with pytest.raises(SecondInterrupted):
                upgrade(options)
            return
        if looks == 2:
            raise SecondInterrupted
        pytest.fail("the first one has not found its outcome")

    monkeypatch.setattr(command, "time", argparse.Namespace(sleep=sleep, monotonic=time.monotonic))
    assert upgrade(options) == 0
    assert capsys.readouterr().out.startswith(f"Process {starting.pid} serves")
    assert starting.communicate("\n")[0] == "True\n"
