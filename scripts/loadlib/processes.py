"""Processes under measurement: started on a core of their own, read from /proc, always stopped."""

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
    """What this machine lacks, or what did not come up: one line for whoever measures."""


def tool(name: str, package: str) -> str:
    """Where the program `name` is; LoadError naming the Debian package that has it."""
    # Debian keeps servers in sbin, which users' PATH lacks.
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise LoadError(f"{name} is missing; run: sudo apt install {package}")
    return found


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def build(source: Path, folder: Path) -> Path:
    """The C program `source` compiled into `folder`."""
    target = folder / source.stem
    if not source.is_file():
        raise LoadError(f"{source} is missing; name its folder with --bench-dir")
    try:
        subprocess.run(
            [tool("cc", "gcc"), "-O2", "-w", "-o", str(target), str(source)],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.CalledProcessError as exc:
        raise LoadError(f"{source.name} does not compile: {exc.stderr.strip()[:500]}") from exc
    return target


def _tree(root: int) -> list[int]:
    """`root` and all its descendants: supervisors have workers, nginx has a master."""
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
    # The command's name may hold blanks and brackets: all fields count from the last bracket.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Measured:
    """One server process (with its children), pinned to one core."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self._popen = popen
        self._log = log

    @classmethod
    def start(
        cls, name: str, argv: Sequence[str], *, core: int, folder: Path, env: dict[str, str]
    ) -> Measured:
        """Runs `argv` in `folder`, its output in a log there."""
        log = folder / f"{name}.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(
                [tool("taskset", "util-linux"), "-c", str(core), *argv],
                cwd=folder,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                # A Ctrl-C is for us; we stop it in order.
                start_new_session=True,
            )
        return cls(name, popen, log)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._popen.poll() is None

    def cpu_s(self) -> float:
        """Processor seconds, user and system, that it and its children have used."""
        ticks = 0
        for pid in _tree(self._popen.pid):
            with contextlib.suppress(OSError):
                fields = _stat(pid)
                ticks += int(fields[11]) + int(fields[12])
        return ticks / _TICKS

    def rss_kb(self) -> float:
        """Resident memory of it and its children."""
        pages = 0
        for pid in _tree(self._popen.pid):
            with contextlib.suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * _PAGE_KB

    async def settled_rss_kb(self, limit_s: float = 10) -> float:
        """Its memory once two looks, a second apart, agree to half a percent."""
        last = self.rss_kb()
        for _ in range(int(limit_s)):
            await asyncio.sleep(1)
            now = self.rss_kb()
            if abs(now - last) < 0.005 * last:
                return now
            last = now
        return last

    async def wait_for_port(self, port: int, limit_s: float = 30) -> None:
        """Returns once it accepts connections; LoadError with the end of its log otherwise."""
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
        raise self.failed("does not listen")

    def failed(self, what: str) -> LoadError:
        """An error with the end of the log."""
        return LoadError(f"{self.name} {what}:\n{self._log.read_text(errors='replace')[-2000:]}")

    async def stop(self) -> None:
        """Ends it, by force after ten seconds."""
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
