"""Measures a resume storm: all clients of a relay return at once and have missed events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from redis.asyncio import Redis
from typing_extensions import override

from scripts.loadlib.feed import paced, payload
from scripts.loadlib.processes import LoadError
from scripts.loadlib.report import percentile, say, table
from scripts.loadlib.servers import Cores, RelayOptions, Running, server
from scripts.loadlib.websocket import WebSocket

_LIMIT_S = 90.0
# Clients that stay connected, and the events per second that they receive meanwhile.
_STAYING, _RATE = 50, 50
_SAMPLE_S = 0.05
_PARALLEL_CONNECTS = 1000
_READS = ("xinfo|stream", "xinfo|groups", "xrange", "xreadgroup")


@dataclass(slots=True)
class _Storm:
    """The state of all returning clients."""

    clients: int
    missed: int
    port: int
    tasks: asyncio.TaskGroup
    back_s: list[float] = field(default_factory=list)
    turned_away: int = 0
    lost: int = 0
    problem: str = ""
    started: float = 0.0
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def on_back(self) -> None:
        self.back_s.append(time.monotonic() - self.started)
        if len(self.back_s) == self.clients:
            self.done.set()

    def fail(self, problem: str) -> None:
        self.problem = self.problem or problem
        self.done.set()


class _Returning(asyncio.Protocol):
    """A WebSocket client that resumes, and connects again if the server asks it to wait.

    It reads frames without parsing them, so that 10,000 clients need less CPU time than the server.
    """

    def __init__(self, storm: _Storm, path: str) -> None:
        self._storm = storm
        self._path = path
        self._head = b""
        self._is_open = False
        self._left = storm.missed
        self._transport: asyncio.Transport | None = None

    async def connect(self) -> None:
        for _ in range(100):
            try:
                await asyncio.get_running_loop().create_connection(
                    lambda: self, "127.0.0.1", self._storm.port
                )
            except OSError:
                await asyncio.sleep(0.1)
            else:
                return
        self._storm.fail("a client could not connect")

    def close(self) -> None:
        self._left = 0
        if self._transport is not None:
            self._transport.abort()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._head, self._is_open = b"", False
        self._transport.write(
            b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            b"Sec-WebSocket-Version: 13\r\n\r\n" % self._path.encode()
        )

    @override
    def data_received(self, data: bytes) -> None:
        if not self._is_open:
            self._head += data
            if b"\r\n\r\n" not in self._head:
                return
            head, _, data = self._head.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 101"):
                self._turned_away(head.lower())
                return
            self._is_open = True
        if self._left > 0:
            self._left -= data.count(b'"m":"T=')
            if b'"notice"' in data:
                self._storm.fail(f"a notice: {data[:300]!r}")
            if self._left <= 0:
                self._storm.on_back()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._is_open and self._left > 0:
            self._storm.lost += 1

    def _turned_away(self, head: bytes) -> None:
        status, _, rest = head.partition(b"\r\n")
        if b" 503 " not in status or b"\r\nretry-after:" not in b"\r\n" + rest:
            self._storm.fail(f"the server answered {head[:200]!r}")
            return
        self._storm.turned_away += 1
        wait_s = float((b"\r\n" + rest).partition(b"\r\nretry-after:")[2].split(b"\r\n")[0])
        if self._transport is not None:
            self._transport.close()
        self._storm.tasks.create_task(self._connect_after(wait_s))

    async def _connect_after(self, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        await self.connect()


@dataclass(frozen=True, slots=True, kw_only=True)
class Storm:
    """Lets the same number of clients return in each round, each time to a new relay."""

    clients: int
    channels: int
    missed: int
    rounds: int
    cores: Cores
    relay: RelayOptions

    async def run(self, folder: Path) -> list[dict[str, Any]]:
        """Return one row per round."""
        rows = []
        for number in range(self.rounds):
            place = folder / str(number)
            place.mkdir()
            async with server("relay", place, self.cores, self.relay) as running:
                rows.append({"round": number + 1, **await self._measure(running)})
        say()
        table(rows)
        return rows

    async def _measure(self, running: Running) -> dict[str, Any]:
        names = [f"storm{number}" for number in range(self.channels)]
        async with (
            Redis(port=running.redis_port) as redis,
            asyncio.TaskGroup() as tasks,
            self._staying(running, tasks) as latencies_ms,
        ):
            storm = _Storm(self.clients, self.missed, running.port, tasks)
            starts = await self._append(running, redis, names)
            paths = [f"/ws?channel={name}&last_event_id={start}" for name, start in starts]
            clients = [
                _Returning(storm, paths[number % self.channels]) for number in range(self.clients)
            ]
            quiet_ms = await self._quiet(latencies_ms)
            before = await _counts(redis)
            cpu_s, redis_s = running.process.cpu_s(), _redis_cpu_s(running)
            peak_kb = empty_kb = running.process.rss_kb()
            storm.started = time.monotonic()
            connecting = tasks.create_task(_connect(clients))
            while not storm.done.is_set() and time.monotonic() - storm.started < _LIMIT_S:
                peak_kb = max(peak_kb, running.process.rss_kb())
                await asyncio.sleep(_SAMPLE_S)
            await connecting
            cpu_s = running.process.cpu_s() - cpu_s
            redis_s = _redis_cpu_s(running) - redis_s
            after = await _counts(redis)
            storm_ms = sorted(latencies_ms)
            for client in clients:
                client.close()
        if storm.problem or len(storm.back_s) != self.clients:
            raise LoadError(
                f"{len(storm.back_s)} of {self.clients} clients are back; {storm.problem}"
            )
        back_s = sorted(storm.back_s)
        row = {
            "clients": self.clients,
            "streams": self.channels,
            "half back s": percentile(back_s, 0.5),
            "all back s": back_s[-1],
            "asked to wait": storm.turned_away,
            "lost": storm.lost,
            "live quiet p99 ms": percentile(quiet_ms, 0.99),
            "live p50 ms": percentile(storm_ms, 0.5),
            "live p99 ms": percentile(storm_ms, 0.99),
            "live max ms": storm_ms[-1] if storm_ms else None,
            "relay µs/client": cpu_s / self.clients * 1e6,
            "Redis µs/client": redis_s / self.clients * 1e6,
            "MB before": empty_kb / 1024,
            "MB peak": peak_kb / 1024,
        }
        for name in _READS:
            row[f"{name.upper()} per stream"] = (after[name] - before[name]) / self.channels
        return row

    async def _append(
        self, running: Running, redis: Redis, names: list[str]
    ) -> list[tuple[str, str]]:
        """Append the events that are missed. Return each channel with the position before them."""
        starts = []
        for name in names:
            start = await redis.xadd(f"relay:stream:{{{name}}}", {"data": "1"})
            starts.append((name, start.decode()))
            for _ in range(self.missed):
                await running.feed.publish(name.encode(), payload())
        await running.feed.settle()
        return starts

    @asynccontextmanager
    async def _staying(
        self, running: Running, tasks: asyncio.TaskGroup
    ) -> AsyncIterator[list[float]]:
        """Clients that stay connected. Yield the list of the latencies of their events."""
        latencies_ms: list[float] = []

        def on_text(text: bytes) -> None:
            mark = text.find(b"T=")
            if mark >= 0:
                latencies_ms.append((time.time_ns() - int(text[mark + 2 : mark + 21])) / 1e6)

        sockets = [
            await WebSocket.connect(running.port, "/ws?channel=staying", on_text)
            for _ in range(_STAYING)
        ]
        publishing = tasks.create_task(self._publish(running))
        try:
            yield latencies_ms
            if any(each.closed.is_set() for each in sockets):
                raise LoadError("relay closed connections that should have stayed")
        finally:
            publishing.cancel()
            for each in sockets:
                each.close()

    @staticmethod
    async def _publish(running: Running) -> None:
        await paced(_RATE, 2**31, lambda _: running.feed.publish(b"staying", payload()))

    @staticmethod
    async def _quiet(latencies_ms: list[float]) -> list[float]:
        await asyncio.sleep(1)
        latencies_ms.clear()
        await asyncio.sleep(2)
        found = sorted(latencies_ms)
        latencies_ms.clear()
        return found


async def _connect(clients: list[_Returning]) -> None:
    most = asyncio.Semaphore(_PARALLEL_CONNECTS)

    async def connect(client: _Returning) -> None:
        async with most:
            await client.connect()

    async with asyncio.TaskGroup() as tasks:
        for client in clients:
            tasks.create_task(connect(client))


def _redis_cpu_s(running: Running) -> float:
    return running.redis.cpu_s() if running.redis else 0.0


async def _counts(redis: Redis) -> dict[str, int]:
    found = await redis.info("commandstats")
    return {name: found.get(f"cmdstat_{name}", {}).get("calls", 0) for name in _READS}
