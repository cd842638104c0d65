"""redis-py's client of a Redis Cluster, corrected for a Cluster whose servers and slots change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode, NodesManager
from redis.exceptions import RedisClusterException
from typing_extensions import override

from relay.stream.connection.addresses import AnyAddress, AnyAddressTls

# While slots have no server, they are read again at most once in this time.
_READ_AGAIN_S = 1.0


class ClusterClient(RedisCluster):
    """A client that reads the slots again when a slot has no server."""

    def __init__(self, addresses: Sequence[tuple[str, int]], **options: Any) -> None:
        """`addresses` are servers that report the others. `options` are those of redis-py."""
        nodes = [ClusterNode(host, port) for host, port in addresses]
        super().__init__(startup_nodes=nodes, require_full_coverage=False, **options)
        self._loop = asyncio.get_running_loop()
        # redis-py has no argument for these two.
        kwargs = self.connection_kwargs
        kwargs["connection_class"] = AnyAddressTls if options.get("ssl") else AnyAddress
        self.nodes_manager = _Servers(addresses, kwargs, self._event_dispatcher, self._read_again)

    @override
    async def initialize(self, *args: Any, **options: Any) -> RedisCluster:
        if asyncio.get_running_loop() is not self._loop:
            # redis-py 8.1 queues each command of a transaction in a thread with its own loop, and
            # blocks this loop meanwhile. If this loop is reading the slots, it holds a lock for
            # which the thread would wait forever.
            return self
        return await super().initialize(*args, **options)

    def _read_again(self) -> None:
        self._initialize = True


class _Servers(NodesManager):
    """The servers of a Cluster and their slots, some of which may have no server."""

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        options: dict[str, Any],
        events: Any,
        read_again: Callable[[], None],
    ) -> None:
        self._seeds = [ClusterNode(host, port, **options) for host, port in addresses]
        self._read_again = read_again
        super().__init__(self._seeds, False, options, event_dispatcher=events)

    @override
    async def initialize(self, *args: Any, **options: Any) -> None:
        try:
            await super().initialize(*args, **options)
        except IndexError as exc:
            # redis-py 8.1 takes the first of no primaries, and before that it removes all addresses
            # at which it could ask again.
            self.startup_nodes.update({node.name: node for node in self._seeds})
            await self.aclose("startup_nodes")
            raise RedisClusterException("no server of the Redis Cluster has a slot") from exc
        self.slots_cache = _Slots(self.slots_cache, self._read_again)


class _Slots(dict[int, list[ClusterNode]]):
    """The servers of each slot. redis-py 8.1 raises KeyError for a slot that has none."""

    def __init__(
        self, slots: Mapping[int, list[ClusterNode]], read_again: Callable[[], None]
    ) -> None:
        super().__init__(slots)
        self._read_again = read_again
        self._loop = asyncio.get_running_loop()
        self._read_at = self._loop.time()

    def __missing__(self, slot: int) -> list[ClusterNode]:
        if self._loop.time() > self._read_at + _READ_AGAIN_S:
            self._read_again()
        raise RedisClusterException(f"slot {slot} has no server in the Redis Cluster")
