"""Memory per idle subscribed websocket client."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.loadlib.processes import LoadError, build
from scripts.loadlib.report import say, table
from scripts.loadlib.servers import Cores, RelayOptions, Running, server
from scripts.loadlib.sink import Sink


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """Clients of one channel, or each of a channel of its own."""

    clients: int
    servers: list[str]
    own_channels: bool
    bench: Path
    cores: Cores
    relay: RelayOptions

    async def run(self, folder: Path) -> list[dict[str, Any]]:
        """One row per server."""
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
        # What the first client makes a server load and allocate is not the clients' memory.
        async with self._sink(running, wsink, "warm", 64):
            pass
        empty_kb = await running.process.settled_rss_kb()
        async with self._sink(running, wsink, channel, self.clients):
            full_kb = await running.process.settled_rss_kb(30)
        if not running.process.alive:
            raise LoadError(f"{running.name} died")
        left_kb = await running.process.settled_rss_kb(30)
        return {
            "clients": self.clients,
            "channels": self.clients if self.own_channels else 1,
            "before MB": empty_kb / 1024,
            "with clients MB": full_kb / 1024,
            "after they left MB": left_kb / 1024,
            "KB/client": (full_kb - empty_kb) / self.clients,
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
        )
