"""Two workers in one process, with real sockets between them and set numbers of clients."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest

from relay.core.worker_memory import Worker, WorkerMemory, shared_memory
from relay.transports.between_workers.balance import Balance, PassedConnection


@dataclass
class Side:
    worker: Worker
    clients: int = 0

    def __post_init__(self) -> None:
        self.balance = Balance(self.worker, lambda: self.clients)
        self.beat()

    def beat(self) -> None:
        self.worker.memory.beat(self.worker.number, ready=True)
        self.balance.beat()


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    memory = shared_memory(2)
    with ExitStack() as stack:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        for each in (end for pair in pairs for end in pair):
            each.setblocking(False)
            stack.enter_context(each)
        outboxes = {1: pairs[0][1], 2: pairs[1][1]}
        first, second = (
            Side(Worker(number, WorkerMemory(memory), pairs[number - 1][0], outboxes))
            for number in (1, 2)
        )
        yield first, second


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


Pair = tuple[socket.socket, socket.socket]


def test_a_worker_with_about_as_many_connections_keeps_a_new_one(
    sides: tuple[Side, Side], connection: Pair
) -> None:
    first, second = sides
    first.clients, second.clients = 103, 100
    first.beat()
    second.beat()
    assert not first.balance.give(connection[0])
    assert not second.balance.give(connection[0])


def test_a_connection_that_is_being_passed_counts_once(
    sides: tuple[Side, Side], connection: Pair
) -> None:
    first, second = sides
    for _ in range(4):
        assert not first.balance.give(connection[0])
    assert first.balance.give(connection[0])
    assert second.worker.memory.connections(1) == 4
    first.clients = 4
    first.balance.tell()
    assert second.worker.memory.connections(1) == 4


async def test_a_worker_with_fewer_connections_receives_it_complete(
    sides: tuple[Side, Side], connection: Pair
) -> None:
    first, second = sides
    near, far = connection
    first.clients = 100
    first.beat()
    far.send(b"hello")
    taken: asyncio.Queue[socket.socket] = asyncio.Queue()
    second.balance.receive(lambda passed: taken.put_nowait(passed.connection))
    try:
        assert first.balance.give(near)
        near.close()
        async with asyncio.timeout(30):
            adopted = await taken.get()
        with adopted:
            assert adopted.recv(10) == b"hello"
            adopted.send(b"and back")
        assert far.recv(10) == b"and back"
        assert first.worker.memory.connections(2) == 1
    finally:
        second.balance.stop()


@pytest.mark.parametrize("peer", ["", "2001:db8::1"])
@pytest.mark.parametrize("early", [b"GET / HTTP/1.1", b"POST / HTTP/1.1" + bytes(3_000_000)])
async def test_a_request_goes_to_the_worker_with_that_address(
    sides: tuple[Side, Side], connection: Pair, early: bytes, peer: str
) -> None:
    first, second = sides
    near, far = connection
    first.worker.memory.register(1, "web-1:0000000a")
    first.worker.memory.register(2, "web-2:0000000b")
    second.beat()
    taken: asyncio.Queue[PassedConnection] = asyncio.Queue()
    second.balance.receive(taken.put_nowait)
    try:
        request = PassedConnection(connection=near, listener=3, early=early, hops=2, peer=peer)
        assert not first.balance.pass_on("0000000c", request)
        assert not first.balance.pass_on("0000000a", request)
        assert first.balance.pass_on("0000000b", request)
        near.close()
        async with asyncio.timeout(30):
            adopted = await taken.get()
        with adopted.connection as connected:
            found = adopted.listener, adopted.early, adopted.hops, adopted.peer
            assert found == (3, early, 2, peer)
            connected.send(b"here")
        assert far.recv(10) == b"here"
        # A frozen or stopping worker still receives the requests of its sessions.
        second.worker.memory.clear(2)
        assert first.balance.pass_on("0000000b", replace(request, connection=far))
        second.worker.memory.mark_dead(2)
        assert not first.balance.pass_on("0000000b", replace(request, connection=far))
    finally:
        second.balance.stop()


def test_a_frozen_or_stopped_worker_receives_no_connection(
    sides: tuple[Side, Side], connection: Pair
) -> None:
    first, second = sides
    first.clients = 100
    second.worker.memory.clear(2)
    assert not first.balance.give(connection[0])


def test_passes_on_only_as_many_as_balance_the_workers(
    sides: tuple[Side, Side], connection: Pair
) -> None:
    first, second = sides
    first.clients, second.clients = 60, 40
    first.beat()
    second.beat()
    given = 0
    while first.balance.give(connection[0]):
        given += 1
    assert 14 <= given <= 20


def test_a_connection_stays_if_the_other_workers_inbox_is_full(
    sides: tuple[Side, Side], connection: Pair
) -> None:
    first, _ = sides
    first.clients = 100_000
    first.beat()
    given = 0
    while first.balance.give(connection[0]):
        given += 1
        assert given < 50_000
    assert given
