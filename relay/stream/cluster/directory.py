"""The directory of the workers of all hosts: addresses, the shared key, and dead workers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from relay.core.errors import WorkerUnreachable
from relay.stream.cluster.schema import conflict
from relay.stream.cluster.workers import DeadWorkerDetector, parse_heartbeat, read_schemas
from relay.stream.connection import connect

if TYPE_CHECKING:
    from relay.core.worker_deaths import WorkerDeaths
    from relay.stream.connection.connect import RedisClient
    from relay.stream.format.keys import Keys

# Requests for workers without a known address read the list at most this often.
_FRESH_S = 0.1


class WorkerDirectory:
    """Reads the list of workers. `refresh` must be called with each heartbeat."""

    def __init__(
        self,
        *,
        client: RedisClient,
        keys: Keys,
        deaths: WorkerDeaths,
        on_conflict: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`on_conflict` receives why this version must not run beside the other workers, or ''."""
        self._on_conflict = on_conflict
        # Authenticates connections between workers. Empty until the first `refresh`.
        self.key = b""
        # The present key and, if it was lost in Redis, the one before it.
        self.keys: tuple[bytes, ...] = (b"",)
        self._client = client
        self._keys = keys
        self._deaths = deaths
        self._detector = DeadWorkerDetector(client=client, keys=keys, dead=deaths.is_dead)
        # Instance and internal address by the address that session IDs name.
        self._workers: dict[str, tuple[str, str]] = {}
        self._read_at = 0.0
        self._reading = asyncio.Lock()

    async def refresh(self) -> None:
        """Read the list of workers and the shared key."""
        async with self._reading:
            await self._refresh()

    async def _refresh(self) -> None:
        registry = await self._detector.read()
        before, self._workers = self._workers, {}
        for instance, beat in registry.items():
            worker = instance.rpartition(":")[2]
            info = None if beat is None else parse_heartbeat(instance, beat)
            # Without a heartbeat, a worker is not dead yet. Its heartbeat has also expired after a
            # freeze, or after an outage of Redis.
            known = before.get(worker, (instance, ""))
            self._workers[worker] = known if info is None else (instance, info.internal)
        self._on_conflict(conflict(read_schemas(registry)))
        self._read_at = asyncio.get_running_loop().time()
        for instance in self._detector.dead(registry):
            self._deaths.report(instance)
        for instance, beat in registry.items():
            if beat is not None and not self._deaths.is_certain(instance):
                self._deaths.withdraw(instance)
        key = await self._shared_key()
        if key != self.key:
            self.keys = (key, self.key) if self.key else (key,)
            self.key = key

    async def _shared_key(self) -> bytes:
        """Return the key of all workers. The first worker writes it."""
        name = self._keys.internal_key
        found: bytes | None = await connect.command(self._client, "GET", name)
        if found is None:
            # Only now, because a Redis whose memory is full rejects each SET.
            own = secrets.token_bytes(32)
            found = await connect.command(self._client, "SET", name, own, "NX", "GET") or own
        return found

    async def address_of(self, worker: str) -> tuple[str, int] | None:
        """Return the host and port of a worker's internal address, or None if it is dead.

        Raise WorkerUnreachable if it is not dead and its internal address is unknown, and
        RelayError if Redis is needed and cannot be reached.
        """
        if not self._has_address(worker):
            requested_at = asyncio.get_running_loop().time()
            async with self._reading:
                # One read answers all requests that waited for it.
                if not self._has_address(worker) and self._read_at < requested_at:
                    # It may have started, or opened its address, since the list was read.
                    age_s = asyncio.get_running_loop().time() - self._read_at
                    await asyncio.sleep(_FRESH_S - age_s)
                    await self._refresh()
        instance, internal = self._workers.get(worker, ("", ""))
        if not instance or self._deaths.is_dead(instance):
            return None
        address = urlsplit(f"//{internal}")
        if not address.hostname or not address.port:
            raise WorkerUnreachable(f"worker {worker} has no internal address")
        return address.hostname, address.port

    def _has_address(self, worker: str) -> bool:
        return bool(self._workers.get(worker, ("", ""))[1])
