"""A real relay process with a real Redis server, for tests and benchmarks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jwt

from tests.support.forked import ForkedProcess
from tests.support.valkey import Server, User, free_port

ROOT = Path(__file__).parents[2]
KEY = "a test key that is long enough for HS256"
START_S = 60


class RelayProcess:
    """`python -m relay serve` on a free port. The port is the same after a restart."""

    def __init__(
        self,
        server: Server,
        *,
        settings: Sequence[str] = (),
        flags: Sequence[str] = (),
        key: str = KEY,
        prefix: Sequence[str] = (),
        root: Path = ROOT,
        packages: Path | None = None,
    ) -> None:
        """Prepare a relay.

        Args:
            key: [jwt] key, '' if the configuration file has one.
            prefix: Words before the command, such as those of prlimit.
            root: The folder that holds the package `relay`.
            packages: A folder with further packages.
        """
        self.server = server
        self.port = free_port()
        self.log: list[str] = []
        self.settings = list(settings)
        self.flags = list(flags)
        self.key = key
        self.prefix = list(prefix)
        self._root = root
        self._packages = packages
        self._process: subprocess.Popen[str] | ForkedProcess | None = None
        self._client = server.client("admin")

    @property
    def url(self) -> str:
        """Return the URL of the shared listener."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Return the process ID."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> RelayProcess:
        """Start the process and wait until it serves."""
        words = ["serve", "--port", str(self.port)]
        words += ["--redis", self.server.url("relay"), *self.flags]
        key = [f"jwt.key={self.key}"] if self.key else []
        for setting in ["node.drain_s=0.2", *key, *self.settings]:
            words += ["--set", setting]
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        folders = [self._root, *([self._packages] if self._packages else [])]
        environment["PYTHONPATH"] = ":".join(map(str, folders))
        ready = threading.Event()
        if self.prefix or self._packages or self._root != ROOT:
            # These have to be there when Python starts.
            self._process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "relay", *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                cwd=self._root,
            )
        else:
            self._process = ForkedProcess(words, environment, ROOT)
        threading.Thread(target=self._read, args=(self._process, ready), daemon=True).start()
        if not ready.wait(START_S) or self._process.poll() is not None:
            raise RuntimeError("the relay did not start:\n" + "\n".join(self.log[-20:]))
        return self

    def _read(self, process: subprocess.Popen[str] | ForkedProcess, ready: threading.Event) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self.log.append(line.rstrip())
                # The listeners are open. Relay prints the banner when it reads streams.
                if line.startswith("relay is ready on") or "Listening, but not ready" in line:
                    ready.set()
        # The output ends a moment before the process.
        process.wait()
        ready.set()

    def stop(self, limit_s: float = 30) -> int:
        """Send SIGTERM and return the exit code."""
        return self._end(signal.SIGTERM, limit_s)

    def ended(self, limit_s: float = 30) -> int:
        """Wait until a relay that was asked to stop has ended. Return its exit code."""
        process, self._process = self._process, None
        return 0 if process is None else process.wait(limit_s)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._end(signal.SIGKILL, 30)

    def send(self, number: signal.Signals) -> None:
        """Send another signal."""
        os.kill(self.pid, number)

    def restart(self) -> None:
        """Stop and start the process."""
        self.stop()
        self.start()

    def _end(self, how: signal.Signals, limit_s: float) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(how)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def token(
        self,
        user: str = "alice",
        channels: Sequence[str] = ("*",),
        *,
        ttl_s: float | None = None,
        groups: Sequence[str] = (),
        key: str = KEY,
    ) -> str:
        """Return a native JWT."""
        claims: dict[str, object] = {"sub": user, "channels": list(channels)}
        if groups:
            claims["groups"] = list(groups)
        if ttl_s is not None:
            claims["exp"] = time.time() + ttl_s
        return jwt.encode(claims, key, algorithm="HS256")

    def xadd(self, channel: str, **fields: str) -> str:
        """Append an entry as any producer would. Return its ID."""
        words = [part for pair in fields.items() for part in pair]
        entry_id: bytes = self._client.execute_command(  # type: ignore[no-untyped-call]
            "XADD", f"relay:stream:{{{channel}}}", "*", *words
        )
        return entry_id.decode()

    def redis(self, user: User = "admin") -> object:
        """Return a blocking client of the Redis server."""
        return self.server.client(user)
