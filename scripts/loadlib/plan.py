"""Computes what a number of clients needs: workers, hosts, memory, Redis servers, network.

`docs/scaling.md` explains the formulas. Its tables are printed by this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Measured costs. Processor times are in microseconds of one core."""

    # Relay, per event that is written to one client.
    delivery_us: float = 6.0
    # Relay, per event and worker that follows its channel.
    read_us: float = 130.0
    # Redis, per appended event, and per event and worker that reads it.
    redis_append_us: float = 15.0
    redis_read_us: float = 50.0
    # A worker and a Redis server without traffic: share of a core.
    base_share: float = 0.003
    # Redis, per worker that is connected to a server: share of a core.
    redis_idle_share: float = 0.0012
    # A client that connects and resumes.
    handshake_us: float = 400.0
    redis_handshake_us: float = 50.0
    # Memory of an idle client in relay and in the kernel, and of a worker without clients.
    client_kb: float = 4.3
    kernel_kb: float = 5.0
    worker_mb: float = 79.0
    # Bytes on the wire besides the event: heads of Ethernet, IP and TCP, the frame, and IDs.
    overhead_bytes: int = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much of each resource is planned."""

    # Share of a core of relay and of Redis in ordinary operation. The rest is for storms.
    busy_share: float = 0.6
    # With 16,000 clients, all return to a worker within 7 s.
    clients_per_worker: int = 16_000
    workers_per_host: int = 8
    # Each worker is connected to each Redis server. 200 workers take a quarter of each.
    workers_per_site: int = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Events of one kind: how many per second, and how many clients follow each channel."""

    name: str
    events_per_s: float
    followers: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The result for one site, and the number of equal sites."""

    clients: int
    sites: int
    workers: int
    hosts: int
    deliveries_per_s: float
    relay_cores: float
    redis_cores: float
    redis_servers: int
    memory_mb_per_host: float
    network_mbit_per_host: float
    storm_s: float
    broadcast_s: float
    first_limit: str

    def row(self) -> dict[str, Any]:
        """Return the plan as a row of the table in the document."""
        several = f"{self.sites} sites, each " if self.sites > 1 else ""
        return {
            "clients": f"{self.clients:,}",
            "relay": f"{several}{self.hosts} hosts, {self.workers} workers",
            "Redis servers": f"{several}{self.redis_servers}",
            "deliveries/s": f"{self.deliveries_per_s:,.0f}",
            "relay cores busy": _rounded(self.relay_cores),
            "Redis cores busy": _rounded(self.redis_cores),
            "MB per host": f"{self.memory_mb_per_host:,.0f}",
            "Mbit/s per host": _rounded(self.network_mbit_per_host),
            "all back": f"{self.storm_s:.1f} s",
            "one event to all": f"{self.broadcast_s:.2g} s",
            "decides": self.first_limit,
        }


def _rounded(value: float) -> str:
    """Return the value with two significant digits, without an exponent."""
    return f"{float(f'{value:.2g}'):g}"


def typical(clients: int) -> list[Traffic]:
    """Return the traffic of the document's examples."""
    return [
        # Each client receives an event of its own every 100 s.
        Traffic(name="personal", events_per_s=clients / 100, followers=1),
        # Each client is in one group of 100, which has an event every 10 s.
        Traffic(name="groups", events_per_s=clients / 1000, followers=min(100, clients)),
        Traffic(name="everybody", events_per_s=1 / 60, followers=clients),
    ]


def following(followers: float, workers: int) -> float:
    """Return how many workers follow a channel whose followers are distributed evenly."""
    return workers * (1 - (1 - 1 / workers) ** followers)


def relay_us_per_s(traffic: Sequence[Traffic], workers: int, costs: Costs) -> float:
    """Return the processor time of all workers together, in microseconds per second."""
    return sum(
        each.events_per_s
        * (each.followers * costs.delivery_us + following(each.followers, workers) * costs.read_us)
        for each in traffic
    )


def redis_us_per_s(traffic: Sequence[Traffic], workers: int, costs: Costs) -> float:
    """Return the processor time of all Redis servers, without that of idle connections."""
    return sum(
        each.events_per_s
        * (costs.redis_append_us + following(each.followers, workers) * costs.redis_read_us)
        for each in traffic
    )


def plan(
    clients: int,
    traffic: Sequence[Traffic],
    *,
    payload_bytes: int = 150,
    costs: Costs | None = None,
    limits: Limits | None = None,
) -> Plan:
    """Return what the clients need. Several sites are planned if one cannot have enough workers."""
    costs, limits = costs or Costs(), limits or Limits()
    sites = 1
    while True:
        here = math.ceil(clients / sites)
        found = _site(here, [_of_site(each, clients, sites) for each in traffic], costs, limits)
        if found is not None:
            workers, redis_servers, decides = found
            break
        sites += 1
    own = [_of_site(each, clients, sites) for each in traffic]
    hosts = max(2, math.ceil(workers / limits.workers_per_host))
    deliveries = sum(each.events_per_s * each.followers for each in own)
    on_host = here / hosts
    memory_kb = on_host * (costs.client_kb + costs.kernel_kb)
    bytes_per_s = deliveries / hosts * (payload_bytes + costs.overhead_bytes)
    return Plan(
        clients=clients,
        sites=sites,
        workers=workers,
        hosts=hosts,
        deliveries_per_s=deliveries * sites,
        relay_cores=relay_us_per_s(own, workers, costs) * sites / 1e6,
        redis_cores=redis_us_per_s(own, workers, costs) * sites / 1e6
        + workers * redis_servers * costs.redis_idle_share * sites,
        redis_servers=redis_servers,
        memory_mb_per_host=memory_kb / 1024 + workers / hosts * costs.worker_mb,
        network_mbit_per_host=bytes_per_s * 8 / 1e6,
        storm_s=max(
            here / workers * costs.handshake_us, here / redis_servers * costs.redis_handshake_us
        )
        / 1e6,
        broadcast_s=here / workers * costs.delivery_us / 1e6,
        first_limit=decides,
    )


def _of_site(traffic: Traffic, clients: int, sites: int) -> Traffic:
    """Return the part of one site. Channels that more clients follow exist in each site."""
    here = math.ceil(clients / sites)
    if traffic.followers <= here:
        return Traffic(
            name=traffic.name,
            events_per_s=traffic.events_per_s / sites,
            followers=traffic.followers,
        )
    return Traffic(name=traffic.name, events_per_s=traffic.events_per_s, followers=here)


def _site(
    clients: int, traffic: Sequence[Traffic], costs: Costs, limits: Limits
) -> tuple[int, int, str] | None:
    """Return workers, Redis servers and what decides, or None if one site is not enough."""
    # Two workers, so that one can be replaced.
    fewest = max(2, math.ceil(clients / limits.clients_per_worker))
    workers = fewest
    while workers <= limits.workers_per_site:
        needed = relay_us_per_s(traffic, workers, costs) / 1e6 / limits.busy_share
        if needed <= workers:
            break
        workers = max(workers + 1, math.ceil(needed))
    else:
        return None
    share = limits.busy_share - workers * costs.redis_idle_share
    redis_us = redis_us_per_s(traffic, workers, costs)
    servers = max(1, math.ceil(redis_us / 1e6 / share))
    if servers > 1:
        return workers, servers, "Redis: reads by workers"
    if workers > fewest:
        return workers, servers, "relay: deliveries"
    by_clients = "relay: clients per worker"
    return workers, servers, by_clients if fewest > 2 else "redundancy"


def arithmetic(clients: int, traffic: Sequence[Traffic], found: Plan, costs: Costs) -> list[str]:
    """Return the steps of the computation for one site as lines of text."""
    lines = [f"{clients:,} clients in {found.sites} site(s); per site {found.workers} workers:"]
    for each in (_of_site(every, clients, found.sites) for every in traffic):
        workers = following(each.followers, found.workers)
        relay_us = each.followers * costs.delivery_us + workers * costs.read_us
        redis_us = costs.redis_append_us + workers * costs.redis_read_us
        lines.append(
            f"  {each.name}: {each.events_per_s:,.4g} events/s x {each.followers:,.0f} followers ="
            f" {each.events_per_s * each.followers:,.0f} deliveries/s; each event is read by"
            f" {workers:.1f} workers: relay {relay_us:,.0f} us, Redis {redis_us:,.0f} us"
        )
    return lines


def document_rows() -> list[dict[str, Any]]:
    """Return the rows of the table in docs/scaling.md."""
    sizes = (10_000, 100_000, 1_000_000, 10_000_000)
    return [plan(clients, typical(clients)).row() for clients in sizes]
