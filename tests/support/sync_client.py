"""Debian's Seafile sync client, `seafile-daemon` and `seafile-cli`, with its own home folder."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.programs import program

# Debian's Python has the client's modules.
_PYTHON = "/usr/bin/python3"
_SET_PRO = """
import sys
from pysearpc import searpc_func
import seafile
class Rpc(seafile.RpcClient):
    @searpc_func("int", ["string", "string", "string"])
    def seafile_set_server_property(url, key, value): pass
print(Rpc(sys.argv[1]).seafile_set_server_property(sys.argv[2], "is_pro", "true"))
"""
_LIMIT_S = 30.0


class SyncClient:
    """A running daemon in `folder`."""

    def __init__(self, folder: Path, process: asyncio.subprocess.Process) -> None:
        self.folder = folder
        self.libraries = folder / "libraries"
        self._process = process

    async def download(self, url: str, repo_id: str) -> Path:
        """Synchronize a library of the server. Return the folder with its files."""
        self.libraries.mkdir(exist_ok=True)
        await _run(
            self.folder,
            *("seaf-cli", "download", "-c", str(self.folder / "conf"), "-l", repo_id),
            *("-s", url, "-d", str(self.libraries), "-u", "alice@example.com", "-p", "any"),
        )
        return self.libraries / "library"

    async def call_server_pro(self, url: str) -> None:
        """Enable locks: report a professional edition, as the graphical client does."""
        socket = self.folder / "seafile-data" / "seafile.sock"
        await _run(self.folder, _PYTHON, "-c", _SET_PRO, str(socket), url)

    def log(self) -> str:
        """Return the daemon's log."""
        path = self.folder / "conf" / "logs" / "seafile.log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def restart(self) -> None:
        """Restart the daemon, as for a user who logs out and in again."""
        await self.end(signal.SIGTERM)
        self._process = await _start(self.folder)

    async def end(self, how: signal.Signals) -> None:
        """Wait until the daemon has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(how)
        await self._process.wait()

    def stop(self) -> None:
        """Send SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Send SIGCONT."""
        self._process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def sync_client(folder: Path) -> AsyncIterator[SyncClient]:
    """Run a daemon. If it is missing, the test is skipped; in CI it fails."""
    program("seaf-daemon", "seafile-daemon")
    program("seaf-cli", "seafile-cli")
    folder.mkdir(parents=True)
    await _run(folder, "seaf-cli", "init", "-c", str(folder / "conf"), "-d", str(folder))
    client = SyncClient(folder, await _start(folder))
    try:
        yield client
    finally:
        await client.end(signal.SIGKILL)


async def _start(folder: Path) -> asyncio.subprocess.Process:
    data = folder / "seafile-data"
    (data / "seafile.sock").unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(
        "seaf-daemon",
        *("-c", str(folder / "conf"), "-d", str(data), "-w", str(folder / "seafile")),
        env=_environment(folder),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(_LIMIT_S):
        while not (data / "seafile.sock").exists():
            await asyncio.sleep(0.05)
    return process


def _environment(folder: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"}


async def _run(folder: Path, *command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command,
        env=_environment(folder),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(_LIMIT_S):
        said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()


def unread_bytes(port: int) -> int:
    """Return how many bytes from this local port have arrived at clients that do not read them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[4].partition(":")[2], 16) for row in rows if row[2].endswith(f":{port:04X}"))
