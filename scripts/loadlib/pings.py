"""Compares Seafile clients, which ping each second, with idle clients of the native protocol."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.loadlib.processes import LoadError
from scripts.loadlib.report import say, table
from scripts.loadlib.servers import Cores, RelayOptions, Running, server
from scripts.loadlib.websocket import WebSocket

_KEY = "a key of this measurement only, long enough"
_LIBRARY = "00000000-0000-4000-8000-000000000000"
# Each second is divided into this number of turns. In each turn an equal part of the clients pings.
_TURNS = 50
# Number of clients that connect at the same time.
_CONNECTING = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Pings:
    """Measures the same number of clients of each kind, all subscribed to one workspace."""

    clients: int
    seconds: float
    rounds: int
    cores: Cores
    relay: RelayOptions

    async def run(self, folder: Path) -> list[dict[str, Any]]:
        """Return one row per round and kind of client."""
        settings = [*self.relay.settings, f"protocol:seafile.key={_KEY}"]
        options = RelayOptions(command=self.relay.command, settings=settings)
        rows = []
        for number in range(self.rounds):
            for kind in ("native, idle", "seafile, pings"):
                place = folder / f"{number}-{kind.partition(',')[0]}"
                place.mkdir()
                async with server("relay", place, self.cores, options) as running:
                    row = await self._measure(running, pinging=kind.startswith("seafile"))
                rows.append({"clients are": kind, "round": number + 1, **row})
        say()
        table(rows)
        return rows

    async def _measure(self, running: Running, *, pinging: bool) -> dict[str, Any]:
        path = "/notification" if pinging else f"{running.subscribe_path}idle"
        # Connect a few clients first, so that memory that relay allocates once, for its first
        # clients, is not counted.
        warm = await self._connect(running, path, 64, pinging=pinging)
        await asyncio.sleep(1)
        _close(warm)
        empty_kb = await running.process.settled_rss_kb()
        clients = await self._connect(running, path, self.clients, pinging=pinging)
        full_kb = await running.process.settled_rss_kb(30)
        before = running.process.cpu_s()
        begun = time.monotonic()
        sent = await self._pass(clients, pinging=pinging)
        used = running.process.cpu_s() - before
        took = time.monotonic() - begun
        if any(client.closed.is_set() for client in clients):
            raise LoadError("relay closed connections during the measurement")
        pongs = sum(client.pongs for client in clients)
        _close(clients)
        return {
            "clients": len(clients),
            "CPU %": 100 * used / took,
            "us per ping": 1e6 * used / sent if sent else 0.0,
            "pings": sent,
            "without a pong": sent - pongs,
            "KB/client": (full_kb - empty_kb) / len(clients),
        }

    async def _connect(
        self, running: Running, path: str, count: int, *, pinging: bool
    ) -> list[WebSocket]:
        clients: list[WebSocket] = []
        text = json.dumps(
            {
                "type": "subscribe",
                "content": {"repos": [{"id": _LIBRARY, "jwt_token": _token()}]},
            }
        ).encode()
        while len(clients) < count:
            async with asyncio.TaskGroup() as tasks:
                some = [
                    tasks.create_task(WebSocket.connect(running.port, path, lambda _: None))
                    for _ in range(min(_CONNECTING, count - len(clients)))
                ]
            for task in some:
                client = task.result()
                if pinging:
                    client.send_text(text)
                clients.append(client)
        # Seafile's protocol has no reply to a subscription.
        await asyncio.sleep(1)
        return clients

    async def _pass(self, clients: list[WebSocket], *, pinging: bool) -> int:
        """Wait for the measured time, sending pings if `pinging`. Return the number of pings."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.seconds
        sent = turn = 0
        due = loop.time()
        while loop.time() < end:
            if pinging:
                for client in clients[turn % _TURNS :: _TURNS]:
                    client.ping()
                    sent += 1
            turn += 1
            due += 1 / _TURNS
            await asyncio.sleep(max(0.0, due - loop.time()))
        await asyncio.sleep(1)
        return sent


def _close(clients: list[WebSocket]) -> None:
    for client in clients:
        client.close()


def _token() -> str:
    parts = [{"alg": "HS256"}, {"repo_id": _LIBRARY, "username": "u", "exp": 2**33}]
    signed = b".".join(_base64(json.dumps(part).encode()) for part in parts)
    return (signed + b"." + _base64(hmac.digest(_KEY.encode(), signed, "sha256"))).decode()


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
