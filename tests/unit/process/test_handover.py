"""Listening sockets from systemd and from workers that answer late; new relays that misbehave."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from relay.core.errors import StartError
from relay.process import handover
from relay.process.handover import (
    Inheritance,
    Upgrades,
    discard_sockets,
    receive_sockets,
    send_sockets,
    wait_started,
)
from relay.process.pid_file import outcome_path
from relay.transports.socket.inherited import InheritedSocket
from tests.support.clients import until


@pytest.mark.parametrize("count", ["1", "3"])
def test_a_wrong_number_of_sockets_is_a_start_error(
    monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    # No process has so many descriptors, so none of them is open.
    monkeypatch.setattr(handover, "_FIRST_SYSTEMD_SOCKET", 1 << 30)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", count)
    with pytest.raises(StartError, match=f"LISTEN_FDS={count}: socket 1 cannot be used"):
        Inheritance.of_environment()


async def test_sockets_of_an_earlier_attempt_are_not_used() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, socket.create_server(("127.0.0.1", 0)) as late:
        ours.setblocking(False)
        discard_sockets(ours)
        for _ in range(2):
            send_sockets(theirs, [InheritedSocket(late)])
        discard_sockets(ours)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            send_sockets(theirs, [InheritedSocket(listening)])
            (found,) = await receive_sockets(ours, 1)
            with found.socket:
                assert found.socket.getsockname() == listening.getsockname()


# A new relay of any version: it stores its process ID, sends a message and waits for the answer.
_OTHER = """
import os, pathlib, socket, sys
control = socket.socket(fileno=int(os.environ["_RELAY_HANDOVER"].split(":")[0]))
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
if len(sys.argv) > 2:
    control.send(sys.argv[2].encode())
while control.recv(65536) not in (b"{}", b""):
    pass  # the sockets
"""


class Old:
    """The old relay's side of an upgrade."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
        self.pid_file = folder / "pid"
        self.child = folder / "child"
        self.used: list[set[str]] = []
        self._words = [sys.executable, "-S", "-E", "-c", _OTHER, str(self.child)]
        self._monkeypatch = monkeypatch
        self.answer(*words)
        self.upgrades = Upgrades(
            sockets=self._sockets,
            files=dict,
            handed_over=self.used.append,
            pid_file=str(self.pid_file),
        )

    def answer(self, *words: str) -> None:
        """Set the message of the next new relay."""
        self._monkeypatch.setattr(sys, "orig_argv", [*self._words, *words])

    async def _sockets(self) -> Sequence[InheritedSocket]:
        return []

    async def outcome(self) -> str:
        path = outcome_path(str(self.pid_file))
        await until(path.exists, 30)
        line = path.read_text().strip()
        path.unlink()
        return line

    async def started(self) -> int:
        await until(lambda: self.child.exists() and bool(self.child.read_text()), 30)
        return int(self.child.read_text())

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[asyncio.Task[None]]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.upgrades.run())
            try:
                yield task
            finally:
                task.cancel()


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ('{"failed":"no"}', "Upgrade failed: no"),
        ("<html>", "Upgrade failed: the new relay sent a message that this version cannot read"),
        *(
            (each, "Upgrade failed: the new relay sent a message that this version cannot read")
            for each in ("[]", '{"ready":5}', '{"ready":null}', '{"ready":[[1]]}')
        ),
    ],
)
async def test_the_old_relay_continues_whatever_the_new_one_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, line: str
) -> None:
    old = Old(tmp_path, monkeypatch, message)
    async with old.running() as task:
        old.upgrades.request()
        assert await old.outcome() == f"{line}. Process {os.getpid()} continues to serve."
        assert not task.done()
        assert not old.used
        # A later one may succeed.
        old.answer('{"ready":["pid file"]}')
        old.upgrades.request()
        await until(lambda: bool(old.used), 30)
        assert old.used == [{"pid file"}]
        assert await old.outcome() == ""
        successor = old.upgrades._successor
        assert successor is not None
        assert successor.wait() == 0


async def test_requests_during_an_upgrade_start_no_further_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = Old(tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING):
        async with old.running() as task:
            old.upgrades.request()
            child = await old.started()
            for _ in range(3):
                old.upgrades.request()
            # It must not die of them before it can handle them.
            for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
                os.kill(child, number)
            os.kill(child, signal.SIGKILL)
            ended = "Upgrade failed: the new relay ended with SIGKILL: "
            assert (await old.outcome()).startswith(ended)
            old.child.unlink()
            for _ in range(10):
                await asyncio.sleep(0)
            assert not old.upgrades._is_running
            assert not task.done()
    assert sum("Ignored a request to upgrade" in each for each in caplog.messages) == 3
    assert not old.child.exists()


@pytest.mark.parametrize("during_start", [True, False])
async def test_a_stop_during_an_upgrade_ends_the_new_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during_start: bool
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    starting = threading.Event()

    def start(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        starting.set()
        if during_start:
            time.sleep(0.3)
        started.append(popen(*args, **options))
        return started[0]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    old = Old(tmp_path, monkeypatch)
    async with old.running():
        old.upgrades.request()
        if during_start:
            await until(starting.is_set, 30)
        else:
            await old.started()
    (child,) = started
    # Those who wait for the upgrade receive the reason, and so do those who request another one.
    stopping = f"Upgrade failed: process {os.getpid()} is stopping. "
    assert (await old.outcome()).startswith(stopping)
    old.upgrades.request()
    assert (await old.outcome()).startswith(stopping)
    # It has ended and is no zombie. How it has ended does not matter.
    assert child.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
    assert not old.used


async def test_a_stop_while_a_new_relay_cannot_be_started_takes_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting, may_fail = threading.Event(), threading.Event()

    def start(*_: Any, **__: Any) -> None:
        starting.set()
        may_fail.wait(30)
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", start)
    old = Old(tmp_path, monkeypatch)
    async with old.running() as task:
        old.upgrades.request()
        await until(starting.is_set, 30)
        task.cancel()
        may_fail.set()
        await asyncio.wait([task], timeout=30)
        assert task.cancelled()


async def test_an_upgrade_waits_until_the_relay_has_its_own_sockets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(wait_started(started))
        await asyncio.sleep(0)
        assert not waiting.done()
        started.set()
    monkeypatch.setattr(handover, "STARTED_S", 0.0)
    with pytest.raises(StartError, match=f"process {os.getpid()} is still starting after 0 s"):
        await wait_started(asyncio.Event())
