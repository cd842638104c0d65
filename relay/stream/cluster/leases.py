"""Leases: at most one worker of all hosts holds a lease, and does the job of that name for all."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.exceptions import WatchError

from relay.stream.connection import connect
from relay.stream.format.keys import Keys


class Lease:
    """Held by at most one worker of the site, which then does the job of that name for all."""

    def __init__(
        self, *, client: Redis, keys: Keys, name: str, instance: str, ttl_s: float
    ) -> None:
        self._client = client
        self._key = keys.lease(name)
        self._holder = instance.encode()
        self._ttl_ms = int(ttl_s * 1000)

    async def hold(self) -> bool:
        """Take it, or prolong it if it is ours; False while another worker holds it."""
        words = ("SET", self._key, self._holder, "NX", "PX", self._ttl_ms)
        if await connect.command(self._client, *words):
            return True
        return await self._if_own("SET", self._key, self._holder, "PX", self._ttl_ms)

    async def release(self) -> None:
        """Give it up if it is ours, so that the next one need not wait for its expiry."""
        await self._if_own("DEL", self._key)

    async def _if_own(self, *words: bytes | str | int) -> bool:
        # Watched, since it may expire and be another's between the look and the write. Valkey has
        # SET IFEQ for this, Redis 7 does not.
        async with self._client.pipeline(transaction=True) as transaction:
            with connect.translated():
                await transaction.watch(self._key)
                if await connect.command(transaction, "GET", self._key) != self._holder:
                    return False
                transaction.multi()  # type: ignore[no-untyped-call]
                transaction.execute_command(*words)
                try:
                    await transaction.execute()
                except WatchError:
                    return False
        return True
