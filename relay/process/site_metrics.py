"""Metrics that are the same for all hosts: the lengths of queues in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from relay.core.errors import RelayError
from relay.core.metric_families import Family
from relay.stream.connection import connect

if TYPE_CHECKING:
    from relay.stream.connection.connect import RedisClient
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients

_ANSWER_S = 1.0


class SiteMetrics:
    """Asks Redis for the lengths of `queues` (lists) and of the dead-letter stream."""

    def __init__(self, clients: ShardClients, keys: Keys, queues: Sequence[str]) -> None:
        self._clients = clients
        self._dead_letters = keys.dead_letters
        self._queues = queues

    async def collected(self) -> list[Family]:
        """Return the lengths. Servers that do not answer within a second are not counted.

        Which servers these are is in `relay_redis_up` and in the log.
        """
        letters = Family(
            "relay_dead_letter_entries", "gauge", "Dead letters in Redis; the same on all hosts"
        )
        queues = Family(
            "relay_queue_length", "gauge", "Commands in each API queue; the same on all hosts"
        )
        async with asyncio.TaskGroup() as tasks:
            length = tasks.create_task(_length(self._clients.home, "XLEN", self._dead_letters))
            lengths = {name: tasks.create_task(self._queue_length(name)) for name in self._queues}
        if (count := length.result()) is not None:
            letters.samples["relay_dead_letter_entries", ()] = count
        for name, each in lengths.items():
            if (count := each.result()) is not None:
                queues.samples["relay_queue_length", (("queue", name),)] = count
        return [each for each in (letters, queues) if each.samples]

    async def _queue_length(self, name: str) -> int | None:
        """Return the sum of the servers that answer, or None if there are none."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                servers = await self._clients.of_queue(name)
        except (RelayError, TimeoutError):
            return None
        async with asyncio.TaskGroup() as tasks:
            # At once, so that a server that hangs does not take the time of the others.
            asked = [tasks.create_task(_length(client, "LLEN", name)) for _, client in servers]
        known = [length for each in asked if (length := each.result()) is not None]
        return sum(known) if known else None


async def _length(client: RedisClient, command: str, key: str | bytes) -> int | None:
    try:
        async with asyncio.timeout(_ANSWER_S):
            return int(await connect.command(client, command, key))
    except (RelayError, TimeoutError):
        return None
