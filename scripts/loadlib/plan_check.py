"""Measures small cases, and compares them with what `plan` computes for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.loadlib.feed import paced, payload
from scripts.loadlib.plan import (
    Costs,
    Limits,
    Traffic,
    arithmetic,
    plan,
    redis_us_per_s,
    relay_us_per_s,
    typical,
)
from scripts.loadlib.processes import LoadError
from scripts.loadlib.report import say, table
from scripts.loadlib.servers import Cores, RelayOptions, Running, server
from scripts.loadlib.websocket import WebSocket

# One channel with many followers, and many channels with one follower each.
_CASES = (
    Traffic(name="one channel, 200 clients", events_per_s=250, followers=200),
    Traffic(name="200 channels, one client each", events_per_s=2000, followers=1),
)
# A server that is nearly idle wakes up for each event, which takes three to five times as long as
# the costs of the plan, which is for busy servers. So Redis is compared from this rate on.
_BUSY_REDIS_PER_S = 1000
_CLIENTS = 200
_CONNECTING = 100
_NEWCOMERS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCheck:
    """Prints the plan for each number of clients, then checks the costs that it uses."""

    clients: list[int]
    traffic: list[Traffic]
    payload_bytes: int
    limits: Limits
    check: bool
    factor: float
    seconds: float
    cores: Cores
    relay: RelayOptions

    async def run(self, folder: Path) -> list[dict[str, Any]]:
        """Return the compared values. Raise LoadError if one of them is off."""
        costs = Costs()
        rows = []
        for clients in self.clients:
            traffic = self.traffic or typical(clients)
            found = plan(
                clients, traffic, payload_bytes=self.payload_bytes, costs=costs, limits=self.limits
            )
            for line in arithmetic(clients, traffic, found, costs):
                say(line)
            rows.append(found.row())
        say()
        table(rows)
        if not self.check:
            return rows
        compared = [row for case in _CASES for row in await self._busy(folder, case, costs)]
        compared += await self._newcomers(folder, costs)
        for row in compared:
            row["measured / computed"] = row["measured"] / row["computed"]
        say()
        table(compared)
        wrong = [
            row["case"]
            for row in compared
            if not 1 / self.factor <= row["measured / computed"] <= self.factor
        ]
        if wrong:
            raise LoadError(
                f"measured values differ from the computed ones by more than a factor of"
                f" {self.factor:g}: {'; '.join(wrong)}"
            )
        return compared

    async def _busy(self, folder: Path, case: Traffic, costs: Costs) -> list[dict[str, Any]]:
        """Measure the processor time of relay and Redis with this traffic."""
        place = folder / case.name
        place.mkdir()
        channels = [f"c{number}" for number in range(int(_CLIENTS / case.followers))]
        received = [0]

        def on_text(text: bytes) -> None:
            received[0] += text.count(b'"m":"T=')

        total = int(case.events_per_s * self.seconds)
        async with server("relay", place, self.cores, self.relay) as running:
            clients = await _connect(running, channels, _CLIENTS, on_text)

            async def send(number: int) -> None:
                channel = channels[number % len(channels)]
                await running.feed.publish(channel.encode(), payload())

            async def load() -> None:
                await paced(case.events_per_s, total, send)
                await running.feed.settle()

            relay_s, redis_s, took_s = await _used(running, load)
            expected = int(total * case.followers)
            for _ in range(300):
                if received[0] >= expected:
                    break
                await asyncio.sleep(0.1)
            if received[0] != expected:
                raise LoadError(f"{case.name}: {received[0]} of {expected} deliveries")
            for client in clients:
                client.close()
        computed = relay_us_per_s([case], 1, costs), redis_us_per_s([case], 1, costs)
        per_event = [1e6 * used / took_s / case.events_per_s for used in (relay_s, redis_s)]
        names = ["relay", "Redis"] if case.events_per_s >= _BUSY_REDIS_PER_S else ["relay"]
        return [
            {
                "case": f"{case.name}: {name}, us per event",
                "computed": (value + 1e6 * costs.base_share) / case.events_per_s,
                "measured": found,
            }
            for name, value, found in zip(names, computed, per_event, strict=False)
        ]

    async def _newcomers(self, folder: Path, costs: Costs) -> list[dict[str, Any]]:
        """Measure connecting clients: processor time and memory."""
        place = folder / "newcomers"
        place.mkdir()
        async with server("relay", place, self.cores, self.relay) as running:
            channels = [f"new{number}" for number in range(_NEWCOMERS)]
            warm = await _connect(running, channels[:_CONNECTING], _CONNECTING, _ignore)
            empty_kb = running.process.rss_kb()
            clients: list[WebSocket] = []

            async def connect() -> None:
                clients.extend(await _connect(running, channels, _NEWCOMERS, _ignore))

            relay_s, redis_s, _ = await _used(running, connect)
            full_kb = await running.process.settled_rss_kb()
            for client in (*warm, *clients):
                client.close()
        return [
            {
                "case": "a client that connects: relay, us",
                "computed": costs.handshake_us,
                "measured": 1e6 * relay_s / _NEWCOMERS,
            },
            {
                "case": "a client that connects: Redis, us",
                "computed": costs.redis_handshake_us,
                "measured": 1e6 * redis_s / _NEWCOMERS,
            },
            {
                "case": "an idle client: relay, KB",
                "computed": costs.client_kb,
                "measured": (full_kb - empty_kb) / _NEWCOMERS,
            },
        ]


async def _used(
    running: Running, work: Callable[[], Awaitable[None]]
) -> tuple[float, float, float]:
    """Return the processor time of relay and of Redis during `work`, and its duration."""
    redis = running.redis
    if redis is None:
        raise LoadError("the server has no Redis of its own")
    before = running.process.cpu_s(), redis.cpu_s(), time.monotonic()
    await work()
    # The last deliveries.
    await asyncio.sleep(0.5)
    took_s = time.monotonic() - before[2] - 0.5
    return running.process.cpu_s() - before[0], redis.cpu_s() - before[1], took_s


async def _connect(
    running: Running, channels: list[str], count: int, on_text: Callable[[bytes], None]
) -> list[WebSocket]:
    """Connect clients, each to the next channel, and wait until all are subscribed."""
    clients: list[WebSocket] = []
    subscribed = asyncio.Semaphore(0)

    def on_first(text: bytes) -> None:
        if b'"reply":"subscribe"' in text:
            subscribed.release()
        on_text(text)

    for start in range(0, count, _CONNECTING):
        async with asyncio.TaskGroup() as tasks:
            some = [
                tasks.create_task(
                    WebSocket.connect(
                        running.port, f"/ws?channel={channels[number % len(channels)]}", on_first
                    )
                )
                for number in range(start, min(start + _CONNECTING, count))
            ]
        clients += [task.result() for task in some]
    async with asyncio.timeout(60):
        for _ in range(count):
            await subscribed.acquire()
    return clients


def _ignore(_: bytes) -> None:
    """Ignore the message."""
