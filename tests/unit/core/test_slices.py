"""Long work yields to other tasks, also with many simultaneous requests."""

from __future__ import annotations

import asyncio
import time

import pytest

from relay.core import slices
from relay.core.slices import AT_ONCE, SLICE_S, for_each, in_slices, next_slice

STEP_S = 0.0005
TASKS, STEPS = 60, 20


async def _work(done: list[int], number: int) -> None:
    async for _ in in_slices(range(STEPS)):
        time.sleep(STEP_S)  # noqa: ASYNC251 - a step of work that does not yield
        done.append(number)


async def test_all_long_work_shares_one_slice_of_each_turn() -> None:
    """Without the shared slice, a turn would take as many slices as there are tasks."""
    done: list[int] = []
    longest, last = 0.0, time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_work(done, number)) for number in range(TASKS)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
    assert sorted(done) == sorted(list(range(TASKS)) * STEPS)
    # 60 tasks in one turn would need 300 ms. The rest is tolerance for a busy machine.
    assert longest < SLICE_S * TASKS / 2
    # The tasks alternated: the last one began before the first one had finished.
    assert done.index(TASKS - 1) < len(done) - 1 - done[::-1].index(0)


async def test_short_work_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine even this can take longer than a real slice.
    monkeypatch.setattr(slices, "SLICE_S", 10.0)
    turns = 0

    def count() -> None:
        nonlocal turns
        turns += 1
        asyncio.get_running_loop().call_soon(count)

    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(count)
    async for _ in in_slices(range(10)):
        pass
    assert turns == 0


async def test_a_task_that_gives_up_does_not_hold_the_others_up() -> None:
    done: list[int] = []
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_work(done, number)) for number in range(3)]
        await asyncio.sleep(SLICE_S)
        tasks[0].cancel()
    assert tasks[0].cancelled()
    assert done.count(1) == done.count(2) == STEPS
    async for _ in in_slices(range(3)):
        break
    await asyncio.wait_for(next_slice(), 30)


async def test_few_items_at_once_and_many_in_their_order() -> None:
    loop, seen = asyncio.get_running_loop(), list[int]()
    for_each(range(AT_ONCE), seen.append, loop.create_task)
    assert seen == list(range(AT_ONCE))
    seen.clear()
    many = range(10 * AT_ONCE)
    for_each(many, seen.append, loop.create_task)
    assert not seen
    async with asyncio.timeout(30):
        while len(seen) < len(many):
            await asyncio.sleep(0)
    assert seen == list(many)
