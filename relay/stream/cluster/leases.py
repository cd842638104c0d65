"""Leases: of all workers on all hosts, at most one holds a lease and does the job of that name."""

from __future__ import annotations

from relay.stream.connection import connect
from relay.stream.connection.connect import RedisClient
from relay.stream.format.keys import Keys


class Lease:
    """One lease, as seen by this worker. It expires unless it is extended within `ttl_s`."""

    def __init__(
        self, *, client: RedisClient, keys: Keys, name: str, instance: str, ttl_s: float
    ) -> None:
        self._client = client
        self._key = keys.lease(name)
        self._holder = instance.encode()
        self._ttl_ms = int(ttl_s * 1000)

    async def hold(self) -> bool:
        """Take or extend the lease. Return False while another worker holds it."""
        words = ("SET", self._key, self._holder, "NX", "PX", self._ttl_ms)
        if await connect.command(self._client, *words):
            return True
        return await self._if_own("SET", self._key, self._holder, "PX", self._ttl_ms)

    async def release(self) -> None:
        """Release the lease if this worker holds it, so that another need not wait for expiry."""
        await self._if_own("DEL", self._key)

    async def _if_own(self, *words: bytes | str | int) -> bool:
        return await connect.command_if_equal(self._client, self._key, self._holder, *words)
