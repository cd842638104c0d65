"""Hosts, workers and Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.core.errors import RedisUnavailable
from relay.stream.cluster.workers import list_workers
from relay.stream.upkeep import dead_letter_list, reports

if TYPE_CHECKING:
    from relay.console.services import ApiRequest


async def overview(request: ApiRequest) -> object:
    """Return all workers, the Redis server and the number of dead letters."""
    clients, keys = request.services.clients, request.services.keys
    client = clients.home
    try:
        living, silent = await list_workers(client, keys)
        now_ms = await clients.time_ms(keys.nodes)
        dead_letters = await dead_letter_list.count(client, keys)
        servers = [await reports.server(each) for _, each in await clients.each()]
    except RedisUnavailable as exc:
        return {"redis_error": str(exc), "workers": [], "servers": []}
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
