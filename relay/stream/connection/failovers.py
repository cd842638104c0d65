"""Notice failovers of Redis Sentinel at once: subscribe to `+switch-master` of all Sentinels.

Without it, a connection to a frozen primary is noticed only when a command times out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from relay.core.errors import ConfigError, RedisUnavailable
from relay.stream.connection import sentinel
from relay.stream.connection.connect import discover, servers_of, watched_sentinels
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.connection.reconnecting import keep_connected, loss_of_connection

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.connection.connect import RedisEndpoint

_log = logging.getLogger(__name__)

_SWITCHED = b"+switch-master"


async def watch_failovers(settings: RedisSettings) -> None:
    """Close connections to replaced primaries, for all Sentinels of the URL. Runs until cancelled.

    Returns at once if the URL names no Sentinels.
    """
    async with asyncio.TaskGroup() as tasks:
        promoted: dict[str, list[str]] = {}
        for server in servers_of(settings):
            site, master, endpoints = watched_sentinels(server)
            for endpoint in endpoints:
                watch = _SentinelWatch(server, site, master, endpoint, promoted)
                tasks.create_task(watch.run(), name=f"Sentinel {endpoint}")


class _SentinelWatch:
    """The subscription to one Sentinel."""

    def __init__(
        self,
        settings: RedisSettings,
        site: str,
        master: str,
        endpoint: RedisEndpoint,
        promoted: dict[str, list[str]],
    ) -> None:
        """`promoted`: host and port of the latest promoted server by site, for the log."""
        self._settings = settings
        self._site = site
        self._master = master
        self._endpoint = endpoint
        self._promoted = promoted
        self._is_first = True
        self._reporting: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        await keep_connected(
            self._serve, lambda exc: _log.debug("Sentinel %s: %s", self._endpoint, exc)
        )

    async def _serve(self, established: Callable[[], None]) -> None:
        lost, on_lost = loss_of_connection()
        connection = await PipelineConnection.open(
            self._endpoint,
            settings=self._settings,
            on_push=self._on_push,
            on_lost=on_lost,
            name="relay-failovers",
            check_primary=False,
        )
        try:
            await connection.call("SUBSCRIBE", _SWITCHED)
            established()
            if not self._is_first:
                # A failover may have happened while this subscription did not exist.
                await self._find_primary()
            self._is_first = False
            await lost
        finally:
            connection.close()

    async def _find_primary(self) -> None:
        try:
            present = await discover(self._settings)
        except (RedisUnavailable, ConfigError):
            return
        await sentinel.report_primary(self._site, present.host, present.port)

    def _on_push(self, push: list[object]) -> None:
        if push[:2] != [b"message", _SWITCHED] or not isinstance(push[2], bytes):
            return
        # The message is: name, old host, old port, new host, new port.
        words = push[2].decode(errors="replace").split(" ")
        if len(words) != 5 or words[0] != self._master or not words[4].isdigit():
            return
        if self._promoted.get(self._site) != words[3:]:
            # Each Sentinel reports each failover.
            self._promoted[self._site] = words[3:]
            _log.warning(
                "Sentinel at %s has promoted Redis at %s:%s in place of %s:%s; connecting to it",
                self._endpoint,
                *words[3:],
                *words[1:3],
            )
        report = partial(sentinel.report_primary, self._site, words[3], int(words[4]))
        task = asyncio.get_running_loop().create_task(report(), name="report of a failover")
        self._reporting.add(task)
        task.add_done_callback(self._reporting.discard)
