"""Measures the effects of a client that stops reading.

- the memory of relay
- the latency of all other clients
- the events that the slow client receives when it reads again
"""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scripts.loadlib.feed import paced
from scripts.loadlib.processes import build
from scripts.loadlib.report import say, table
from scripts.loadlib.servers import Cores, RelayOptions, Running, server
from scripts.loadlib.sink import Sink
from scripts.loadlib.websocket import WebSocket

# Events per second on the channel that the slow client is not subscribed to.
_OTHER_RATE = 50
_SETTLE_S = 120
_NUMBER = re.compile(rb'"s":(\d+)')
_ID = re.compile(rb'"id":"([^"]+)"')


class _Slow:
    """A client that subscribes, stops reading, reads again, and checks the numbers of the events.

    If numbers are missing between two events, there must be a notice between them.
    """

    def __init__(self, port: int, channel: str) -> None:
        self._port = port
        self._path = f"/ws?channel={channel}"
        self._told = False
        self._position = ""
        self._socket: WebSocket | None = None
        self._subscribed = asyncio.Event()
        self.last = -1
        self.received = 0
        self.missing_told = 0
        self.missing_silently = 0
        self.repeated = 0
        self.notices: list[str] = []
        self.errors: list[str] = []
        self.reconnects = 0

    async def connect(self) -> None:
        path = self._path
        if self._position:
            path += f"&last_event_id={quote(self._position)}"
        self._subscribed.clear()
        # Use a small buffer, so that unread data have to wait in relay and not in the kernel.
        self._socket = await WebSocket.connect(
            self._port, path, self._on_text, receive_buffer=65536
        )
        async with asyncio.timeout(30):
            await self._subscribed.wait()

    def pause(self) -> None:
        if self._socket is not None:
            self._socket.pause()

    async def read_until(self, last: int) -> None:
        """Read until event `last` has arrived. Reconnect up to five times if disconnected."""
        if self._socket is not None:
            self._socket.resume()
        limit = time.monotonic() + _SETTLE_S
        while self.last < last and time.monotonic() < limit:
            if self._socket is not None and self._socket.closed.is_set():
                self.errors.append(f"connection closed with code {self._socket.close_code}")
                if self.reconnects == 5:
                    return
                self.reconnects += 1
                await self.connect()
            await asyncio.sleep(0.05)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _on_text(self, text: bytes) -> None:
        if text.startswith(b'{"notice"'):
            self._told = True
            self.notices.append(text[:300].decode(errors="replace"))
        elif text.startswith(b'{"reply"'):
            if not self._position and (found := _ID.search(text)):
                self._position = found[1].decode()
            self._subscribed.set()
        elif (number := _NUMBER.search(text[:300])) is None:
            self.errors.append(text[:300].decode(errors="replace"))
        else:
            self._event(int(number[1]))
            if found := _ID.search(text[:300]):
                self._position = found[1].decode()

    def _event(self, number: int) -> None:
        if number <= self.last:
            self.repeated += 1
            return
        missing = number - self.last - 1
        if self._told:
            self.missing_told += missing
        else:
            self.missing_silently += missing
        self._told = False
        self.last = number
        self.received += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """Alternates rounds with and without the slow client, each with a new relay process."""

    megabytes: int
    seconds: float
    entry_bytes: int
    others: int
    rounds: int
    bench: Path
    cores: Cores
    relay: RelayOptions

    async def run(self, folder: Path) -> list[dict[str, Any]]:
        """Return one row per round. Print all rows, and the ratios of latency in a second table."""
        wsink = build(self.bench / "wsink.c", folder)
        rows = []
        for number in range(1, self.rounds + 1):
            for with_slow in (False, True):
                place = folder / f"{number}-{with_slow}"
                place.mkdir()
                async with server("relay", place, self.cores, self.relay) as running:
                    row = await self._round(running, wsink, with_slow)
                rows.append({"round": number, "slow client": "yes" if with_slow else "no", **row})
                say(", ".join(f"{key}: {value}" for key, value in rows[-1].items()))
        say()
        table([{k: v for k, v in row.items() if k != "details"} for row in rows])
        say()
        table([self._ratio(rows, key) for key in ("same p99 ms", "other p99 ms")])
        return rows

    def _ratio(self, rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
        without, having = (
            statistics.median(row[key] for row in rows if row["slow client"] == answer)
            for answer in ("no", "yes")
        )
        return {
            "median of": key,
            "without": without,
            "with": having,
            "ratio": having / without if without else None,
        }

    async def _round(self, running: Running, wsink: Path, with_slow: bool) -> dict[str, Any]:
        total = self.megabytes * 1_000_000 // self.entry_bytes
        padding = b"0" * (self.entry_bytes - 60)

        async def big(number: int) -> None:
            data = b'{"s":%d,"m":"T=%019d","p":"%b"}' % (number, time.time_ns(), padding)
            await running.feed.publish(b"big", data)

        async def small(_: int) -> None:
            await running.feed.publish(b"other", b'{"m":"T=%019d"}' % time.time_ns())

        slow = _Slow(running.port, "big") if with_slow else None
        async with AsyncExitStack() as stack:
            same = await stack.enter_async_context(self._sink(running, wsink, "big"))
            other = await stack.enter_async_context(self._sink(running, wsink, "other"))
            if slow is not None:
                await slow.connect()
                slow.pause()
            before_kb = most_kb = await running.process.settled_rss_kb()
            done = asyncio.Event()

            async def watch() -> None:
                nonlocal most_kb
                while not done.is_set():
                    most_kb = max(most_kb, running.process.rss_kb())
                    await asyncio.sleep(0.25)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(watch(), name="memory")
                feeding = [
                    tasks.create_task(paced(total / self.seconds, total, big), name="big"),
                    tasks.create_task(
                        paced(_OTHER_RATE, int(_OTHER_RATE * self.seconds), small), name="other"
                    ),
                ]
                for task in feeding:
                    await task
                await running.feed.settle()
                stalled_kb = most_kb
                seen = await same.result(), await other.result()
                if slow is not None:
                    await slow.read_until(total - 1)
                    slow.close()
                done.set()
        row = {
            "same p50 ms": seen[0]["lat_ms"]["p50"],
            "same p99 ms": seen[0]["lat_ms"]["p99"],
            "other p50 ms": seen[1]["lat_ms"]["p50"],
            "other p99 ms": seen[1]["lat_ms"]["p99"],
            "lost": total * self.others - seen[0]["marks"]
            + int(_OTHER_RATE * self.seconds) * self.others - seen[1]["marks"],
            "relay rise MB": (stalled_kb - before_kb) / 1024,
            "rise at catch-up MB": (most_kb - before_kb) / 1024,
        }  # fmt: skip
        if slow is not None:
            row |= {
                "slow got": slow.received,
                "of": total,
                "told missing": slow.missing_told + max(0, total - 1 - slow.last) * slow._told,
                "silently missing": slow.missing_silently
                + max(0, total - 1 - slow.last) * (not slow._told),
                "repeated": slow.repeated,
                "reconnects": slow.reconnects,
                "details": {"notices": slow.notices[:20], "errors": slow.errors[:20]},
            }
        return row

    def _sink(self, running: Running, wsink: Path, channel: str) -> Sink:
        return Sink(
            wsink,
            core=self.cores.clients,
            port=running.port,
            path=running.subscribe_path + channel,
            clients=self.others,
            subscribed=running.subscribed,
            limit_s=self.seconds * 3 + 60,
            quiet_s=5,
        )
