"""redis-py clients for commands outside the pipelines: for a key, for the site, for each server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Self

from relay.core.errors import RedisUnavailable
from relay.stream.connection.connect import (
    check_server,
    cluster_client,
    cluster_seeds,
    endpoint_client,
    redis_client,
    time_ms,
)
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.shards.cluster_map import PrimaryShard
from relay.stream.shards.making import shard_map
from relay.stream.shards.shard import SITE_TAG

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.connection.connect import RedisClient
    from relay.stream.shards.shard import Shard, ShardMap


class ShardClients:
    """Clients of all shards. Create them with `shard_clients`."""

    def __init__(
        self, shards: ShardMap, cluster: RedisClient | None, stack: AsyncExitStack
    ) -> None:
        self.shards = shards
        self._cluster = cluster
        self._stack = stack
        self._clients: dict[Shard, RedisClient] = {}

    @property
    def home(self) -> RedisClient:
        """The client for keys that belong to no channel."""
        return self.for_key(SITE_TAG)

    def for_key(self, key: bytes) -> RedisClient:
        """Return a client for commands whose keys have the same tag as `key`."""
        return self._cluster or self._clients[self.shards.shard_of(key)]

    async def of_queue(self, name: str) -> list[tuple[Shard, RedisClient]]:
        """Return the servers of an API queue: each of several servers may have one of this name.

        Raises:
            RedisUnavailable: The servers of the Cluster are not known.
        """
        if self._cluster is None:
            return list(self._clients.items())
        await self.shards.refresh()
        return [(self.shards.shard_of(name.encode()), self._cluster)]

    async def each(self) -> list[tuple[Shard, RedisClient]]:
        """Return the present shards, each with a client that sends commands to this server only.

        Raises:
            RedisUnavailable: The servers of the Cluster are not known.
        """
        await self.shards.refresh()
        present = list(self.shards.shards)
        for shard in present:
            if shard not in self._clients and isinstance(shard, PrimaryShard):
                client = endpoint_client(shard.endpoint(), shard.settings)
                self._clients[shard] = await self._stack.enter_async_context(client)
        return [(shard, self._clients[shard]) for shard in present]

    async def split(self, keys: Iterable[bytes]) -> list[tuple[Shard, RedisClient, list[bytes]]]:
        """Group keys by server, each with a client as of `each`. Errors as of `each`."""
        clients = dict(await self.each())
        found: dict[Shard, list[bytes]] = {}
        for key in keys:
            found.setdefault(self.shards.shard_of(key), []).append(key)
        return [(shard, clients[shard], own) for shard, own in found.items()]

    async def check(self) -> None:
        """Raise StartError if a server cannot be used. Ignore other errors."""
        with contextlib.suppress(RedisUnavailable):
            for shard, client in await self.each():
                with contextlib.suppress(RedisUnavailable):
                    await check_server(client, shard.settings)

    async def time_ms(self, key: bytes) -> int:
        """Return the time of the server that has the key, see `connect.time_ms`."""
        ((_, client, _),) = await self.split([key])
        return await time_ms(client)

    async def open(self) -> None:
        """Create the clients of a fixed list of servers. They connect with their first command."""
        if self._cluster is None:
            for shard in self.shards.shards:
                client = redis_client(shard.settings)
                self._clients[shard] = await self._stack.enter_async_context(client)


class Connections:
    """Connections for one task, one to each shard that it uses. They close at the end."""

    def __init__(self, clients: ShardClients) -> None:
        self._shards = clients.shards
        self._open: dict[Shard, PipelineConnection] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._open.values():
            connection.close()

    async def to(self, key: bytes) -> PipelineConnection:
        """Return the connection to the server that has the key.

        Raises:
            RedisUnavailable: The server cannot be reached.
        """
        await self._shards.refresh()
        shard = self._shards.shard_of(key)
        if shard not in self._open:
            self._open[shard] = await PipelineConnection.open(
                await shard.locate(), settings=shard.settings, name="relay-admin"
            )
        return self._open[shard]


@asynccontextmanager
async def shard_clients(
    settings: RedisSettings, shards: ShardMap | None = None
) -> AsyncIterator[ShardClients]:
    """Create clients and close them at the end. `shards` is the map to share, if there is one."""
    async with AsyncExitStack() as stack:
        cluster = None
        if cluster_seeds(settings):
            cluster = await stack.enter_async_context(cluster_client(settings))
        clients = ShardClients(shards or shard_map(settings), cluster, stack)
        await clients.open()
        yield clients
