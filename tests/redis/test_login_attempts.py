"""The limit for attempts to log in: what strangers can make relay do at the same time."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from relay.stream.cluster.login_attempts import LoginAttempts
from relay.stream.connection.connect import command
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import ShardClients
from tests.support.several import SeveralServers
from tests.support.valkey import Server

pytestmark = pytest.mark.redis


async def test_many_guesses_at_once_need_few_connections_to_redis(
    server: Server, clients: ShardClients, keys: Keys, admin: Redis
) -> None:
    attempts = LoginAttempts(clients, keys)
    before = (await command(admin, "INFO", "clients"))["connected_clients"]
    async with asyncio.TaskGroup() as tasks:
        guesses = [tasks.create_task(attempts.begin(f"10.0.1.{each}")) for each in range(200)]
    after = (await command(admin, "INFO", "clients"))["connected_clients"]
    assert any(guess.result() for guess in guesses)
    # The client, which heartbeats use too, has at most 100 connections.
    servers = len(server.servers) if isinstance(server, SeveralServers) else 1
    assert after - before <= 8 * servers


async def test_similar_addresses_share_their_attempts(clients: ShardClients, keys: Keys) -> None:
    attempts = LoginAttempts(clients, keys)
    # One host has all of these IPv6 addresses.
    same = [f"2001:db8:0:0:{each:x}::1" for each in range(3)] + ["2001:db8::7", "2001:db8::8:7"]
    assert [await attempts.begin(each) for each in same] == [0.0] * 5
    assert await attempts.begin("2001:db8::9") > 0
    assert await attempts.begin("2001:db8:0:1::9") == 0
    # Addresses of IPv4 clients at a socket for both versions.
    mapped = [await attempts.begin(f"::ffff:10.0.2.{each}") for each in range(10)]
    assert mapped == [0.0] * 10
