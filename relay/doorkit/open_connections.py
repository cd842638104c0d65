"""Count a protocol's open connections, and wait until the last one is closed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Gauge


class OpenConnections:
    """The number of open connections on this worker, also in the metric if there is one."""

    def __init__(self, gauge: Gauge | None = None) -> None:
        self._gauge = gauge
        self._count = 0
        self._all_closed = asyncio.Event()
        self._all_closed.set()

    def opened(self) -> None:
        """Count a new connection. Call `closed` once when it has ended."""
        self._change(1)

    def closed(self) -> None:
        """Stop counting a connection."""
        self._change(-1)

    async def wait_closed(self) -> None:
        """Wait until no connection is open."""
        await self._all_closed.wait()

    def _change(self, by: int) -> None:
        self._count += by
        if self._gauge is not None:
            self._gauge.set(self._count)
        if self._count:
            self._all_closed.clear()
        else:
            self._all_closed.set()
