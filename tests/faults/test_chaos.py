"""Many clients that disconnect and resume at random receive all events once and in order.

`TEST_CHAOS_EVENTS=100000` runs it at full scale. The default is small enough for every test run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.chaos import ChaosClient, produce
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running

EVENTS = int(os.environ.get("TEST_CHAOS_EVENTS", "10000"))
WORKSPACES = 50
CLIENTS = 200
KILLS = 3


@asynccontextmanager
async def _clients(
    port: int, rng: random.Random
) -> AsyncIterator[tuple[list[ChaosClient], list[str], asyncio.Event]]:
    """Subscribe all clients once, so that each has a position before the first event."""
    channels = [f"chaos:{number}" for number in range(WORKSPACES)]
    clients = [
        ChaosClient(port, rng.sample(channels, rng.choice((1, 1, 3))), websocket=bool(number % 2))
        for number in range(CLIENTS)
    ]
    drop = asyncio.Event()
    drop.set()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(client.run(rng, drop)) for client in clients]
        for client in clients:
            await client.subscribed.wait()
        drop.clear()
        # The first connections, without events, end here. Later ones end at random.
        for task in tasks:
            task.cancel()
        tasks = [group.create_task(client.run(rng, drop)) for client in clients]
        yield clients, channels, drop
        for task in tasks:
            task.cancel()


async def _run(
    valkey: Server, relay: RelayProcess, trouble: Callable[[], None] | None = None
) -> list[ChaosClient]:
    rng = random.Random(20240229)
    async with _clients(relay.port, rng) as (clients, channels, drop):
        totals = {name: len(range(i, EVENTS, WORKSPACES)) for i, name in enumerate(channels)}
        marks = [threading.Event() for _ in range(KILLS if trouble else 0)]

        def kill_at_marks() -> None:
            for mark in marks:
                mark.wait()
                assert trouble is not None
                trouble()

        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(produce, valkey, channels, EVENTS, marks))
            group.create_task(asyncio.to_thread(kill_at_marks))
        drop.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(30 + EVENTS / 1000):
                for client in clients:
                    while not client.done(totals):
                        client.progress.clear()
                        await client.progress.wait()
    for client in clients:
        for name in client.channels:
            assert client.received[name] == list(range(totals[name])), (
                f"{'websocket' if client.websocket else 'sse'} {name}: "
                f"{len(client.received[name])} of {totals[name]}; {client.notices[-3:]}\n"
                + "\n".join(relay.log[-20:])
            )
    connections = sum(client.connections for client in clients)
    deliveries = sum(len(numbers) for client in clients for numbers in client.received.values())
    print(  # noqa: T201  # the figures of a proof at full scale
        f"\n{EVENTS} events, {connections} connections, {deliveries} deliveries, {len(marks)} kills"
    )
    return clients


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    with running(server):
        yield server


@pytest.fixture
def relay(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, flags=["--insecure"]).start()
    yield process
    process.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_every_client_receives_exactly_its_events(
    valkey: Server, relay: RelayProcess
) -> None:
    clients = await _run(valkey, relay)
    assert [notice for client in clients for notice in client.notices] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_so_it_is_when_the_relay_is_killed(valkey: Server, relay: RelayProcess) -> None:
    def trouble() -> None:
        relay.kill()
        relay.start()

    clients = await _run(valkey, relay, trouble)
    assert [notice for client in clients for notice in client.notices] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_so_it_is_when_valkey_is_killed(valkey: Server, relay: RelayProcess) -> None:
    clients = await _run(valkey, relay, valkey.restart)
    # After a kill of the server, a loss cannot be excluded.
    notices = [notice for client in clients for notice in client.notices]
    assert notices
    assert [notice for notice in notices if "failover" not in notice] == []
