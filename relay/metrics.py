"""Every counter and gauge by name, in one registry of its own per process."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class _Told(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def reason(self) -> str: ...


class Metrics:
    """What `/metrics` shows. Counters are incremented per batch, never per client."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.events = Counter(
            "relay_events_total", "Entries read live from streams", registry=self.registry
        )
        self.deliveries = Counter(
            "relay_deliveries_total",
            "Events offered to clients",
            ["way"],
            registry=self.registry,
        )
        self._live = self.deliveries.labels("live")
        self._catch_up = self.deliveries.labels("catch_up")
        self.notices = Counter(
            "relay_notices_total",
            "Notices to clients that something may be missing or was revoked",
            ["kind", "reason"],
            registry=self.registry,
        )
        self.lag = Histogram(
            "relay_lag_seconds",
            "Age of an entry, by its ID, when it was offered to the live clients",
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30, 300),
            registry=self.registry,
        )
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
            "Entries that could not be delivered",
            registry=self.registry,
        )
        self.queue_commands = Counter(
            "relay_queue_commands_total",
            "Items taken from command queues, and dead letters made of them",
            ["result"],
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
            "Entries that the slow sweep found and no wake-up had announced",
            registry=self.registry,
        )
        self.refused = Counter(
            "relay_refusals_total", "Requests refused", ["code"], registry=self.registry
        )

    def delivered(self, count: int) -> None:
        """Live events offered, all clients together."""
        if count:
            self._live.inc(count)

    def caught_up(self, count: int) -> None:
        """Events offered from pages."""
        if count:
            self._catch_up.inc(count)

    def told(self, notice: _Told, clients: int) -> None:
        """Notices offered."""
        if clients:
            self.notices.labels(notice.kind, notice.reason).inc(clients)

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)
