"""The limit for attempts to log in: what strangers can make relay do at the same time."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from relay.stream.cluster.login_attempts import LoginAttempts
from relay.stream.connection.connect import command
from relay.stream.format.keys import Keys

pytestmark = pytest.mark.redis


async def test_many_guesses_at_once_need_few_connections_to_redis(
    client: Redis, keys: Keys, admin: Redis
) -> None:
    attempts = LoginAttempts(client, keys)
    before = (await command(admin, "INFO", "clients"))["connected_clients"]
    async with asyncio.TaskGroup() as tasks:
        guesses = [tasks.create_task(attempts.begin(f"10.0.1.{each}")) for each in range(200)]
    after = (await command(admin, "INFO", "clients"))["connected_clients"]
    assert any(guess.result() for guess in guesses)
    # The client, which heartbeats use too, has at most 100 connections.
    assert after - before <= 8
