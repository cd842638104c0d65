from __future__ import annotations

import time

import pytest

from relay.core import worker_memory
from relay.core.worker_memory import WorkerMemory, shared_memory


@pytest.fixture
def pair() -> tuple[WorkerMemory, WorkerMemory]:
    """Return the same memory, mapped twice as by two processes."""
    memory = shared_memory(3)
    return WorkerMemory(memory), WorkerMemory(memory)


def test_nobody_is_ready_at_first(pair: tuple[WorkerMemory, WorkerMemory]) -> None:
    one, other = pair
    assert one.count == other.count == 3
    assert one.not_ready() == [1, 2, 3]


def test_what_one_tells_the_other_sees(pair: tuple[WorkerMemory, WorkerMemory]) -> None:
    one, other = pair
    one.beat(2, ready=True)
    one.set_connections(2, 70)
    assert other.not_ready() == [1, 3]
    assert (other.connections(1), other.connections(2), other.connections(3)) == (0, 70, 0)
    one.clear(2)
    assert other.not_ready() == [1, 2, 3]
    assert other.connections(2) == 0


def test_a_beat_holds_for_a_while(
    pair: tuple[WorkerMemory, WorkerMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    one.beat(1, ready=True)
    later = time.monotonic() + worker_memory.PATIENCE_S
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert not other.ready(1)


def test_the_last_deaths_are_remembered(pair: tuple[WorkerMemory, WorkerMemory]) -> None:
    one, other = pair
    names = [f"web1-2:{number:08x}" for number in range(0xFFFFFFF8, 0x100000000)]
    for name in names:
        one.register(2, name)
        assert not other.is_dead(name)
        one.mark_dead(2)
    assert [other.is_dead(name) for name in names] == [False] * 3 + [True] * 5
    assert not other.is_dead("web2-1:00000001")
    assert not other.is_dead("no digits")
