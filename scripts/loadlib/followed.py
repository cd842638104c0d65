"""Measures the CPU time for many idle workspaces, and the latency of an event in one of them."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.loadlib.feed import paced, payload
from scripts.loadlib.processes import LoadError
from scripts.loadlib.report import percentile, say, table
from scripts.loadlib.servers import Cores, RelayOptions, Running, server
from scripts.loadlib.websocket import WebSocket

# Maximum number of commands on one connection that wait for a reply.
_WINDOW = 100


class _Follower:
    """A connection that is subscribed to some of the workspaces."""

    def __init__(self, latencies_ms: list[float]) -> None:
        self._latencies_ms = latencies_ms
        self._window = asyncio.Semaphore(_WINDOW)
        self._replies = 0
        self._socket: WebSocket | None = None
        self.error = ""

    async def follow(self, port: int, channels: list[bytes]) -> None:
        socket = self._socket = await WebSocket.connect(port, "/ws", self._on_text)
        async with asyncio.timeout(300):
            for channel in channels:
                await self._window.acquire()
                socket.send_text(b'{"cmd":"subscribe","channel":"%b"}' % channel)
            for _ in range(_WINDOW):
                await self._window.acquire()
        if self.error or self._replies != len(channels):
            raise LoadError(f"{self._replies} of {len(channels)} subscribed; {self.error}")

    def check(self) -> None:
        if self.error or self._socket is None or self._socket.closed.is_set():
            raise LoadError(f"relay closed a connection or rejected a command: {self.error}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _on_text(self, text: bytes) -> None:
        mark = text.find(b"T=")
        if mark >= 0:
            self._latencies_ms.append((time.time_ns() - int(text[mark + 2 : mark + 21])) / 1e6)
        elif text.startswith(b'{"reply"'):
            self._replies += 1
            self._window.release()
        else:
            self.error = self.error or text[:300].decode(errors="replace")
            self._window.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """Makes one run per number of workspaces, each with a new relay process."""

    workspaces: list[int]
    rate: int
    seconds: float
    idle_seconds: float
    per_connection: int
    bench: Path
    cores: Cores
    relay: RelayOptions

    async def run(self, folder: Path) -> list[dict[str, Any]]:
        """Return one row per number of workspaces."""
        limits = [
            f"protocol:native.channels_per_connection={self.per_connection}",
            "protocol:native.commands_per_s=100000",
        ]
        # Later settings override earlier ones, so those from the command line come last.
        options = RelayOptions(command=self.relay.command, settings=[*limits, *self.relay.settings])
        rows = []
        for count in self.workspaces:
            place = folder / str(count)
            place.mkdir()
            async with server("relay", place, self.cores, options) as running:
                rows.append(await self._measure(running, count))
        say()
        table(rows)
        return rows

    async def _measure(self, running: Running, count: int) -> dict[str, Any]:
        names = [b"ws%06d" % number for number in range(count)]
        latencies_ms: list[float] = []
        followers: list[_Follower] = []
        started = time.monotonic()
        for start in range(0, count, self.per_connection):
            followers.append(_Follower(latencies_ms))
            await followers[-1].follow(running.port, names[start : start + self.per_connection])
        subscribed_s = time.monotonic() - started
        say(f"{len(followers)} clients subscribed to {count} workspaces in {subscribed_s:.1f} s")
        await asyncio.sleep(5)
        idle = await self._cpu(running, asyncio.sleep(self.idle_seconds))
        latencies_ms.clear()
        total = int(self.rate * self.seconds)
        # Use the same random seed in every run, so that runs can be compared.
        chosen = random.Random(1).choices(names, k=total)  # noqa: S311

        async def send(number: int) -> None:
            await running.feed.publish(chosen[number], payload())

        async def load() -> None:
            await paced(self.rate, total, send)
            await running.feed.settle()

        busy = await self._cpu(running, load())
        for _ in range(100):
            if len(latencies_ms) >= total:
                break
            await asyncio.sleep(0.1)
        for follower in followers:
            follower.check()
            follower.close()
        found = sorted(latencies_ms)
        return {
            "workspaces": count,
            "idle relay CPU %": idle[0],
            "idle Redis CPU %": idle[1],
            "events/s": self.rate,
            "p50 ms": percentile(found, 0.5),
            "p99 ms": percentile(found, 0.99),
            "max ms": found[-1] if found else None,
            "relay CPU %": busy[0],
            "Redis CPU %": busy[1],
            "lost": total - len(found),
            "subscribed in s": subscribed_s,
            "relay MB": running.process.rss_kb() / 1024,
        }

    async def _cpu(self, running: Running, during: Any) -> tuple[float, float]:
        """Return the CPU usage of relay and of Redis while `during` runs, in percent of a core."""
        redis = running.redis
        before = running.process.cpu_s(), redis.cpu_s() if redis else 0.0
        started = time.monotonic()
        await during
        elapsed_s = time.monotonic() - started
        after = running.process.cpu_s(), redis.cpu_s() if redis else 0.0
        return (
            (after[0] - before[0]) / elapsed_s * 100,
            (after[1] - before[1]) / elapsed_s * 100,
        )
