"""All metrics of a process in one registry."""

from __future__ import annotations

import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from typing_extensions import override

from relay import __version__
from relay.core import metric_families
from relay.core.clock import RedisClock

if TYPE_CHECKING:
    from relay.core.reasons import Reason
    from relay.core.worker_memory import WorkerMemory

_NO_SIZES: Mapping[str, int] = {}
_LAG_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0)


class _Notified(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def reason(self) -> str: ...


class _Lag:
    """A histogram of ages in seconds."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(_LAG_S) + 1)
        self.sum_s = 0.0

    def buckets(self) -> list[tuple[str, float]]:
        """Return the cumulated counts by upper bound, as Prometheus expects them."""
        total, found = 0, []
        for bound, count in zip((*map(str, _LAG_S), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class _Door:
    """Counters of one protocol: delivery lag, and bytes offered to its clients."""

    __slots__ = ("lag", "size")

    def __init__(self) -> None:
        self.lag = _Lag()
        self.size = 0


class _HotCounts(Collector):
    """Counters of the hot path. They are plain numbers: those of prometheus_client take a lock and
    ten times as long."""

    def __init__(self) -> None:
        self.events = self.live = self.catch_up = self.ephemeral = 0
        self.lag = _Lag()
        self.doors: dict[str, _Door] = {}

    def door(self, name: str) -> _Door:
        return self.doors.setdefault(name, _Door())

    @override
    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "relay_events", "Entries read live from streams", value=self.events
        )
        deliveries = CounterMetricFamily(
            "relay_deliveries",
            "Events offered to clients: live, from the stream or ephemeral",
            labels=["way"],
        )
        deliveries.add_metric(["live"], self.live)
        deliveries.add_metric(["catch_up"], self.catch_up)
        deliveries.add_metric(["ephemeral"], self.ephemeral)
        yield deliveries
        yield HistogramMetricFamily(
            "relay_lag_seconds",
            "Age of the newest entry of a batch, by its ID, when it was read",
            buckets=self.lag.buckets(),
            sum_value=self.lag.sum_s,
        )
        lags = HistogramMetricFamily(
            "relay_delivery_lag_seconds",
            "Age of the newest entry of a batch, by its ID, when it was offered to live clients",
            labels=["protocol"],
        )
        sizes = CounterMetricFamily(
            "relay_delivered_bytes",
            "Encoded events offered to clients, live or from the stream",
            labels=["protocol"],
        )
        for name, door in self.doors.items():
            lags.add_metric([name], door.lag.buckets(), door.lag.sum_s)
            sizes.add_metric([name], door.size)
        yield lags
        yield sizes


class _RedisServers(Collector):
    """Whether the worker is connected to each Redis server. Servers may come and go."""

    def __init__(self) -> None:
        # Returns the servers by address.
        self.connected: Callable[[], Mapping[str, bool]] = dict

    @override
    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(
            "relay_redis_up",
            "1 if the worker is connected to this Redis server, else 0",
            labels=["server"],
        )
        for address, is_connected in self.connected().items():
            up.add_metric([address], is_connected)
        yield up


class Metrics:
    """Metrics of `/metrics`. Counters are incremented per batch, never per client."""

    def __init__(
        self,
        memory: WorkerMemory | None = None,
        clock: RedisClock | None = None,
    ) -> None:
        """`memory` is that of all workers of this host, or None if there is only one."""
        # Ages of entries are differences between two times of Redis.
        self.clock = clock or RedisClock()
        self.registry = CollectorRegistry(auto_describe=True)
        self._hot = _HotCounts()
        self.registry.register(self._hot)
        self.notices = Counter(
            "relay_notices_total",
            "Notices to clients about missing events or revoked rights",
            ["kind", "reason"],
            registry=self.registry,
        )
        self._worst_lag_s = 0.0
        self.connections = Gauge(
            "relay_connections", "Open client connections", ["protocol"], registry=self.registry
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
        self._rejections = Counter(
            "relay_rejections_total",
            "Requests, connections and subscriptions that were rejected",
            ["protocol", "reason"],
            registry=self.registry,
        )
        self._resumes = Counter(
            "relay_resumes_total",
            "Subscriptions that resumed at a position: complete, or with a gap or reset notice",
            ["outcome"],
            registry=self.registry,
        )
        self._complete = self._resumes.labels("complete")
        self.redis = _RedisServers()
        self.registry.register(self.redis)
        self.pending_appends = Gauge(
            "relay_pending_appends",
            "Events that wait to be appended to their streams",
            registry=self.registry,
        )
        Gauge(
            "relay_build_info",
            "1, with the versions of relay and Python",
            ["version", "python"],
            registry=self.registry,
        ).labels(__version__, platform.python_version()).set(1)

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
            connections = Gauge(
                "relay_worker_connections",
                "Client connections of each worker; every worker reports all of its host",
                ["worker"],
                registry=self.registry,
            )
            for number in range(1, memory.count + 1):
                connections.labels(str(number)).set_function(partial(memory.connections, number))

    def pop_worst_lag(self) -> float:
        """Return the largest age of an entry since the last call, in seconds."""
        worst, self._worst_lag_s = self._worst_lag_s, 0.0
        return worst

    def read_live(
        self, entries: int, offered: int, last_ms: int, sizes: Mapping[str, int] = _NO_SIZES
    ) -> None:
        """Count new entries of a stream, and how many events were offered to live clients.

        `last_ms` is the time of the newest one in milliseconds since the epoch. `sizes` are the
        bytes that were offered to the clients of each protocol.
        """
        hot = self._hot
        hot.events += entries
        hot.live += offered
        # The same as `RedisClock.now`, inlined for speed.
        age_s = max(0.0, time.monotonic() + (self.clock.offset_ms - last_ms) / 1000)
        bucket = bisect_left(_LAG_S, age_s)
        hot.lag.counts[bucket] += 1
        hot.lag.sum_s += age_s
        for name, size in sizes.items():
            door = hot.doors.get(name) or hot.door(name)
            door.lag.counts[bucket] += 1
            door.lag.sum_s += age_s
            door.size += size
        if age_s > self._worst_lag_s:
            self._worst_lag_s = age_s

    def caught_up(self, count: int, sizes: Mapping[str, int]) -> None:
        """Count events that were delivered to lagging clients from a page, and their bytes."""
        self._hot.catch_up += count
        for name, size in sizes.items():
            self._hot.door(name).size += size

    def ephemeral(self, count: int) -> None:
        """Count ephemeral events that were offered to live clients."""
        self._hot.ephemeral += count

    def resumed(self, notice: _Notified | None) -> None:
        """Count a subscription that has resumed, by the notice that it receives."""
        if notice is None:
            self._complete.inc()
        else:
            self._resumes.labels(notice.kind).inc()

    def rejected(self, door: str, reason: Reason | str) -> None:
        """Count a rejection. `reason` must be one of a few: each becomes a time series."""
        self._rejections.labels(door, reason).inc()

    def offered(self) -> int:
        """Return the number of all delivered events so far."""
        return self._hot.live + self._hot.catch_up + self._hot.ephemeral

    def received(self) -> int:
        """Return the number of entries read live so far."""
        return self._hot.events

    def connections_by_protocol(self) -> dict[str, int]:
        """Return the open connections of each protocol that has any."""
        samples = (sample for metric in self.connections.collect() for sample in metric.samples)
        return {each.labels["protocol"]: round(each.value) for each in samples if each.value}

    def notified(self, notice: _Notified, clients: int) -> None:
        """Count notices that were offered to clients."""
        if clients:
            self.notices.labels(notice.kind, notice.reason).inc(clients)

    def exposition(self) -> bytes:
        """Return the metrics of this worker in the text format of Prometheus."""
        return metric_families.text(metric_families.collected(self.registry))
