"""A relay that is replaced or restarted while clients connect: no connection is refused."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.clients import native, until
from tests.support.relay import ROOT, RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]

# A start takes long on a busy machine.
_START_S = 60.0


@asynccontextmanager
async def knocking(port: int) -> AsyncIterator[list[bytes]]:
    """Connect all the time, and collect the status of each answer. At the end all must be 200."""
    answers: list[bytes] = []

    async def knock() -> None:
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                # Not `wait_for`, which sometimes ignores a cancellation (Python 3.11).
                async with asyncio.timeout(_START_S):
                    answers.append((await reader.readline()).split(b" ")[1])
            finally:
                writer.close()
            await asyncio.sleep(0.02)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(knock()) for _ in range(2)]
        yield answers
        before = len(answers)
        await until(lambda: len(answers) > before + 3, _START_S)
        for task in tasks:
            task.cancel()
    assert set(answers) == {b"200"}


async def test_an_upgrade_refuses_nobody_and_a_failed_one_changes_nothing(
    valkey: Server, channel: str, tmp_path: Path
) -> None:
    for package in ("relay", "producers"):
        # With its compiled files, whose times are copied as well.
        shutil.copytree(ROOT / package, tmp_path / package)
    file, pids, code = tmp_path / "a.ini", tmp_path / "pid", tmp_path / "relay/process/app.py"
    text = f"[node]\npid_file = {pids}\nworkers = 2\n"
    file.write_text(text)
    relay = RelayProcess(valkey, flags=["-c", str(file)], root=tmp_path)
    cli = Cli(valkey)
    await asyncio.to_thread(relay.start)
    old = int(pids.read_text())
    try:
        async with native(relay) as door, knocking(relay.port):
            client = await door.sse(channel)

            code.write_text(f"{code.read_text()}\nimport no_such_module\n")
            done = await cli.run("upgrade", "-c", str(file))
            assert done.returncode == 1
            assert done.stderr == (
                "relay: Upgrade failed: the new relay ended with exit code 1: ModuleNotFoundError:"
                f" No module named 'no_such_module'. Process {old} continues to serve.\n"
            )
            shutil.copy(ROOT / "relay/process/app.py", code)

            file.write_text(f"{text}name = a/b\n")
            relay.send(signal.SIGUSR2)
            await until(lambda: any("[node] name = a/b" in line for line in relay.log), _START_S)
            await until(lambda: sum("Upgrade failed: " in line for line in relay.log) == 2)
            assert int(pids.read_text()) == old

            # The number of workers may change.
            file.write_text(text.replace("= 2", "= 1"))
            relay.xadd(channel, data="1")
            assert (await client.next()).json() == 1
            done = await cli.run("upgrade", "-c", str(file))
            new = int(pids.read_text())
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.startswith(f"Process {new} serves; process {old} asks")
            assert new != old
            (closing,) = await client.ended()
            assert closing.json() == {"reason": "stopping"}
            relay.xadd(channel, data="2")
            client = await door.sse(channel, last=client.last_id)
            assert (await client.next()).json() == 2
            assert await asyncio.to_thread(relay.ended) == 0
            log = "\n".join(relay.log)
            assert "Traceback" not in log, log
    finally:
        relay.kill()
        if pids.exists():
            with suppress(ProcessLookupError):
                os.kill(int(pids.read_text()), signal.SIGKILL)


# Receives the socket as systemd passes it, and becomes relay.
_ACTIVATED = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    _, (found,), _, _ = socket.recv_fds(sock, 1, 1)
os.dup2(found, 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="relay.socket")
os.execv(sys.argv[2], sys.argv[2:])
"""


async def test_connections_to_a_socket_of_systemd_wait_for_the_restart(
    valkey: Server, tmp_path: Path
) -> None:
    path = str(tmp_path / "activation")
    relay = RelayProcess(valkey, prefix=[sys.executable, "-c", _ACTIVATED, path])
    with (
        socket.create_server(("127.0.0.1", relay.port), backlog=1000) as listening,
        socket.socket(socket.AF_UNIX) as activation,
    ):
        activation.bind(path)
        activation.listen()

        def activate() -> None:
            with suppress(OSError):
                while True:
                    with activation.accept()[0] as sock:
                        socket.send_fds(sock, [b"1"], [listening.fileno()])

        threading.Thread(target=activate, daemon=True).start()
        await asyncio.to_thread(relay.start)
        try:
            async with knocking(relay.port) as answers:
                await until(lambda: len(answers) > 3)
                await asyncio.to_thread(relay.restart)
        finally:
            relay.kill()
            activation.shutdown(socket.SHUT_RDWR)
    log = "\n".join(relay.log)
    assert "Traceback" not in log, log
