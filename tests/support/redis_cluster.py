"""Redis Clusters for tests: of one server, where only CROSSSLOT can fail, or of several primaries.

Methods block, as those of `Server`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from typing_extensions import override

from relay.config.settings import RedisSettings
from tests.support.valkey import Flavour, Server, User, free_port, password_of, running

SLOTS = 16384
_STATE_S = 20


class ClusterServer(Server):
    """One node of a Redis Cluster. Alone, it has all slots after `form`."""

    def __init__(self, folder: Path, flavour: Flavour = "valkey", *, node_timeout_ms: int = 2000):
        options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
        options += "--cluster-node-timeout", str(node_timeout_ms)
        super().__init__(folder, flavour, options=tuple(options))
        self.bus_port = int(options[3])

    @override
    def url(self, user: User = "relay", db: int = 0) -> str:
        return f"redis+cluster://{user}:{password_of(user)}@127.0.0.1:{self.port}"

    @override
    def client(self, user: User = "admin") -> redis.Redis:
        """Return a blocking client of this node, which does not follow redirections."""
        return redis.Redis.from_url(super().url(user), driver_info=None, protocol=3)

    def call(self, *words: object) -> Any:
        """Send one command to this node as `admin`."""
        with self.client() as client:
            return client.execute_command(*words)

    @property
    def node_id(self) -> str:
        """Return the node's ID in the cluster."""
        reply: bytes = self.call("CLUSTER", "MYID")
        return reply.decode()


class RedisCluster:
    """Several primaries with an equal share of the slots each. They must be running."""

    def __init__(self, folder: Path, primaries: int = 3, flavour: Flavour = "valkey") -> None:
        self.nodes = [ClusterServer(folder / str(n), flavour) for n in range(primaries)]

    def form(self) -> None:
        """Distribute the slots and wait until all nodes serve them."""
        first, count = self.nodes[0], len(self.nodes)
        for number, node in enumerate(self.nodes):
            begin, end = SLOTS * number // count, SLOTS * (number + 1) // count - 1
            node.call("CLUSTER", "ADDSLOTSRANGE", begin, end)
            # Nodes with equal epochs would have to agree on others first.
            node.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            node.call("CLUSTER", "MEET", "127.0.0.1", first.port, first.bus_port)
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        """Wait until each node knows all nodes and serves."""
        deadline = time.monotonic() + _STATE_S
        for node in self.nodes:
            while True:
                info = node.call("CLUSTER", "INFO")
                known = f"cluster_known_nodes:{len(self.nodes)}"
                text = info.decode() if isinstance(info, bytes) else str(info)
                lines = text.replace("\r", "").split("\n")
                if isinstance(info, dict):
                    lines = [f"{key}:{value}" for key, value in info.items()]
                if "cluster_state:ok" in lines and known in lines:
                    break
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the cluster did not form: {lines}")
                time.sleep(0.02)

    def owner_of(self, slot: int) -> ClusterServer:
        """Return the node that has the slot."""
        for begin, end, primary, *_ in self.nodes[0].call("CLUSTER", "SLOTS"):
            if begin <= slot <= end:
                return next(node for node in self.nodes if node.port == primary[1])
        raise LookupError(slot)

    def move(self, slot: int, target: ClusterServer) -> None:
        """Move a slot with all its keys, as `redis-cli --cluster reshard` does."""
        source = self.owner_of(slot)
        if source is target:
            return
        target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", source.node_id)
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", target.node_id)
        while keys := source.call("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.call(
                *("MIGRATE", "127.0.0.1", target.port, "", 0, 5000),
                *("AUTH2", "admin", "any", "KEYS", *keys),
            )
        for node in (target, source, *self.nodes):
            node.call("CLUSTER", "SETSLOT", slot, "NODE", target.node_id)

    def url(self, user: User = "relay") -> str:
        """Return the value of [redis] url."""
        nodes = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"redis+cluster://{user}:{password_of(user)}@{nodes}"

    def settings(self, user: User = "relay", **more: Any) -> RedisSettings:
        """Return the settings [redis] for this cluster."""
        return RedisSettings(url=self.url(user), **more)


@contextmanager
def forming(cluster: RedisCluster) -> Iterator[None]:
    """Start the nodes, form the cluster, and stop the nodes at the end."""
    with running(*cluster.nodes):
        cluster.form()
        yield
