"""What is done by the clock: retention and the groups of dead workers, by one worker of the site.

Each job runs under a lease in Redis, so any number of workers may have it scheduled. A job that
finds Redis away is simply tried again at its next time.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from relay.core.errors import RelayError
from relay.stream.cluster.leases import Lease
from relay.stream.cluster.workers import HEARTBEAT_S, DeadWorkerDetector
from relay.stream.connection.refusals import Refusals
from relay.stream.upkeep.dead_workers import DeadWorkersJob
from relay.stream.upkeep.retention import trim
from relay.stream.upkeep.unused import UnusedStreamsJob

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from relay.config.settings import JobSettings, NamespaceSettings
    from relay.core.model import Channel
    from relay.stream.cluster.presence import ClusterPresence
    from relay.stream.format.keys import Keys

_log = logging.getLogger(__name__)


# Name of a note in `Refusals`.
_MISNAMED = "misnamed streams"


def _misnamed(keys: Keys, found: Sequence[bytes]) -> str:
    if not found:
        return ""
    start = keys.prefix.decode() + "stream:"
    name = found[0].decode(errors="replace")
    channel = name.removeprefix(start).strip("{}")
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"stream {name}{others} belongs to no channel: its events are not delivered."
        f" The key of a channel has braces: {start}{{{channel}}}"
    )


class Jobs:
    """The schedule of one worker."""

    def __init__(
        self,
        *,
        client: Redis,
        keys: Keys,
        instance: str,
        settings: JobSettings,
        namespace_of: Callable[[Channel], NamespaceSettings],
        presence: ClusterPresence,
        refusals: Refusals,
    ) -> None:
        self._refusals = refusals
        self._client = client
        self._keys = keys
        self._instance = instance
        self._namespace_of = namespace_of
        self._presence = presence
        dead = presence.is_dead
        self._silence = DeadWorkerDetector(client=client, keys=keys, dead=dead)
        self._dead_nodes = DeadWorkersJob(client=client, keys=keys, dead=dead, clear=presence.clear)
        self._leases: list[Lease] = []
        self._scheduler = AsyncIOScheduler(timezone="UTC")
        self._add("retention", self._trim, settings.retention_s)
        self._unused = UnusedStreamsJob(client, keys)
        self._add("unused-streams", self._remove_unused, settings.retention_s)
        self._add("dead-nodes", self._remove_dead_nodes, settings.dead_nodes_s)
        # Often, since clients wait to be told; but only where there are any.
        self._add("presence", self._remove_absent, HEARTBEAT_S, lambda: presence.in_use)

    def start(self) -> None:
        """In the running loop."""
        self._scheduler.start()

    async def stop(self) -> None:
        """No further run; the leases are given up for the other workers."""
        self._scheduler.shutdown(wait=False)
        for lease in self._leases:
            try:
                await lease.release()
            except RelayError as exc:
                _log.info("a lease is left to expire: %s", exc)

    def _add(
        self,
        name: str,
        job: Callable[[], Awaitable[None]],
        every_s: float,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        lease = Lease(
            client=self._client,
            keys=self._keys,
            name=name,
            instance=self._instance,
            # Longer than the period, so that the holder keeps it from one run to the next.
            ttl_s=every_s * 2.5,
        )
        self._leases.append(lease)

        async def run() -> None:
            try:
                if wanted() and await lease.hold():
                    await job()
            except RelayError as exc:
                _log.warning("job %s is put off: %s", name, exc)

        self._scheduler.add_job(
            run, "interval", seconds=every_s, jitter=every_s / 10, max_instances=1, coalesce=True
        )

    async def _trim(self) -> None:
        done = await trim(self._client, self._keys, self._namespace_of)
        self._refusals.note(_MISNAMED, _misnamed(self._keys, done.misnamed))
        if done.entries or done.foreign:
            _log.info(
                "retention: %d entries removed from %d streams; %d foreign keys",
                done.entries,
                done.streams,
                done.foreign,
            )

    async def _remove_unused(self) -> None:
        removed = await self._unused.run()
        if removed:
            _log.info("Removed %d unused streams", removed)

    async def _remove_dead_nodes(self) -> None:
        for instance in await self._dead_nodes.remove():
            _log.info("groups of dead worker %s removed", instance)

    async def _remove_absent(self) -> None:
        for instance in await self._silence.look():
            await self._presence.clear(instance)
