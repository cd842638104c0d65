"""Workers of one process that pass requests to each other over real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from aiohttp import web

from relay.core.worker_memory import Worker, WorkerMemory, shared_memory
from relay.transports.between_workers.balance import Balance, PassedConnection
from relay.transports.between_workers.forwarder import Forwarder
from relay.transports.between_workers.internal import InternalListener, Introduction
from relay.transports.socket.listener import GuardedSite


class Cluster:
    """Workers with the given addresses, which are hexadecimal numbers.

    They run on one host, or each `on_its_own_host`.
    """

    def __init__(self, addresses: Iterable[str], *, on_its_own_host: bool = False) -> None:
        addresses = list(addresses)
        self.internal: dict[str, tuple[str, int]] = {}
        self._memory = WorkerMemory(shared_memory(len(addresses)))
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in addresses]
        outboxes = {number: pair[1] for number, pair in enumerate(pairs, 1)}
        self._sockets = [end for pair in pairs for end in pair]
        self.workers: dict[str, ClusterWorker] = {}
        for number, address in enumerate(addresses, 1):
            pairs[number - 1][0].setblocking(False)
            pairs[number - 1][1].setblocking(False)
            self._memory.register(number, address)
            worker = Worker(number, self._memory, pairs[number - 1][0], outboxes)
            balance = None if on_its_own_host else Balance(worker, lambda: 0)
            self.workers[address] = ClusterWorker(self, address, balance)

    def bury(self, address: str) -> None:
        """Record that the worker has died."""
        self.internal.pop(address, None)
        number = self._memory.number_of(address)
        assert number is not None
        self._memory.mark_dead(number)

    def close(self) -> None:
        """Close the sockets between the workers."""
        for each in self._sockets:
            each.close()


class ClusterWorker:
    """One worker of the cluster. Its routes use `forward`."""

    def __init__(self, cluster: Cluster, address: str, balance: Balance | None) -> None:
        self.address = address
        self.key = b"a shared key"
        self._cluster = cluster
        self._balance = balance
        self.forwarder = Forwarder(
            balance=balance,
            listener_of=lambda _: (0, "[server] port"),
            address_of=self._address_of,
            key=lambda: self.key,
        )
        self.forward = self.forwarder.forward
        self._tasks: set[asyncio.Task[None]] = set()

    async def _address_of(self, worker: str) -> tuple[str, int] | None:
        return self._cluster.internal.get(worker)

    @asynccontextmanager
    async def serving(self, routes: Iterable[web.AbstractRouteDef]) -> AsyncIterator[int]:
        """Serve the routes, and requests from the other workers. Yield the port."""
        app = web.Application()
        app.router.add_routes(routes)
        runner = web.AppRunner(app, shutdown_timeout=1.0, access_log=None)
        await runner.setup()
        site = GuardedSite(runner, "127.0.0.1", 0)
        await site.start()

        def take(passed: PassedConnection) -> None:
            adopting = site.adopt(
                passed.connection, passed.early, hops=passed.hops, peer=passed.peer
            )
            task = asyncio.get_running_loop().create_task(adopting)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        def take_internal(
            transport: asyncio.Transport, introduction: Introduction, early: bytes
        ) -> bool:
            hops, peer = introduction.hops, introduction.peer
            return site.adopt_open(transport, early, hops=hops, peer=peer)

        internal = InternalListener(self.address, lambda: self.key, take_internal)
        stop: Callable[[], None] = internal.stop
        if self._balance is None:
            port = await internal.start("127.0.0.1", 0)
            self._cluster.internal[self.address] = ("127.0.0.1", port)
        else:
            self._balance.receive(take)
            stop = self._balance.stop
        try:
            yield site.port
        finally:
            stop()
            await runner.cleanup()
            # Wait until the transports of closed connections have ended.
            await asyncio.sleep(0.1)
