"""Measures the memory per idle subscribed WebSocket client."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.loadlib.feed import payload
from scripts.loadlib.processes import LoadError, build
from scripts.loadlib.report import say, table
from scripts.loadlib.servers import Cores, RelayOptions, Running, server
from scripts.loadlib.sink import Sink


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """Subscribes all clients to one channel, or two clients to each of many channels."""

    clients: int
    servers: list[str]
    own_channels: bool
    bench: Path
    cores: Cores
    relay: RelayOptions

    async def run(self, folder: Path) -> list[dict[str, Any]]:
        """Return one row per server."""
        wsink = build(self.bench / "wsink.c", folder)
        rows = []
        for name in self.servers:
            async with server(name, folder, self.cores, self.relay) as running:
                rows.append({"server": name, **await self._measure(running, wsink)})
        say()
        table(rows)
        return rows

    async def _measure(self, running: Running, wsink: Path) -> dict[str, Any]:
        channel = "idle%d" if self.own_channels else "idle"
        # Connect a few clients first, so that memory that a server allocates once, for its first
        # client, is not counted.
        async with self._sink(running, wsink, "warm", 64):
            pass
        empty_kb = await running.process.settled_rss_kb()
        half = self.clients // 2
        async with self._sink(running, wsink, channel, half) as first:
            half_kb = await running.process.settled_rss_kb(30)
            async with self._sink(running, wsink, channel, half) as second:
                full_kb = await running.process.settled_rss_kb(30)
                # Check that all counted clients are still connected and subscribed.
                for number in range(half if self.own_channels else 1):
                    name = channel.replace("%d", str(number)).encode()
                    await running.feed.publish(name, payload())
                await running.feed.settle()
                seen = [(await sink.result())["marks"] for sink in (first, second)]
        if seen != [half, half]:
            raise LoadError(
                f"{running.name}: {seen} clients of the two halves received the event, "
                f"expected {half} of each"
            )
        left_kb = await running.process.settled_rss_kb(30)
        return {
            "clients": half * 2,
            "channels": half if self.own_channels else 1,
            "before MB": empty_kb / 1024,
            "with clients MB": full_kb / 1024,
            "after they left MB": left_kb / 1024,
            "KB/client": (full_kb - empty_kb) / (half * 2),
            # Not affected by memory that the server freed before the measurement and uses again for
            # the first half of the clients.
            "KB/client of the second half": (full_kb - half_kb) / half,
        }

    def _sink(self, running: Running, wsink: Path, channel: str, clients: int) -> Sink:
        return Sink(
            wsink,
            core=self.cores.clients,
            port=running.port,
            path=running.subscribe_path + channel,
            clients=clients,
            subscribed=running.subscribed,
            limit_s=600,
            expect=clients,
        )
