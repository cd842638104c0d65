"""Hosts, workers, Redis and the findings of the doctor."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from relay.core.errors import RedisUnavailable
from relay.stream.cluster.workers import list_workers
from relay.stream.upkeep import dead_letter_list, reports

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from relay.console.services import ApiRequest, Described

_KEPT_S, _FRESH_S = 60.0, 5.0


async def overview(request: ApiRequest) -> object:
    """Return all workers, the Redis servers and the number of dead letters."""
    clients, keys = request.services.clients, request.services.keys
    client = clients.home
    servers: list[dict[str, object]] = []
    try:
        servers = await reports.servers(clients)
        living, silent = await list_workers(client, keys)
        now_ms = await clients.time_ms(keys.nodes)
        dead_letters = await dead_letter_list.count(client, keys)
    except RedisUnavailable as exc:
        return {"redis_error": str(exc), "workers": [], "servers": servers}
    living.sort(key=lambda node: (node.host, node.instance))
    return {
        "time_ms": now_ms,
        "workers": [
            *(reports.worker(node, now_ms) for node in living),
            *map(reports.silent_worker, silent),
        ],
        "servers": servers,
        "dead_letters": dead_letters,
    }


class Doctor:
    """Runs `relay doctor`, and keeps its findings for a minute."""

    def __init__(self, examine: Callable[[], Awaitable[Sequence[Described]]]) -> None:
        self._examine = examine
        self._lock = asyncio.Lock()
        self._found: Sequence[Described] = ()
        self._at: float | None = None

    async def findings(self, request: ApiRequest) -> object:
        """Return the findings, errors first. With `fresh=1`, they are at most 5 s old."""
        kept_s = _FRESH_S if request.http.query.get("fresh") else _KEPT_S
        async with self._lock:
            now = time.monotonic()
            if self._at is None or now - self._at > kept_s:
                self._found = await self._examine()
                self._at = now = time.monotonic()
            age_s = round(now - self._at, 1)
        return {"findings": [each.values() for each in self._found], "age_s": age_s}
