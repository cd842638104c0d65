"""The servers that a test module shares: one, a primary behind Sentinel, a Cluster, or two.

`scripts/test --matrix` chooses with the environment variable `TEST_TOPOLOGY`. To add a
topology, add a class to `_CLASSES` and a row to `scripts/matrix.py`. Its `url` is what relay uses;
`client` is for the test, which must reach all keys.

In another topology than `single`, only the tests that use the shared server run. Those that are
about a single server have the mark `single_server` with the reason. A primary behind Sentinel is a
single server, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from typing_extensions import override

from relay.config.settings import RedisSettings
from relay.stream.connection.connect import servers_of
from relay.stream.shards.hash_map import HashMap
from relay.stream.shards.shard import SLOTS, slot_of
from tests.support.redis_cluster import RedisCluster, wait_for
from tests.support.several import SeveralServers
from tests.support.valkey import Flavour, SentinelServer, Server, User, running

TOPOLOGY = "TEST_TOPOLOGY"
# The fixtures with the shared server.
FIXTURES = {"shared_server", "valkey"}


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


class ClusteredServers(SeveralServers):
    """A Redis Cluster whose slots do not move."""

    is_cluster = True

    def __init__(self, folder: Path, flavour: Flavour, primaries: int) -> None:
        # No failover because the machine is busy.
        self._cluster = RedisCluster(
            folder, flavour, primaries=primaries, timeout_ms=60_000, acl=True
        )
        super().__init__(folder, flavour, self._cluster.servers)

    @override
    def start(self) -> ClusteredServers:
        self._cluster.start()
        return self

    @override
    def url(self, user: User = "relay", db: int = 0) -> str:
        return self.servers[0].url(user)

    @override
    def server_of(self, key: bytes) -> Server:
        count = len(self.servers)
        return self.servers[min(slot_of(key) // (SLOTS // count), count - 1)]


class TwoServers(SeveralServers):
    """Two independent servers."""

    def __init__(self, folder: Path, flavour: Flavour) -> None:
        super().__init__(
            folder, flavour, [Server(folder / name, flavour) for name in ("one", "two")]
        )
        self._map = HashMap(servers_of(RedisSettings(url=self.url())))

    @override
    def url(self, user: User = "relay", db: int = 0) -> str:
        return ", ".join(server.url(user, db) for server in self.servers)

    @override
    def server_of(self, key: bytes) -> Server:
        chosen = self._map.shard_of(key)
        return self.servers[[shard is chosen for shard in self._map.shards].index(True)]


_CLASSES: dict[str, Callable[[Path, Flavour], Server]] = {
    "single": Server,
    "sentinel": GuardedServer,
    "cluster-1": lambda folder, flavour: ClusteredServers(folder, flavour, 1),
    "cluster-3": lambda folder, flavour: ClusteredServers(folder, flavour, 3),
    "two-servers": TwoServers,
}


def chosen() -> str:
    """Return the name of the topology."""
    return os.environ.get(TOPOLOGY, "single")


def is_cluster() -> bool:
    """Return True if the shared server is a Redis Cluster."""
    return chosen().startswith("cluster")


@contextmanager
def running_topology(folder: Path, flavour: Flavour) -> Iterator[Server]:
    """Run the servers of the chosen topology as one."""
    server = _CLASSES[chosen()](folder, flavour)
    with running(server):
        yield server


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose the tests for this topology."""
    if chosen() == "single":
        return
    others = [item for item in items if not FIXTURES & set(getattr(item, "fixturenames", ()))]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    if chosen() == "sentinel":
        reason = "two servers in one list: the Sentinels of both call their primary `main`"
        for item in items:
            if set(getattr(item, "fixturenames", ())) >= FIXTURES:
                item.add_marker(pytest.mark.skip(reason=reason))
        return
    for item in items:
        if mark := item.get_closest_marker("single_server"):
            item.add_marker(pytest.mark.skip(reason=f"single server: {mark.args[0]}"))
