"""This worker as a v1 node, and the others: what `stats` and `node` tell.

Every `node_ping_interval` each worker writes what it has to tell into the store, for as long as
twice that and a second. Counters in `stats` are those of the last whole `node_metrics_interval`.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from relay.core.errors import RelayError
from relay.protocols.centrifugo.codec import VERSION
from relay.protocols.centrifugo.encoders import DOOR
from relay.protocols.centrifugo.stats import COUNTERS, GAUGES

if TYPE_CHECKING:
    from relay.hub.session import Session
    from relay.protocols.centrifugo.server_state import ServerState

# Linux: /proc/self/status, in kB.
_MEMORY = {
    "VmRSS": "node_memory_sys",
    "RssAnon": "node_memory_heap_alloc",
    "VmData": "node_memory_heap_sys",
    "VmStk": "node_memory_stack_inuse",
}


class NodeReport:
    """`run` must be running."""

    def __init__(self, door: ServerState) -> None:
        self._door = door
        instance = door.context.bus.instance
        self._instance = instance
        self._uid = str(uuid.uuid4())
        self._name = instance.rpartition(":")[0] or instance
        self._started = time.time()
        self._before = dict.fromkeys(COUNTERS, 0)
        # Until the first interval is over.
        self._snapshot = self._before | door.stats.durations()
        self._cpu = (time.monotonic(), time.process_time())
        self._cpu_usage = 0

    async def run(self) -> None:
        """Until cancelled; Redis being away is waited out."""
        loop = asyncio.get_running_loop()
        settings = self._door.settings
        snapshot_at = loop.time() + settings.node_metrics_interval
        while True:
            await self._tell()
            settings = self._door.settings
            now = loop.time()
            await asyncio.sleep(max(0.0, min(settings.node_ping_interval, snapshot_at - now)))
            if loop.time() >= snapshot_at:
                snapshot_at = loop.time() + settings.node_metrics_interval
                self.finish_interval()

    async def _tell(self) -> None:
        ttl_s = 2 * self._door.settings.node_ping_interval + 1
        self._door.stats.count("node_num_control_msg_published")
        try:
            await self._door.context.store.put(
                _key(self._instance), self._as_others_see_it(), ttl_s
            )
        except RelayError:
            return  # the others leave it out meanwhile, as v1 would

    def finish_interval(self) -> None:
        """From now on `stats` tells what happened since the last time."""
        counts = self._counts()
        deltas = {name: counts[name] - self._before[name] for name in COUNTERS}
        self._before = counts
        self._snapshot = deltas | self._door.stats.durations()
        self._door.stats.rotate()
        before, used = self._cpu
        self._cpu = (time.monotonic(), time.process_time())
        passed = self._cpu[0] - before
        self._cpu_usage = round(100 * (self._cpu[1] - used) / passed) if passed else 0

    async def stats(self) -> bytes:
        """All nodes of the site. Unavailable where Redis is away."""
        context = self._door.context
        others = [each for each in await context.active.workers() if each != self._instance]
        told = await context.store.get_many([_key(each) for each in others])
        nodes = [self._as_others_see_it(), *(each for each in told if each is not None)]
        interval = round(self._door.settings.node_metrics_interval)
        return b'{"data":{"nodes":[%b],"metrics_interval":%d}}' % (b",".join(nodes), interval)

    def raw(self) -> bytes:
        """This node, with its counters since the start."""
        metrics = self._counts() | self._door.stats.durations() | self._gauges()
        return b'{"data":%b}' % self._describe(metrics)

    def _as_others_see_it(self) -> bytes:
        return self._describe(self._snapshot | self._gauges())

    def _describe(self, metrics: dict[str, int]) -> bytes:
        return orjson.dumps(
            {
                "uid": self._uid,
                "version": VERSION,
                "name": self._name,
                "started_at": int(self._started),
                "metrics": dict(sorted(metrics.items())),
            }
        )

    def _counts(self) -> dict[str, int]:
        found = dict(self._door.stats.counts)
        metrics = self._door.context.metrics
        # Counted for all doors of the worker: not once per client and event.
        sent = metrics.offered()
        found["client_num_msg_queued"] += sent
        found["client_num_msg_sent"] += sent
        found["node_num_client_msg_received"] += metrics.received()
        here = self._clients()
        found["node_num_remove_client_conn"] = found["node_num_add_client_conn"] - len(here)
        return found

    def _clients(self) -> list[Session]:
        sessions = self._door.context.hub.sessions()
        return [session for session in sessions if session.principal.door == DOOR]

    def _gauges(self) -> dict[str, int]:
        found = dict.fromkeys(GAUGES, 0)
        clients = self._clients()
        channels: set[str] = set()
        for session in clients:
            channels.update(session.subscriptions)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return (
            found
            | memory()
            | {
                "node_num_clients": len(clients),
                "node_num_unique_clients": len({each.principal.user for each in clients}),
                "node_num_channels": len(channels),
                # Of all in Python what is most like them.
                "node_num_goroutine": len(asyncio.all_tasks()),
                "node_cpu_usage": self._cpu_usage,
                "node_rusage_utime": int(usage.ru_utime * 1e6),
                "node_rusage_stime": int(usage.ru_stime * 1e6),
                "node_uptime_seconds": int(time.time() - self._started),
            }
        )


def memory() -> dict[str, int]:
    """This process's, in bytes, by v1's names; nothing where the system does not tell."""
    found = {}
    try:
        lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        name, _, rest = line.partition(":")
        if name in _MEMORY:
            found[_MEMORY[name]] = int(rest.split()[0]) * 1024
    return found


def _key(instance: str) -> str:
    return f"centrifugo:node:{instance}"
