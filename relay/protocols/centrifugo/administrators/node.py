"""Replies to `stats` and `node`: each worker is reported as a v1 node.

Every `node_ping_interval` each worker writes its report to the shared store, where it expires after
twice that time plus one second. Counters in `stats` cover the last complete
`node_metrics_interval`.
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
    """Metrics of this worker. Requires a running task of `run`."""

    def __init__(self, server: ServerState) -> None:
        self._server = server
        instance = server.context.bus.instance
        self._instance = instance
        self._uid = str(uuid.uuid4())
        self._name = instance.rpartition(":")[0] or instance
        self._started = time.time()
        self._before = dict.fromkeys(COUNTERS, 0)
        # Reported until the first interval is complete.
        self._snapshot = self._before | server.stats.durations()
        self._cpu = (time.monotonic(), time.process_time())
        self._cpu_usage = 0

    async def run(self) -> None:
        """Publish the report periodically. Runs until cancelled, also without Redis."""
        loop = asyncio.get_running_loop()
        settings = self._server.settings
        snapshot_at = loop.time() + settings.node_metrics_interval
        while True:
            await self._publish()
            settings = self._server.settings
            now = loop.time()
            await asyncio.sleep(max(0.0, min(settings.node_ping_interval, snapshot_at - now)))
            if loop.time() >= snapshot_at:
                snapshot_at = loop.time() + settings.node_metrics_interval
                self.finish_interval()

    async def _publish(self) -> None:
        ttl_s = 2 * self._server.settings.node_ping_interval + 1
        self._server.stats.count("node_num_control_msg_published")
        try:
            await self._server.context.store.put(_key(self._instance), self._shared_report(), ttl_s)
        except RelayError:
            # Like in v1, other nodes omit this one from their statistics in the meantime.
            return

    def finish_interval(self) -> None:
        """Take a snapshot of the counters for `stats`."""
        counts = self._counts()
        deltas = {name: counts[name] - self._before[name] for name in COUNTERS}
        self._before = counts
        self._snapshot = deltas | self._server.stats.durations()
        self._server.stats.rotate()
        before, used = self._cpu
        self._cpu = (time.monotonic(), time.process_time())
        passed = self._cpu[0] - before
        self._cpu_usage = round(100 * (self._cpu[1] - used) / passed) if passed else 0

    async def stats(self) -> bytes:
        """Return the reports of all workers. Raise Unavailable without Redis."""
        context = self._server.context
        others = [each for each in await context.active.workers() if each != self._instance]
        reports = await context.store.get_many([_key(each) for each in others])
        nodes = [self._shared_report(), *(each for each in reports if each is not None)]
        interval = round(self._server.settings.node_metrics_interval)
        return b'{"data":{"nodes":[%b],"metrics_interval":%d}}' % (b",".join(nodes), interval)

    def own_report(self) -> bytes:
        """Return this worker's report, with counters since its start."""
        metrics = self._counts() | self._server.stats.durations() | self._gauges()
        return b'{"data":%b}' % self._describe(metrics)

    def _shared_report(self) -> bytes:
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
        counts = dict(self._server.stats.counts)
        metrics = self._server.context.metrics
        # Counted for all protocols of the worker, and not once per client and event.
        sent = metrics.offered()
        counts["client_num_msg_queued"] += sent
        counts["client_num_msg_sent"] += sent
        counts["node_num_client_msg_received"] += metrics.received()
        clients = self._clients()
        counts["node_num_remove_client_conn"] = counts["node_num_add_client_conn"] - len(clients)
        return counts

    def _clients(self) -> list[Session]:
        sessions = self._server.context.hub.sessions()
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
                # The closest equivalent of goroutines.
                "node_num_goroutine": len(asyncio.all_tasks()),
                "node_cpu_usage": self._cpu_usage,
                "node_rusage_utime": int(usage.ru_utime * 1e6),
                "node_rusage_stime": int(usage.ru_stime * 1e6),
                "node_uptime_seconds": int(time.time() - self._started),
            }
        )


def memory() -> dict[str, int]:
    """Return memory sizes of this process in bytes by v1's names, or {} except on Linux."""
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
