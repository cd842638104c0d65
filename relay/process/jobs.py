"""All periodic jobs of a worker, with their periods, and the scheduler that runs them.

APScheduler uses the clock of the host. If that clock is set, all jobs run at once and then again
after their periods; otherwise they would stand still until it shows the earlier time again.

A job that is `shared` runs under a lease in Redis: of all workers of the cluster, only the holder
runs it. If a job raises a RelayError, for instance because Redis is unavailable, the error is
logged and the job runs again at its next time. While the reader has no connection to Redis, errors
of the connection are logged at debug level only, because the reader reports the cause. Any other
exception is a bug and ends the process. If a job is due while its last run has not ended, it skips
a run, and the log names the consequence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from apscheduler.events import EVENT_JOB_MAX_INSTANCES, JobSubmissionEvent
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger
from typing_extensions import override

from relay.core.errors import RedisUnavailable, RelayError, Unavailable
from relay.core.worker_memory import BEAT_S
from relay.process.garbage import CHECK_S as COLLECTION_CHECK_S
from relay.stream.cluster.leases import Lease
from relay.stream.cluster.presence import CHECK_S
from relay.stream.cluster.workers import HEARTBEAT_S, NOT_READY_S, DeadWorkerDetector
from relay.stream.connection.cancellation import end_all
from relay.stream.connection.connect import RefusedForNow
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.upkeep.dead_workers import DeadWorkersJob
from relay.stream.upkeep.retention import describe_misnamed, trim
from relay.stream.upkeep.unused import UnusedStreamsJob

if TYPE_CHECKING:
    from relay.config.settings import JobSettings, NamespaceSettings
    from relay.core.model import Channel
    from relay.process.admission import Admission
    from relay.process.garbage import RareCollections
    from relay.process.shared_listeners import SharedListeners
    from relay.stream.cluster.directory import WorkerDirectory
    from relay.stream.cluster.presence import ClusterPresence
    from relay.stream.cluster.workers import WorkerHeartbeat
    from relay.stream.connection.connect import RedisClient
    from relay.stream.connection.refusals import Refusals
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients

_log = logging.getLogger(__name__)

# An expired credential or answer takes effect within a second.
RIGHTS_S = 0.5
# A client that is cut right after the clock of Redis was set forward finds its session.
CLOCK_S = 0.5
# Spreads the workers' attempts to get a lease.
_JITTER = 0.1
# The clock of the host was set if it moves by this much more or less than the monotonic clock.
_SET_S = 1.0
_CLOCK_CHECK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodicJob:
    """A function that runs every `every_s` seconds.

    `at_once`: the first run is at the start, not one period later. `shared`: only one worker of
    the cluster runs it. If `is_wanted` returns False, a run is skipped, and no lease is taken.
    `if_late`: the consequence of a late run, for the log.
    """

    name: str
    every_s: float
    run: Callable[[], Awaitable[None]]
    if_late: str
    at_once: bool = False
    shared: bool = False
    is_wanted: Callable[[], bool] = lambda: True


def worker_jobs(
    *,
    admission: Admission,
    heartbeat: WorkerHeartbeat,
    directory: WorkerDirectory,
    presence: ClusterPresence,
    listeners: SharedListeners | None,
    collections: RareCollections,
    measure_clock: Callable[[], Awaitable[None]],
) -> Iterator[PeriodicJob]:
    """Yield the jobs that each worker runs for itself."""

    async def renew() -> None:
        admission.renew()

    yield PeriodicJob(
        name="rights",
        every_s=RIGHTS_S,
        run=renew,
        if_late="clients whose credentials have expired stay connected longer",
    )
    yield PeriodicJob(
        name="clock",
        every_s=CLOCK_S,
        run=measure_clock,
        at_once=True,
        if_late="a change of the clock of Redis takes effect later",
    )
    yield PeriodicJob(
        name="other workers",
        every_s=HEARTBEAT_S,
        run=directory.refresh,
        at_once=True,
        if_late="this worker detects new and stopped workers later",
    )
    silent = "other workers assume that this worker has crashed if it stays silent"
    yield PeriodicJob(
        name="heartbeat", every_s=HEARTBEAT_S, run=heartbeat.beat, at_once=True, if_late=silent
    )
    yield PeriodicJob(
        name="heartbeat until ready",
        every_s=NOT_READY_S,
        run=heartbeat.beat_unless_ready,
        if_late=silent,
    )
    yield PeriodicJob(
        name="presence check",
        every_s=CHECK_S,
        run=presence.check,
        if_late="presence that Redis has lost is restored later",
    )
    yield PeriodicJob(
        name="garbage",
        every_s=COLLECTION_CHECK_S,
        run=collections.collect_if_grown,
        if_late="unused memory is freed later",
    )
    if listeners is not None:
        yield PeriodicJob(
            name="worker memory",
            every_s=BEAT_S,
            run=listeners.renew,
            if_late="the other workers of this host may treat this worker as frozen",
        )


def shared_jobs(
    *,
    clients: ShardClients,
    keys: Keys,
    settings: JobSettings,
    namespace_of: Callable[[Channel], NamespaceSettings],
    presence: ClusterPresence,
    refusals: Refusals,
) -> Iterator[PeriodicJob]:
    """Yield the jobs that one worker runs for the whole cluster."""
    upkeep = _Upkeep(clients, keys, namespace_of, presence, refusals)
    retention_s = settings.retention_s
    yield PeriodicJob(
        name="retention",
        every_s=retention_s,
        run=upkeep.trim,
        shared=True,
        if_late="old events are removed later",
    )
    yield PeriodicJob(
        name="unused-streams",
        every_s=retention_s,
        run=upkeep.remove_unused,
        shared=True,
        if_late="unused streams are removed later",
    )
    yield PeriodicJob(
        name="dead-nodes",
        every_s=settings.dead_nodes_s,
        run=upkeep.remove_dead_workers,
        shared=True,
        if_late="consumer groups of dead workers are removed later",
    )
    # Often, because clients are waiting for leave messages.
    yield PeriodicJob(
        name="presence",
        every_s=HEARTBEAT_S,
        run=upkeep.remove_absent,
        shared=True,
        is_wanted=lambda: presence.in_use,
        if_late="clients of dead workers leave their channels later",
    )


class _Interval(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """Due one period after the last run began.

    APScheduler's own interval trigger computes all runs that a clock set forward has skipped, which
    takes minutes for a year.
    """

    def __init__(self, job: PeriodicJob) -> None:
        self._job = job

    @override
    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime:
        if previous is None and self._job.at_once:
            return now
        spread = random.uniform(1 - _JITTER, 1 + _JITTER) if self._job.shared else 1.0  # noqa: S311
        return now + timedelta(seconds=self._job.every_s * spread)


class JobScheduler:
    """Runs periodic jobs with APScheduler; `run` must be running.

    `is_connected` returns True if the reader has a connection to Redis.
    """

    def __init__(
        self,
        *,
        client: RedisClient,
        keys: Keys,
        instance: str,
        jobs: Sequence[PeriodicJob],
        is_connected: Callable[[], bool],
    ) -> None:
        self.jobs = jobs
        self._is_connected = is_connected
        self._job_of = {job.name: job for job in jobs}
        self._leases = {
            job.name: Lease(
                client=client,
                keys=keys,
                name=job.name,
                instance=instance,
                # Longer than the period, so that the holder keeps it from one run to the next.
                ttl_s=job.every_s * 2.5,
            )
            for job in jobs
            if job.shared
        }
        self._running: set[asyncio.Task[None]] = set()
        self._is_ending = False
        self._failed = asyncio.Event()
        self._bug: Exception | None = None
        self._scheduler = AsyncIOScheduler(
            timezone="UTC",
            job_defaults={"max_instances": 1, "coalesce": True, "misfire_grace_time": None},
        )
        self._scheduler.add_listener(self._on_skipped, EVENT_JOB_MAX_INSTANCES)

    async def run(self) -> None:
        """Run the jobs until cancelled. Raise the exception of a job that has a bug."""
        for job in self.jobs:
            self._scheduler.add_job(self._run_once, _Interval(job), [job], id=job.name)
        self._scheduler.start()
        try:
            await self._watch_clock()
            if self._bug is not None:
                raise self._bug
        finally:
            self._is_ending = True
            self._scheduler.shutdown(wait=False)
            await end_all(self._running)

    async def leave(self) -> None:
        """Stop the shared jobs and release their leases, so that other workers continue."""
        for name, lease in self._leases.items():
            # There are no jobs if the scheduler has stopped because of an error.
            if self._scheduler.get_job(name) is not None:
                self._scheduler.remove_job(name)
            try:
                await lease.release()
            except RelayError as exc:
                _log.info("Could not release the lease of job %s; it expires soon: %s", name, exc)

    async def _watch_clock(self) -> None:
        """Run all jobs whenever the clock of the host was set. Return when a job has failed."""
        lead_s = time.time() - time.monotonic()
        while not self._failed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOCK_CHECK_S):
                    await self._failed.wait()
            before_s, lead_s = lead_s, time.time() - time.monotonic()
            if abs(lead_s - before_s) > _SET_S:
                for each in self._scheduler.get_jobs():
                    each.modify(next_run_time=datetime.now(UTC))

    async def _run_once(self, job: PeriodicJob) -> None:
        task = asyncio.current_task()
        if task is None or task in self._running:
            return
        self._running.add(task)
        lease = self._leases.get(job.name)
        try:
            if job.is_wanted() and (lease is None or await lease.hold()):
                await job.run()
        except RelayError as exc:
            level = logging.DEBUG if self._is_reported(exc) else logging.WARNING
            text = "Skipped job %s: %s; next run in %g s"
            _log.log(level, text, job.name, exc, job.every_s)
        except asyncio.CancelledError:
            # APScheduler would log it as an error.
            if not self._is_ending:
                raise
        except Exception as exc:  # noqa: BLE001  # `run` raises it
            exc.add_note(f"raised by the periodic job {job.name}")
            self._bug = exc
            self._failed.set()
        finally:
            self._running.discard(task)

    def _on_skipped(self, event: JobSubmissionEvent) -> None:
        job = self._job_of[event.job_id]
        _log.log(
            logging.WARNING if self._is_connected() else logging.DEBUG,
            "Job %s took longer than its period of %g s and skipped a run: %s. "
            "If this repeats, check the CPU load of this host and the latency of Redis",
            job.name,
            job.every_s,
            job.if_late,
        )

    def _is_reported(self, exc: RelayError) -> bool:
        """Return True if the reader logs the cause of the error."""
        of_connection = isinstance(exc, RedisUnavailable | Unavailable)
        return of_connection and not isinstance(exc, RefusedForNow) and not self._is_connected()


class _Upkeep:
    """The shared jobs."""

    def __init__(
        self,
        clients: ShardClients,
        keys: Keys,
        namespace_of: Callable[[Channel], NamespaceSettings],
        presence: ClusterPresence,
        refusals: Refusals,
    ) -> None:
        self._clients = clients
        self._keys = keys
        self._namespace_of = namespace_of
        self._presence = presence
        self._refusals = refusals
        dead = presence.is_dead
        self._detector = DeadWorkerDetector(client=clients.home, keys=keys, dead=dead)
        self._dead_workers = DeadWorkersJob(
            clients=clients, keys=keys, dead=dead, clear=presence.clear
        )
        self._unused = UnusedStreamsJob(clients, keys)

    async def trim(self) -> None:
        """Apply retention to all streams."""
        done = await trim(self._clients, self._keys, self._namespace_of)
        self._refusals.note(_MISNAMED, _misnamed(self._keys, done.misnamed))
        if done.entries or done.not_streams:
            _log.info(
                "Retention removed %d entries from %d streams; skipped %d keys of other programs",
                done.entries,
                done.streams,
                done.not_streams,
            )

    async def remove_unused(self) -> None:
        """Remove streams that no client uses any more."""
        removed = await self._unused.run()
        if removed:
            _log.info("Removed %d unused streams", removed)

    async def remove_dead_workers(self) -> None:
        """Remove the consumer groups of dead workers."""
        for instance in await self._dead_workers.remove():
            _log.info("Removed the consumer groups of dead worker %s", instance)

    async def remove_absent(self) -> None:
        """Remove clients of dead workers from presence."""
        errors = ServerErrors()
        for instance in await self._detector.check():
            await self._presence.clear(instance, errors)
        errors.finish()


# Name of a note in `Refusals`.
_MISNAMED = "misnamed streams"


def _misnamed(keys: Keys, found: Sequence[bytes]) -> str:
    return describe_misnamed(keys, found[0], len(found) - 1) if found else ""
