"""Leases: of all workers on all hosts, at most one holds a lease and does the job of that name."""

from __future__ import annotations

import asyncio
import logging

from relay.core.errors import RelayError
from relay.stream.connection import connect
from relay.stream.connection.connect import RedisClient
from relay.stream.format.keys import Keys

_log = logging.getLogger(__name__)

_GIVE_UP_S = 1.0


class Lease:
    """One lease, as seen by this worker. It expires unless it is extended within `ttl_s`."""

    def __init__(
        self, *, client: RedisClient, keys: Keys, name: str, instance: str, ttl_s: float
    ) -> None:
        self._client = client
        self._name = name
        self._key = keys.lease(name)
        self._holder = instance.encode()
        self._ttl_ms = int(ttl_s * 1000)

    async def hold(self) -> bool:
        """Take or extend the lease. Return False while another worker holds it."""
        words = ("SET", self._key, self._holder, "NX", "PX", self._ttl_ms)
        if await connect.command(self._client, *words):
            return True
        return await self._if_own("SET", self._key, self._holder, "PX", self._ttl_ms)

    async def renew(self) -> bool | None:
        """Call `hold`. Return None if Redis is unreachable: the holder then keeps the lease."""
        try:
            return await self.hold()
        except RelayError as exc:
            _log.debug("Could not renew the lease %s: %s", self._name, exc)
            return None

    async def release(self) -> None:
        """Release the lease if this worker holds it, so that another need not wait for expiry."""
        await self._if_own("DEL", self._key)

    async def give_up(self) -> None:
        """Call `release` at the end of a task. If it fails or takes too long, the lease expires."""
        try:
            async with asyncio.timeout(_GIVE_UP_S):
                await self.release()
        except (RelayError, TimeoutError) as exc:
            _log.info(
                "Could not release the lease %s (%s); it expires in %g s",
                self._name,
                exc,
                self._ttl_ms / 1000,
            )

    async def _if_own(self, *words: bytes | str | int) -> bool:
        return await connect.command_if_equal(self._client, self._key, self._holder, *words)
