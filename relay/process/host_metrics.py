"""The metrics of all workers of this host, for one scrape.

Each worker counts in its own memory. The worker that receives a scrape asks the others to write
their metrics to the shared memory, waits shortly, and adds up what is there. Nothing is written
between scrapes. A worker that hangs is counted with its last metrics, and a worker that replaces
another one continues its counters, so that no sum ever falls back: Prometheus would take that for
a restart and count everything again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector

from relay.core.coalescing import RequestCoalescer
from relay.core.metric_families import (
    Family,
    added_up,
    collected,
    growing,
    packed,
    text,
    unpacked,
)
from relay.doorkit.rate_limit import RateLimit

if TYPE_CHECKING:
    from relay.core.metrics import Metrics
    from relay.core.worker_memory import Worker, WorkerMemory
    from relay.process.site_metrics import SiteMetrics
    from relay.transports.between_workers.balance import Balance

_log = logging.getLogger(__name__)

# A scrape needs up to 10 ms of each worker, and on the shared listener anyone can scrape. All
# workers of a host together collect so many times per second; in between, scrapes get the latest
# collection. The burst lets a program see the difference that its own action makes.
_PER_S, _BURST = 10, 200
# A worker that serves answers within milliseconds.
_ANSWER_S = 0.5
_LOOK_S = 0.002


class HostMetrics:
    """Answers scrapes of this worker."""

    def __init__(self, metrics: Metrics, worker: Worker | None, site: SiteMetrics) -> None:
        self._metrics = metrics
        self._worker = worker
        self._site = site
        self._scrapes: RequestCoalescer[str, bytes] = RequestCoalescer()
        self._process = ProcessCollector(registry=CollectorRegistry())
        workers = 1 if worker is None else worker.memory.count
        self._interval_s = workers / _PER_S
        self._bursts = RateLimit(_PER_S / workers, _BURST / workers, time.monotonic)
        self._collected, self._collected_at = b"", -math.inf
        # Counters of earlier processes with this worker's number.
        self._inherited: list[Family] = []
        # Asks the other workers; set if there are others.
        self.balance: Balance | None = None
        if worker is not None:
            data = worker.memory.metrics(worker.number)
            self._inherited = growing(unpacked(data)) if data else []

    async def exposition(self) -> bytes:
        """Return the metrics of this host in the text format of Prometheus.

        Concurrent scrapes share one collection. If there are too many, the latest collection is
        returned, which is at most a moment old.
        """
        is_old = time.monotonic() - self._collected_at >= self._interval_s
        if is_old or self._bursts.accept():
            self._collected = await self._scrapes.run("", lambda _: self._scrape())
            self._collected_at = time.monotonic()
        return self._collected

    async def write(self) -> None:
        """Write the metrics of this worker to the shared memory."""
        if self._worker is None:
            return
        # It counts the entries of /proc/self/fd, of which there is one for each client.
        process = await asyncio.to_thread(collected, self._process)
        # Without a pause until they are written, so that the newest values are written last.
        own = self._own(process)
        if not self._worker.memory.set_metrics(self._worker.number, packed(own)):
            _log.warning("The metrics of this worker are too large: scrapes omit its latest values")

    async def _scrape(self) -> bytes:
        of_site = await self._site.collected()
        if self._worker is None:
            process = await asyncio.to_thread(collected, self._process)
            return await asyncio.to_thread(text, [*self._own(process), *of_site])
        await self.write()
        await self._ask_others(self._worker)
        memory = self._worker.memory
        stored = [
            (memory.metrics(number), memory.is_running(number))
            for number in range(1, memory.count + 1)
        ]
        return await asyncio.to_thread(_text_of_all, stored, of_site)

    def _own(self, process: list[Family]) -> list[Family]:
        return added_up([collected(self._metrics.registry), process, self._inherited])

    async def _ask_others(self, worker: Worker) -> None:
        balance, memory = self.balance, worker.memory
        if balance is None:
            return
        waiting = {
            number: memory.metrics_count(number)
            for number in range(1, memory.count + 1)
            if number != worker.number and memory.ready(number)
        }
        for number in waiting:
            balance.want_metrics(number)
        try:
            async with asyncio.timeout(_ANSWER_S):
                # Another process cannot set an event.
                while _unchanged(memory, waiting):  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            # It hangs or has just died. Its last metrics count.
            return


def _unchanged(memory: WorkerMemory, counts: Mapping[int, int]) -> bool:
    return any(memory.metrics_count(number) == count for number, count in counts.items())


def _text_of_all(stored: list[tuple[bytes, bool]], of_site: list[Family]) -> bytes:
    sets = []
    for data, is_running in stored:
        if data:
            families = unpacked(data)
            # Only the counters of a worker that has died are kept.
            sets.append(families if is_running else growing(families))
    return text([*added_up(sets), *of_site])
