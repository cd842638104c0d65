"""Clients that connect, disconnect and resume at random, with everything they received.

They parse as little as possible, so that relay and not the clients uses the CPU. The data of every
event is `{"n":N}`, counting up from 0 on each channel. A list of numbers per channel therefore
shows every loss, duplicate and reordering.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import threading
from collections.abc import Sequence
from urllib.parse import quote

import redis
from redis.exceptions import RedisError

from tests.support.valkey import Server


class ChaosClient:
    """One client over many connections. `received` and `notices` are kept across connections."""

    def __init__(self, port: int, channels: Sequence[str], *, websocket: bool) -> None:
        self.port = port
        self.channels = list(channels)
        self.websocket = websocket
        self.received: dict[str, list[int]] = {channel: [] for channel in channels}
        self.notices: list[str] = []
        self.connections = 0
        self.subscribed = asyncio.Event()
        self.progress = asyncio.Event()
        self._last: dict[str, str] = {}
        self._cursor = ""

    def done(self, totals: dict[str, int]) -> bool:
        """Return True if all appended events, or more, have arrived."""
        return all(len(self.received[name]) >= totals[name] for name in self.channels)

    async def run(self, rng: random.Random, drop: asyncio.Event) -> None:
        """Connect repeatedly. Cut each connection after a random time until `drop` is set."""
        while True:
            life_s = rng.expovariate(1.0) if not drop.is_set() else 3600.0
            with contextlib.suppress(
                OSError, asyncio.IncompleteReadError, TimeoutError, asyncio.LimitOverrunError
            ):
                async with asyncio.timeout(life_s):
                    await self._connect()
            await asyncio.sleep(rng.uniform(0, 0.05))

    async def _connect(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)
        try:
            self.connections += 1
            if self.websocket:
                await self._talk_websocket(reader, writer)
            else:
                await self._talk_sse(reader, writer)
        finally:
            writer.transport.abort()

    # ---- server-sent events -----------------------------------------------------------------

    async def _talk_sse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        query = "&".join(f"channel={quote(name)}" for name in self.channels)
        head = f"GET /sse?envelope=1&{query} HTTP/1.1\r\nHost: x\r\n"
        if self._cursor:
            head += f"Last-Event-ID: {self._cursor}\r\n"
        writer.write((head + "\r\n").encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            return
        while True:
            block = await reader.readuntil(b"\n\n")
            name = data = ""
            for line in block.decode().split("\n"):
                if line.startswith("id: "):
                    self._cursor = line[4:]
                elif line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    data = line[6:]
            if name == "relay:open":
                self.subscribed.set()
            elif name.startswith("relay:"):
                self.notices.append(f"{name} {data}")
            elif data:
                self._take(json.loads(data))

    # ---- websocket --------------------------------------------------------------------------

    async def _talk_websocket(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        writer.write(
            "GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 101"):
            return
        for name in self.channels:
            command = {"cmd": "subscribe", "channel": name, "ref": name}
            if name in self._last:
                command["last_event_id"] = self._last[name]
            writer.write(_masked(json.dumps(command).encode()))
        while True:
            first, length = await reader.readexactly(2)
            if length == 126:
                length = int.from_bytes(await reader.readexactly(2), "big")
            elif length == 127:
                length = int.from_bytes(await reader.readexactly(8), "big")
            payload = await reader.readexactly(length)
            if first & 15 == 8:
                return
            if first & 15 == 1:
                self._take_frame(json.loads(payload))

    def _take_frame(self, frame: dict[str, object]) -> None:
        if frame.get("reply") == "subscribe":
            channel = str(frame["channel"])
            self._last.setdefault(channel, str(frame["id"]))
            if len(self._last) == len(self.channels):
                self.subscribed.set()
        elif "error" in frame and "unavailable" in json.dumps(frame):
            # Redis is unreachable for a moment: reconnect, as all clients do.
            raise OSError("unavailable")
        elif "notice" in frame or "error" in frame:
            self.notices.append(json.dumps(frame))
        elif "data" in frame:
            self._take(frame)
            self._last[str(frame["channel"])] = str(frame["id"])

    def _take(self, event: dict[str, object]) -> None:
        data = event["data"]
        assert isinstance(data, dict)
        self.received[str(event["channel"])].append(data["n"])
        self.progress.set()


def _masked(payload: bytes) -> bytes:
    length = len(payload)
    head = bytes((0x81, 0x80 | length)) if length < 126 else b"\x81\xfe" + length.to_bytes(2, "big")
    return head + bytes(4) + payload


def produce(
    server: Server,
    channels: Sequence[str],
    events: int,
    marks: Sequence[threading.Event] = (),
    *,
    batch: int = 100,
) -> None:
    """Append `events` round robin at full speed. After an outage, continue after the last entry.

    Set the events `marks` one after the other, at equal distances.
    """
    client = server.client("producer")
    counts = dict.fromkeys(channels, 0)
    order = [channels[index % len(channels)] for index in range(events)]
    totals = {channel: order.count(channel) for channel in channels}
    admin = server.client("admin")
    while any(counts[channel] < totals[channel] for channel in channels):
        try:
            pipeline = client.pipeline(transaction=False)
            numbers = dict(counts)
            filled = 0
            while filled < batch and any(numbers[name] < totals[name] for name in channels):
                for name in channels:
                    if numbers[name] < totals[name] and filled < batch:
                        key = f"relay:stream:{{{name}}}"
                        pipeline.execute_command(  # type: ignore[no-untyped-call]
                            "XADD", key, "*", "data", _data(numbers[name])
                        )
                        numbers[name] += 1
                        filled += 1
            pipeline.execute()
            counts = numbers
            for index, mark in enumerate(marks):
                if sum(counts.values()) * (len(marks) + 1) >= events * (index + 1):
                    mark.set()
        except (RedisError, OSError):
            counts = _reached(admin, channels)


def _data(number: int) -> str:
    return f'{{"n":{number}}}'


def _reached(client: redis.Redis, channels: Sequence[str]) -> dict[str, int]:
    """Return the number of events in the streams. Appends without a reply may be included."""
    while True:
        try:
            counts = {}
            for name in channels:
                last = client.execute_command(  # type: ignore[no-untyped-call]
                    "XREVRANGE", f"relay:stream:{{{name}}}", "+", "-", "COUNT", 1
                )
                counts[name] = json.loads(last[0][1][b"data"])["n"] + 1 if last else 0
            return counts
        except (RedisError, OSError):
            continue
