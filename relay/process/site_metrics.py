"""Metrics that are the same for all hosts: the lengths of queues in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from relay.core.errors import RelayError
from relay.core.metric_families import Family
from relay.stream.connection import connect

if TYPE_CHECKING:
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
        """Return the lengths. Those that Redis does not return within a second are omitted."""
        letters = Family(
            "relay_dead_letter_entries", "gauge", "Dead letters in Redis; the same on all hosts"
        )
        queues = Family(
            "relay_queue_length", "gauge", "Commands in each API queue; the same on all hosts"
        )
        try:
            async with asyncio.timeout(_ANSWER_S):
                length = await connect.command(self._clients.home, "XLEN", self._dead_letters)
                letters.samples["relay_dead_letter_entries", ()] = length
                for name in self._queues:
                    lengths = [
                        await connect.command(client, "LLEN", name)
                        for client in self._clients.of_queues()
                    ]
                    queues.samples["relay_queue_length", (("queue", name),)] = sum(lengths)
        except (RelayError, TimeoutError):
            # relay_redis_up and the log show why.
            pass
        return [each for each in (letters, queues) if each.samples]
