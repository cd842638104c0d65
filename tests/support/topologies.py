"""The servers that tests/redis shares between tests: one server, or a primary behind Sentinel.

`scripts/test --matrix` chooses one with the environment variable `RELAY_TEST_TOPOLOGY`. To add a
topology, add a class to `_CLASSES` and a row to `scripts/matrix.py`. Its `url` is what relay uses;
`client` is for the test, which must reach all keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import redis
from typing_extensions import override

from tests.support.redis_cluster import wait_for
from tests.support.valkey import Flavour, SentinelServer, Server, User

TOPOLOGY = "RELAY_TEST_TOPOLOGY"


class GuardedServer(Server):
    """A primary with one replica and one Sentinel."""

    def __init__(self, folder: Path, flavour: Flavour) -> None:
        super().__init__(folder / "primary", flavour)
        self._replica = Server(folder / "replica", flavour, replica_of=self)
        self._sentinel = SentinelServer(folder / "sentinel", self)

    @override
    def start(self) -> Server:
        super().start()
        self._replica.start()
        self._sentinel.start()
        with self.client() as admin, self._sentinel.client() as sentinel:
            # The first replica changes the replication ID.
            wait_for(lambda: bool(admin.set("synced", "1") and admin.wait(1, 1000)))
            wait_for(lambda: bool(sentinel.execute_command("SENTINEL", "REPLICAS", "main")))
            # No failover because the machine is busy.
            sentinel.execute_command("SENTINEL SET", "main", "down-after-milliseconds", 60_000)
        return self

    @override
    def kill(self) -> None:
        for server in (self._sentinel, self._replica):
            server.kill()
        super().kill()

    @override
    def url(self, user: User = "relay", db: int = 0) -> str:
        return self._sentinel.url(user, db)

    @override
    def client(self, user: User = "admin") -> redis.Redis:
        return redis.Redis.from_url(super().url(user), driver_info=None, protocol=3)


_CLASSES: dict[str, Callable[[Path, Flavour], Server]] = {
    "single": Server,
    "sentinel": GuardedServer,
}


def shared(folder: Path, flavour: Flavour) -> Server:
    """Return the servers of the chosen topology as one, to be started."""
    return _CLASSES[os.environ.get(TOPOLOGY, "single")](folder, flavour)
