"""All metrics of a process in one registry."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)

from relay.core.clock import RedisClock

if TYPE_CHECKING:
    from relay.core.worker_memory import WorkerMemory


class _Notified(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def reason(self) -> str: ...


class Metrics:
    """Metrics of `/metrics`. Counters are incremented per batch, never per client."""

    def __init__(
        self,
        worker: int = 0,
        memory: WorkerMemory | None = None,
        clock: RedisClock | None = None,
    ) -> None:
        """`worker` is the number of this worker, or 0 if there is only one."""
        self._worker = worker
        # Ages of entries are differences between two times of Redis.
        self.clock = clock or RedisClock()
        self.registry = CollectorRegistry(auto_describe=True)
        self.events = Counter(
            "relay_events_total", "Entries read live from streams", registry=self.registry
        )
        self.deliveries = Counter(
            "relay_deliveries_total",
            "Events offered to clients: live, from the stream or ephemeral",
            ["way"],
            registry=self.registry,
        )
        self._live = self.deliveries.labels("live")
        self._catch_up = self.deliveries.labels("catch_up")
        self._ephemeral = self.deliveries.labels("ephemeral")
        self.notices = Counter(
            "relay_notices_total",
            "Notices to clients about missing events or revoked rights",
            ["kind", "reason"],
            registry=self.registry,
        )
        self.lag = Histogram(
            "relay_lag_seconds",
            "Age of an entry, by its ID, when it was offered to the live clients",
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30, 300),
            registry=self.registry,
        )
        self._worst_lag_s = 0.0
        self.connections = Gauge(
            "relay_connections", "Open client connections", ["door"], registry=self.registry
        )
        self.subscriptions = Gauge(
            "relay_subscriptions", "Subscriptions of local clients", registry=self.registry
        )
        self.behind = Gauge(
            "relay_catch_up_clients",
            "Subscriptions that are served from the stream",
            registry=self.registry,
        )
        self.streams = Gauge(
            "relay_followed_streams", "Streams with a local client", registry=self.registry
        )
        self.dead_letters = Counter(
            "relay_dead_letters_total",
            "Dead letters written by this worker",
            registry=self.registry,
        )
        self.producer_items = Counter(
            "relay_producer_items_total",
            "Items that a producer read from its source, and items that it could not use",
            ["producer", "result"],
            registry=self.registry,
        )
        self.round_trips = Counter(
            "relay_redis_round_trips_total",
            "Pipelines sent to Redis",
            ["purpose"],
            registry=self.registry,
        )
        self.reconnects = Counter(
            "relay_redis_reconnects_total", "Connections to Redis lost", registry=self.registry
        )
        self.lost_wakeups = Counter(
            "relay_lost_wakeups_total",
            "Entries that the sweep found although no invalidation had been received",
            registry=self.registry,
        )
        self.refused = Counter(
            "relay_refusals_total", "Requests refused", ["code"], registry=self.registry
        )

        self.handshakes = Gauge(
            "relay_handshakes_waiting",
            "Requests of new clients that wait for their turn",
            registry=self.registry,
        )

        if memory is not None:
            ready = Gauge(
                "relay_worker_ready",
                "1 if the worker reads streams, else 0; every worker reports all of its host",
                ["worker"],
                registry=self.registry,
            )
            for number in range(1, memory.count + 1):
                ready.labels(str(number)).set_function(partial(memory.ready, number))

    def pop_worst_lag(self) -> float:
        """Return the largest age of an entry since the last call, in seconds."""
        worst, self._worst_lag_s = self._worst_lag_s, 0.0
        return worst

    def read_live(self, entries: int, offered: int, last_ms: int) -> None:
        """Count new entries of a stream, and how many events were offered to live clients.

        `last_ms` is the time of the newest one in milliseconds since the epoch.
        """
        self.events.inc(entries)
        if offered:
            self._live.inc(offered)
        # The same as `RedisClock.now`, inlined for speed.
        age_s = max(0.0, time.monotonic() + (self.clock.offset_ms - last_ms) / 1000)
        self.lag.observe(age_s)
        self._worst_lag_s = max(self._worst_lag_s, age_s)

    def caught_up(self, count: int) -> None:
        """Count events that were delivered to lagging clients from pages."""
        if count:
            self._catch_up.inc(count)

    def ephemeral(self, count: int) -> None:
        """Count ephemeral events that were offered to live clients."""
        if count:
            self._ephemeral.inc(count)

    def offered(self) -> int:
        """Return the number of all delivered events so far."""
        return round(_total(self.deliveries))

    def received(self) -> int:
        """Return the number of entries read live so far."""
        return round(_total(self.events))

    def connections_by_protocol(self) -> dict[str, int]:
        """Return the open connections of each protocol that has any."""
        samples = (sample for metric in self.connections.collect() for sample in metric.samples)
        return {each.labels["door"]: round(each.value) for each in samples if each.value}

    def notified(self, notice: _Notified, clients: int) -> None:
        """Count notices that were offered to clients."""
        if clients:
            self.notices.labels(notice.kind, notice.reason).inc(clients)

    def exposition(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        if not self._worker:
            return generate_latest(self.registry)
        return generate_latest(cast("CollectorRegistry", _Labelled(self.registry, self._worker)))


def _total(counter: Counter) -> float:
    return sum(
        sample.value
        for metric in counter.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


class _Labelled:
    """A registry whose metrics have a label with the worker's number.

    A request to the shared port may reach any worker, and each worker has its own counters.
    """

    def __init__(self, registry: CollectorRegistry, worker: int) -> None:
        self._registry = registry
        self._label = {"worker": str(worker)}

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            # Keep an existing worker label.
            metric.samples = [
                sample._replace(labels=self._label | sample.labels) for sample in metric.samples
            ]
            yield metric
