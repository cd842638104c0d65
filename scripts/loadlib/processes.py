"""Starts server processes on a chosen CPU core, and measures them with /proc."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_KB = os.sysconf("SC_PAGE_SIZE") / 1024


class LoadError(Exception):
    """A benchmark cannot run. The message says what is missing or which process failed."""


def tool(name: str, package: str) -> str:
    """Return the path of the program `name`.

    If it is not installed, raise LoadError, which names the Debian package.
    """
    # Debian installs servers in sbin, which is not in the PATH of ordinary users.
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise LoadError(f"{name} is missing; run: sudo apt install {package}")
    return found


def free_port() -> int:
    """Return a port that is not in use. Another process may take it before the caller does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def build(source: Path, folder: Path) -> Path:
    """Compile the C program `source` into `folder` and return the path of the executable."""
    target = folder / source.stem
    if not source.is_file():
        raise LoadError(f"{source} is missing; specify its folder with --bench-dir")
    try:
        subprocess.run(
            [tool("cc", "gcc"), "-O2", "-w", "-o", str(target), str(source)],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.CalledProcessError as exc:
        raise LoadError(f"could not compile {source.name}: {exc.stderr.strip()[:500]}") from exc
    return target


def _tree(root: int) -> list[int]:
    """Return `root` and all its descendants, such as relay's workers or the worker of nginx."""
    parents: dict[int, int] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _stat(pid: int) -> list[str]:
    # The command name may contain spaces and parentheses. Skip to the last one.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Measured:
    """A server process and its children, pinned to one CPU core."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self._popen = popen
        self._log = log

    @classmethod
    def start(
        cls, name: str, argv: Sequence[str], *, core: int, folder: Path, env: dict[str, str]
    ) -> Measured:
        """Run `argv` in `folder`. Write its output to a log file in this folder."""
        log = folder / f"{name}.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(
                [tool("taskset", "util-linux"), "-c", str(core), *argv],
                cwd=folder,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                # Don't pass Ctrl-C to the server: `stop` terminates it.
                start_new_session=True,
            )
        return cls(name, popen, log)

    @property
    def alive(self) -> bool:
        """Whether the process is still running."""
        return self._popen.poll() is None

    def cpu_s(self) -> float:
        """Return the user and system CPU time of the process and its children, in seconds."""
        ticks = 0
        for pid in _tree(self._popen.pid):
            with contextlib.suppress(OSError):
                fields = _stat(pid)
                ticks += int(fields[11]) + int(fields[12])
        return ticks / _TICKS

    def rss_kb(self) -> float:
        """Return the resident memory of the process and its children."""
        pages = 0
        for pid in _tree(self._popen.pid):
            with contextlib.suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * _PAGE_KB

    async def settled_rss_kb(self, limit_s: float = 10) -> float:
        """Wait until the memory changes by less than 0.5 % within a second, and return it.

        Return the last value if the memory still changes after `limit_s`.
        """
        last = self.rss_kb()
        for _ in range(int(limit_s)):
            await asyncio.sleep(1)
            now = self.rss_kb()
            if abs(now - last) < 0.005 * last:
                return now
            last = now
        return last

    async def wait_for_port(self, port: int, limit_s: float = 30) -> None:
        """Wait until the process accepts connections.

        If it exits or the time is over, raise LoadError with the end of its log.
        """
        try:
            async with asyncio.timeout(limit_s):
                while self.alive:
                    try:
                        _, writer = await asyncio.open_connection("127.0.0.1", port)
                    except OSError:
                        await asyncio.sleep(0.05)
                    else:
                        writer.close()
                        return
        except TimeoutError:
            pass
        raise self.failed(
            f"exited, or did not accept connections on port {port} within {limit_s:g} s"
        )

    def failed(self, what: str) -> LoadError:
        """Return an error that contains the end of the log."""
        return LoadError(f"{self.name} {what}:\n{self._log.read_text(errors='replace')[-2000:]}")

    async def stop(self) -> None:
        """Terminate the process. Kill it if it is still running after ten seconds."""
        if not self.alive:
            return
        self._popen.terminate()
        for _ in range(200):
            if not self.alive:
                return
            await asyncio.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(5)
