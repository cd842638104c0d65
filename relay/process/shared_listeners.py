"""Share the listeners of a host between its workers.

The workers' shared memory contains which of them are ready and listening. When one of them stops,
its clients and producers move to the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from relay.core.worker_memory import BEAT_S
from relay.transports.between_workers.balance import Balance

if TYPE_CHECKING:
    from relay.core.worker_memory import Worker
    from relay.process.server import Server

_HAND_OVER_S = 0.05


class SharedListeners:
    """Publishes this worker's state to the other workers, and closes its listeners at a stop."""

    def __init__(
        self,
        worker: Worker,
        *,
        server: Server,
        is_ready: Callable[[], bool],
        clients: Callable[[], int],
    ) -> None:
        self.balance = Balance(worker, clients)
        self._worker = worker
        self._server = server
        self._is_ready = is_ready
        self._started = False
        self._listening = True

    def start(self, spawn: Callable[..., object]) -> None:
        """Share new connections with the other workers. Call it when the listeners are open."""
        self._server.balance(self.balance, spawn)
        self._started = True
        self._publish()

    async def renew(self) -> None:
        """Publish the state again, because other workers ignore an old state."""
        if self._started:
            self._publish()

    def _publish(self) -> None:
        number, memory = self._worker.number, self._worker.memory
        memory.beat(number, ready=self._is_ready())
        memory.set_listening(number, open=self._listening)
        self.balance.beat()

    def on_connections_changed(self) -> None:
        """Publish the number of clients."""
        if self._started:
            self.balance.tell()

    def leave(self) -> None:
        """Publish that this worker is not ready, so that the others receive new clients."""
        self._worker.memory.beat(self._worker.number, ready=False)

    async def close_if_others_serve(self) -> None:
        """Close the listeners early if only this worker stops: the others get its clients."""
        # If all workers stop, they have published by then that they are not ready.
        await asyncio.sleep(2 * BEAT_S)
        memory = self._worker.memory
        if len(memory.not_ready()) < memory.count:
            await self.close()

    async def close(self) -> None:
        """Close the listeners."""
        if self._listening:
            self._listening = False
            self._worker.memory.set_listening(self._worker.number, open=False)
            # Another worker may be about to hand over a producer's connection.
            await asyncio.sleep(_HAND_OVER_S)
        await self._server.stop_listening()

    def clear(self) -> None:
        """Remove this worker's state from the shared memory."""
        if self._started:
            self._started = False
            self._worker.memory.clear(self._worker.number)
