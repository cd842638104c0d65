"""Measures the CPU time for publishing an event, by API queue and by Centrifugo's HTTP API."""

from __future__ import annotations

import asyncio
import hmac
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from scripts.loadlib.processes import LoadError
from scripts.loadlib.report import say, table
from scripts.loadlib.servers import Cores, RelayOptions, Running, relay

_SECRET = "a secret of the load"  # noqa: S105  # for the test server only
_SHARDS = 4
_QUEUE = "centrifugo.api"
_LIMIT_S = 120
_DATA = '{"text":"' + "x" * 100 + '","n":[1,2,3]}'


def _publish(channel: str) -> str:
    # With spaces after colons and commas, as written by Python's json and most libraries.
    return f'{{"method": "publish", "params": {{"channel": "{channel}", "data": {_DATA}}}}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Produce:
    """Publishes through one queue, four queues, and HTTP requests with 1 and 100 commands."""

    commands: int
    rounds: int
    connections: int
    bench: Path
    cores: Cores
    relay: RelayOptions

    async def run(self, folder: Path) -> list[dict[str, Any]]:
        """Return one row per method and round."""
        settings = [
            "producer:queue.enabled=yes",
            f"producer:queue.shards={_SHARDS}",
            f"protocol:centrifugo.secret={_SECRET}",
            *self.relay.settings,
        ]
        rows = []
        for number in range(self.rounds):
            place = folder / str(number)
            place.mkdir()
            async with relay(place, self.cores, replace(self.relay, settings=settings)) as running:
                for shards, batch in ((1, 0), (_SHARDS, 0), (0, 1), (0, 100)):
                    rows.append(await self._measured(running, shards, batch))
        say()
        table(rows)
        return rows

    async def _measured(self, running: Running, shards: int, batch: int) -> dict[str, Any]:
        way = f"queue, lists: {shards}" if shards else f"HTTP, commands a request: {batch}"
        if running.redis is None:
            raise LoadError("this benchmark requires a server with its own Redis")
        count = self.commands if shards or batch > 1 else self.commands // 4
        async with Redis(port=running.redis_port, protocol=3) as admin:
            await admin.flushall()
            if shards:
                await self._fill(admin, count, shards)
            before = running.process.cpu_s(), running.redis.cpu_s()
            begun = time.perf_counter()
            if shards:
                await self._drain(admin, shards)
            else:
                await self._post(running.port, count, batch)
            took = time.perf_counter() - begun
            after = running.process.cpu_s(), running.redis.cpu_s()
            added = 0
            for number in range(max(shards, 1)):
                info: Any = await admin.xinfo_stream(f"relay:stream:{{c{number}}}")
                added += info["entries-added"]
        if added != count:
            raise LoadError(f"{way}: {count} commands added {added} entries, expected {count}")
        return {
            "way": way,
            "events": count,
            "events/s": count / took,
            "relay us/event": (after[0] - before[0]) / count * 1e6,
            "Redis us/event": (after[1] - before[1]) / count * 1e6,
        }

    async def _fill(self, admin: Redis, count: int, shards: int) -> None:
        for shard in range(shards):
            text = _publish(f"c{shard}")
            left = count // shards
            while left:
                part = min(left, 1000)
                await admin.rpush(f"filled.{shard}", *[text] * part)
                left -= part

    async def _drain(self, admin: Redis, shards: int) -> None:
        names = [_QUEUE] if shards == 1 else [f"{_QUEUE}.{n}" for n in range(shards)]
        for shard, name in enumerate(names):
            await admin.rename(f"filled.{shard}", name)
        async with asyncio.timeout(_LIMIT_S):
            while await admin.exists(*names):  # noqa: ASYNC110  # relay empties them
                await asyncio.sleep(0.01)

    async def _post(self, port: int, count: int, batch: int) -> None:
        text = _publish("c0")
        body = (text if batch == 1 else f"[{', '.join([text] * batch)}]").encode()
        sign = hmac.digest(_SECRET.encode(), body, "sha256").hex()
        request = (
            f"POST /api/ HTTP/1.1\r\nHost: relay\r\nContent-Type: application/json\r\n"
            f"X-API-Sign: {sign}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        left = count // batch

        async def one() -> None:
            nonlocal left
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            while left > 0:
                left -= 1
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
                answer = await reader.readexactly(length)
                if answer.count(b'"error":null') != batch:
                    raise LoadError(
                        f"unexpected response of the HTTP API: {head[:100]!r} {answer[:200]!r}"
                    )
            writer.close()

        async with asyncio.timeout(_LIMIT_S), asyncio.TaskGroup() as tasks:
            for _ in range(self.connections):
                tasks.create_task(one())
