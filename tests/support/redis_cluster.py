"""A real Redis Cluster for tests: its servers, and the moves of slots that an operator makes.

Methods block: call them in a fixture or through `asyncio.to_thread`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import redis
from typing_extensions import override

from relay.config.settings import RedisSettings
from relay.stream.shards.shard import SLOTS, slot_of
from tests.support.valkey import Flavour, Server, User, free_port, password_of

START_S = 60.0


class ClusterNode(Server):
    """A server whose URL is that of its cluster. `client` is of this server only."""

    @override
    def url(self, user: User = "relay", db: int = 0) -> str:
        return f"redis+cluster://{user}:{password_of(user)}@127.0.0.1:{self.port}"

    @override
    def client(self, user: User = "admin") -> redis.Redis:
        # A primary does not reply to writes during a planned failover, which may take 10 s.
        return redis.Redis.from_url(
            super().url(user), driver_info=None, protocol=3, socket_timeout=30
        )


class RedisCluster:
    """Primaries with all slots in equal parts, each with the same number of replicas."""

    def __init__(
        self,
        folder: Path,
        flavour: Flavour = "valkey",
        *,
        primaries: int = 3,
        replicas: int = 0,
        timeout_ms: int = 2000,
        acl: bool = False,
        rights: str = "",
    ) -> None:
        """`rights`: see `Server`."""
        self.primaries = primaries
        self._acl = acl
        self._rights = rights
        self._folder = folder
        self._flavour: Flavour = flavour
        self._timeout_ms = timeout_ms
        # `servers[primaries * n + i]` is a replica of `servers[i]` at first.
        self.servers: list[Server] = []
        self._bus: list[int] = []
        for _ in range(primaries * (1 + replicas)):
            self._make()

    def _make(self) -> None:
        self._bus.append(free_port())
        options: tuple[str, ...] = (
            "--cluster-enabled",
            "yes",
            "--cluster-port",
            str(self._bus[-1]),
        )
        options += ("--cluster-node-timeout", str(self._timeout_ms))
        options += ("--cluster-require-full-coverage", "no")
        node = ClusterNode if self._acl else Server
        folder = self._folder / str(len(self.servers))
        self.servers.append(
            node(folder, self._flavour, acl=self._acl, rights=self._rights, options=options)
        )

    def start(self) -> RedisCluster:
        """Start all servers and wait until the cluster is complete."""
        for server in self.servers:
            server.start()
        part = SLOTS // self.primaries
        for number in range(len(self.servers)):
            if number < self.primaries:
                last = SLOTS - 1 if number == self.primaries - 1 else (number + 1) * part - 1
                self.call(number, "CLUSTER", "ADDSLOTSRANGE", number * part, last)
            self.call(number, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server, bus in zip(self.servers[1:], self._bus[1:], strict=True):
            self.call(0, "CLUSTER", "MEET", "127.0.0.1", server.port, bus)
        every = range(len(self.servers))
        wait_for(lambda: all(self._known(n) == str(len(self.servers)) for n in every))
        for number in every[self.primaries :]:
            primary = self.id_of(number % self.primaries)
            wait_for(partial(self._replicates, number, primary))
        wait_for(lambda: all(self.info(n)["cluster_state"] == "ok" for n in every))
        for number in every[self.primaries :]:
            wait_for(partial(self._is_linked, number))
        return self

    def stop(self) -> None:
        """Stop those servers that still run."""
        for server in self.servers:
            server.kill()

    def add(self) -> int:
        """Start one more primary, without slots. Return its number."""
        self._make()
        added = len(self.servers) - 1
        self.servers[added].start()
        self.call(added, "CLUSTER", "MEET", "127.0.0.1", self.servers[0].port, self._bus[0])
        wait_for(lambda: all(self._known(n) == str(added + 1) for n in self.running()))
        # It accepts no key before it knows the servers of all slots.
        wait_for(lambda: self.info(added)["cluster_slots_assigned"] == str(SLOTS))
        wait_for(lambda: self.info(added)["cluster_state"] == "ok")
        return added

    def running(self) -> list[int]:
        """Return the numbers of the servers that were not killed."""
        return [number for number, server in enumerate(self.servers) if server.is_running]

    def present_primaries(self) -> list[int]:
        """Return the numbers of the running primaries, with slots or without."""
        return [number for number in self.running() if self.role_of(number) == "master"]

    def role_of(self, number: int) -> str:
        """Return "master" or "slave"."""
        return str(self.call(number, "INFO", "replication")["role"])

    def call(self, number: int, *words: bytes | str | int) -> Any:
        """Send one command to this server, and raise its error."""
        with self.servers[number].client() as client:
            return client.execute_command(*words)

    def uncover(self, slot: int) -> None:
        """Take a slot from its server."""
        is_known = True
        while is_known:
            is_known = False
            for number in self.running():
                # A message that its server has sent before gives it back.
                with suppress(redis.ResponseError):
                    self.call(number, "CLUSTER", "DELSLOTS", slot)
                    is_known = True

    def info(self, number: int) -> dict[str, str]:
        """Return the server's CLUSTER INFO."""
        text: str = self.call(number, "CLUSTER", "INFO").decode()
        return dict(line.split(":", 1) for line in text.split() if ":" in line)

    def id_of(self, number: int) -> str:
        """Return the server's node ID."""
        raw = self.call(number, "CLUSTER", "MYID")
        return raw.decode() if isinstance(raw, bytes) else str(raw)

    def owner_of(self, key: bytes) -> int:
        """Return the number of the server that has this key's slot, as the servers see it."""
        slot = slot_of(key)
        for number in self.running():
            port_of_this = self.servers[number].port
            for begin, end, (_, port, *_), *_ in self.call(number, "CLUSTER", "SLOTS"):
                if begin <= slot <= end and port == port_of_this:
                    return number
        raise AssertionError(f"no server has slot {slot}")

    def move(
        self, key: bytes, target: int, between: Callable[[str], None] = lambda _: None
    ) -> None:
        """Move the slot of `key` with all its keys, as redis-cli does.

        `between` is called after each step, with its name.
        """
        slot, source = slot_of(key), self.owner_of(key)
        ids = [self.id_of(source), self.id_of(target)]
        self._settle(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
        self._settle(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
        between("migrating")
        port = self.servers[target].port
        while names := self.call(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            login = ("AUTH2", "admin", "any") if self._acl else ()
            words = ("127.0.0.1", port, "", 0, 5000, *login, "KEYS", *names)
            self.call(source, "MIGRATE", *words)
        between("keys moved")
        for number in (target, source, *self.present_primaries()):
            self._settle(number, "CLUSTER", "SETSLOT", slot, "NODE", ids[1])
            between(f"node {number}")

    @staticmethod
    def url_of(*servers: Server) -> str:
        """Return a value of [redis] url that names these servers."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in servers)

    @property
    def url(self) -> str:
        """The value of [redis] url."""
        return self.url_of(*self.servers[:2])

    def settings(self, **more: Any) -> RedisSettings:
        """Return the settings [redis] for this cluster."""
        return RedisSettings(url=self.url, **more)

    def _settle(self, number: int, *words: bytes | str | int) -> None:
        problem = ""

        def settled() -> bool:
            nonlocal problem
            try:
                self.call(number, *words)
            except redis.ResponseError as exc:
                # The server does not know yet of the last move of this slot.
                problem = f"{number} refuses {words}: {exc}"
                return False
            return True

        wait_for(settled, lambda: problem)

    def _known(self, number: int) -> str:
        return self.info(number)["cluster_known_nodes"]

    def _replicates(self, number: int, primary: str) -> bool:
        try:
            self.call(number, "CLUSTER", "REPLICATE", primary)
        except redis.ResponseError:
            return False
        return True

    def _is_linked(self, number: int) -> bool:
        state = self.call(number, "INFO", "replication")
        return bool(state.get("master_link_status") == "up")


def wait_for(condition: Callable[[], bool], problem: Callable[[], str] = str) -> None:
    """Wait until `condition` returns True. `problem` returns why it has not."""
    end = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < end, f"waited too long {problem()}"
        time.sleep(0.02)


@contextmanager
def running_cluster(cluster: RedisCluster) -> Iterator[RedisCluster]:
    """Start the cluster, and stop it at the end."""
    try:
        yield cluster.start()
    finally:
        cluster.stop()
