"""redis-py's client of a Redis Cluster, corrected for a Cluster whose servers and slots change."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis._parsers import AsyncCommandsParser
from redis.asyncio import RedisCluster
from redis.asyncio.cluster import (
    ClusterNode,
    ClusterPipeline,
    NodesManager,
    PipelineStrategy,
)
from redis.cluster import PRIMARY
from redis.exceptions import RedisClusterException, ResponseError
from typing_extensions import override

from relay.stream.connection.addresses import AnyAddress, AnyAddressTls

# While slots have no server, or a server is away, they are read again at most once in this time.
_READ_AGAIN_S = 1.0


class ClusterClient(RedisCluster):
    """A client that reads the slots again when a slot has no server."""

    def __init__(self, addresses: Sequence[tuple[str, int]], **options: Any) -> None:
        """`addresses` are servers that report the others. `options` are those of redis-py."""
        nodes = [ClusterNode(host, port) for host, port in addresses]
        super().__init__(startup_nodes=nodes, require_full_coverage=False, **options)
        self._loop = asyncio.get_running_loop()
        # redis-py has no arguments for these three.
        kwargs = self.connection_kwargs
        kwargs["connection_class"] = AnyAddressTls if options.get("ssl") else AnyAddress
        self.commands_parser = _Commands()
        self._servers = _Servers(addresses, kwargs, self._event_dispatcher, self._read_again)
        self.nodes_manager = self._servers

    @override
    async def initialize(
        self,
        additional_startup_nodes_info: list[tuple[str, int]] | None = None,
        last_failed_node_name: str | None = None,
    ) -> RedisCluster:
        if asyncio.get_running_loop() is not self._loop:
            # redis-py 8.1 queues each command of a transaction in a thread with its own loop, and
            # blocks this loop meanwhile. If this loop is reading the slots, it holds a lock for
            # which the thread would wait forever.
            return self
        if last_failed_node_name and self._servers.were_read_now():
            # redis-py 8.1 makes all its attempts within milliseconds if a server refuses the
            # connection, and would read the slots before each of them.
            self._initialize = False
            return self
        return await super().initialize(additional_startup_nodes_info, last_failed_node_name)

    @override
    def get_node(
        self, host: str | None = None, port: int | None = None, node_name: str | None = None
    ) -> ClusterNode | None:
        node = super().get_node(host, port, node_name)
        if node is None and node_name:
            # The target of ASK. redis-py 8.1 has no server that had no slot when it read them.
            host, _, after = node_name.rpartition(":")
            node = ClusterNode(host, int(after), PRIMARY, **self.connection_kwargs)
            self._servers.set_nodes(self._servers.nodes_cache, {node.name: node})
        return node

    @override
    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> ClusterPipeline:
        pipeline = super().pipeline(transaction, shard_hint)
        if not transaction:
            pipeline._execution_strategy = _Pipeline(pipeline)
        return pipeline

    def _read_again(self) -> None:
        self._initialize = True


class _Pipeline(PipelineStrategy):
    """Raises errors of connections and servers, as the pipeline of a single server does.

    redis-py 8.1 returns them among the replies, and does not look for the promoted replica.
    """

    @override
    async def _execute(self, *args: Any, **options: Any) -> list[Any]:
        replies = await super()._execute(*args, **options)
        for reply in replies:
            if isinstance(reply, RedisCluster.ERRORS_ALLOW_RETRY):
                raise reply
            if isinstance(reply, Exception) and not isinstance(reply, ResponseError):
                raise reply
        return replies


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
        # When the slots were last read.
        self._read_at = -math.inf
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
        self._read_at = asyncio.get_running_loop().time()
        self.slots_cache = _Slots(self.slots_cache, self._on_missing)

    def were_read_now(self) -> bool:
        """Return True if the slots were read a moment ago, and the servers are still in use."""
        until = self._read_at + _READ_AGAIN_S
        return self.default_node is not None and asyncio.get_running_loop().time() < until

    def _on_missing(self) -> None:
        if not self.were_read_now():
            self._read_again()


class _Slots(dict[int, list[ClusterNode]]):
    """The servers of each slot. redis-py 8.1 raises KeyError for a slot that has none."""

    def __init__(
        self, slots: Mapping[int, list[ClusterNode]], on_missing: Callable[[], None]
    ) -> None:
        super().__init__(slots)
        self._on_missing = on_missing

    def __missing__(self, slot: int) -> list[ClusterNode]:
        self._on_missing()
        raise RedisClusterException(f"slot {slot} has no server in the Redis Cluster")


class _Commands(AsyncCommandsParser):
    """The positions of keys in commands. redis-py 8.1 reads these again with the slots."""

    @override
    async def initialize(self, node: ClusterNode | None = None) -> None:
        if self.commands:
            self.node = node or self.node
        else:
            await super().initialize(node)
