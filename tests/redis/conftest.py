"""Servers for these tests: one of each kind per module, emptied before every test."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from relay.stream.connection.connect import redis_client
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import ShardClients, shard_clients
from relay.stream.shards.making import keys_of
from tests.support.several import AsyncRoutedClient, SeveralServers
from tests.support.topologies import TOPOLOGY, running_topology
from tests.support.valkey import PROGRAM, Flavour, Server

# With a given program the flavours would be the same, and one is enough for another topology.
_FLAVOURS = ["redis"] if PROGRAM in os.environ else ["valkey", "redis"]
if TOPOLOGY in os.environ:
    _FLAVOURS = _FLAVOURS[:1]


@pytest.fixture(params=_FLAVOURS, scope="module")
def flavour(request: pytest.FixtureRequest) -> Flavour:
    which: Flavour = request.param
    return which


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory, flavour: Flavour) -> Iterator[Server]:
    with running_topology(tmp_path_factory.mktemp(flavour), flavour) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    """Return a running, empty server, which a test may fill but not stop."""
    with shared_server.client() as admin:
        admin.flushall()
        admin.execute_command("ACL", "LOG", "RESET")
    return shared_server


@pytest.fixture
def keys(server: Server) -> Keys:
    return keys_of(server.settings())


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Redis]:
    """Return the client that relay uses for its jobs, with relay's rights."""
    async with shard_clients(server.settings()) as opened:
        await opened.shards.refresh()
        yield opened.home


@pytest.fixture
async def clients(server: Server) -> AsyncIterator[ShardClients]:
    """Return relay's clients of all shards."""
    async with shard_clients(server.settings()) as opened:
        await opened.shards.refresh()
        yield opened


@pytest.fixture
async def admin(server: Server) -> AsyncIterator[Redis]:
    """Return a client that reaches all keys of all servers."""
    if isinstance(server, SeveralServers):
        async with AsyncRoutedClient(server, "admin") as routed:
            yield routed
    else:
        async with redis_client(server.settings("admin")) as opened:
            yield opened
