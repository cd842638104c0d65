"""Compares CPU time per delivery and latency of servers: one channel, many WebSocket clients."""

from __future__ import annotations

import asyncio
import re
import statistics
from asyncio.subprocess import PIPE
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.loadlib.feed import paced, payload
from scripts.loadlib.processes import LoadError, build, free_port, tool
from scripts.loadlib.report import say, table
from scripts.loadlib.servers import Cores, RelayOptions, Running, server
from scripts.loadlib.sink import Sink


@dataclass(frozen=True, slots=True, kw_only=True)
class Fanout:
    """Makes `rounds` runs per rate and server.

    `rates` are deliveries per second to all clients together.
    """

    rates: list[int]
    clients: int
    servers: list[str]
    rounds: int
    seconds: float
    bench: Path
    cores: Cores
    relay: RelayOptions

    async def run(self, folder: Path) -> list[dict[str, Any]]:
        """Run all rounds and return one row per round.

        The servers alternate, so that a temporary disturbance affects all of them.
        """
        wsink = build(self.bench / "wsink.c", folder)
        sendloop = build(self.bench / "sendloop.c", folder) if "c" in self.servers else None
        rows = []
        for rate in self.rates:
            for number in range(1, self.rounds + 1):
                for name in self.servers:
                    place = folder / f"{name}-{rate}-{number}"
                    place.mkdir()
                    if name == "c" and sendloop is not None:
                        row = await self._c(sendloop, wsink, rate)
                    else:
                        async with server(name, place, self.cores, self.relay) as running:
                            row = await self._round(running, wsink, rate)
                    row = {"server": name, "rate": rate, "round": number, **row}
                    rows.append(row)
                    say(_line(row))
        say()
        table(self._summary(rows))
        return rows

    async def _round(self, running: Running, wsink: Path, rate: int) -> dict[str, Any]:
        empty_kb = await running.process.settled_rss_kb()
        events = max(1, round(rate / self.clients * self.seconds))
        sink = Sink(
            wsink,
            core=self.cores.clients,
            port=running.port,
            path=running.subscribe_path + running.channel.decode(),
            clients=self.clients,
            subscribed=running.subscribed,
            greeting=running.greeting,
            limit_s=self.seconds * 2 + 30,
            quiet_s=3,
        )
        async with sink:
            full_kb = await running.process.settled_rss_kb()
            # Send one event first, so that work that is done only once is not measured. The event
            # is included in the number of received events.
            await running.feed.publish(running.channel, payload())
            await asyncio.sleep(1)
            cpu_s = running.process.cpu_s()
            redis_s = running.redis.cpu_s() if running.redis else 0.0

            async def send(_: int) -> None:
                await running.feed.publish(running.channel, payload())

            late_s = await paced(rate / self.clients, events, send)
            await running.feed.settle()
            # Read the CPU time before wsink stops: closing its connections is not part of delivery.
            await asyncio.sleep(1)
            cpu_s = running.process.cpu_s() - cpu_s
            redis_s = (running.redis.cpu_s() if running.redis else 0.0) - redis_s
            seen = await sink.result()
        deliveries = events * self.clients
        return {
            "cpu_us": cpu_s / deliveries * 1e6,
            "redis_cpu_us": redis_s / deliveries * 1e6 if running.redis else None,
            "p50_ms": seen["lat_ms"]["p50"],
            "p99_ms": seen["lat_ms"]["p99"],
            "max_ms": seen["lat_ms"]["max"],
            "lost": deliveries + self.clients - seen["marks"],
            "closed": seen["closed"],
            "late_s": late_s,
            "kb_per_client": (full_kb - empty_kb) / self.clients,
        }

    async def _c(self, sendloop: Path, wsink: Path, rate: int) -> dict[str, Any]:
        # sendloop always sends 50 events per second. It measures the cost of one send().
        del rate
        port = free_port()
        events = int(self.seconds * 50)
        argv = ["-c", str(self.cores.server), str(sendloop), str(self.clients), str(events)]
        process = await asyncio.create_subprocess_exec(
            tool("taskset", "util-linux"), *argv, str(port), "1", stdout=PIPE
        )
        try:
            # sendloop does not report when it listens. It would count a test connection as its
            # first client, so wait for a fixed time.
            await asyncio.sleep(0.5)
            sink = Sink(
                wsink,
                core=self.cores.clients,
                port=port,
                path="/",
                clients=self.clients,
                subscribed="",
                limit_s=self.seconds * 3 + 30,
                expect=events * self.clients,
            )
            async with sink, asyncio.timeout(self.seconds * 3 + 60):
                out, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        found = re.search(rb"([0-9.]+) us CPU", out)
        if found is None:
            raise LoadError("the output of sendloop has no CPU time")
        return {"cpu_us": float(found[1])}

    def _summary(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        summary = []
        for rate in self.rates:
            medians = {
                name: _medians([r for r in rows if r["server"] == name and r["rate"] == rate])
                for name in self.servers
            }
            nchan = medians.get("nchan")
            for name, found in medians.items():
                ratio = found["CPU us"] / nchan["CPU us"] if nchan and nchan["CPU us"] else None
                summary.append(
                    {"deliveries/s": rate, "server": name, **found, "CPU : Nchan's": ratio}
                )
        return summary


def _medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def median(key: str) -> Any:
        values = [row[key] for row in rows if row.get(key) is not None]
        return statistics.median(values) if values else None

    return {
        "p50 ms": median("p50_ms"),
        "p99 ms": median("p99_ms"),
        "CPU us": median("cpu_us"),
        "Redis us": median("redis_cpu_us"),
        "KB/client": median("kb_per_client"),
        "lost": sum(row.get("lost", 0) for row in rows),
    }


def _line(row: dict[str, Any]) -> str:
    parts = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if value is not None
    ]
    return ", ".join(parts)
