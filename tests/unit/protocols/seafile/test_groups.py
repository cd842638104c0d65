"""Members of a group are queried once and cached. If unavailable, the result is None."""

from __future__ import annotations

import asyncio

from relay.protocols.seafile.groups import Failed, GroupMembers

BOB = frozenset({"bob@example.com"})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_concurrent_lookups_share_one_query_and_its_cached_result() -> None:
    asked: list[int] = []
    gate = asyncio.Event()

    async def source(group: int) -> frozenset[str]:
        asked.append(group)
        await gate.wait()
        return BOB

    clock = Clock()
    groups = GroupMembers(source, 30, clock)
    async with asyncio.TaskGroup() as tasks:
        answers = [tasks.create_task(groups.members(7)) for _ in range(50)]
        await asyncio.sleep(0)
        gate.set()
    assert {answer.result() for answer in answers} == {BOB}
    assert asked == [7]
    clock.now = 29
    await groups.members(7)
    assert asked == [7]
    clock.now = 31
    await groups.members(7)
    assert asked == [7, 7]


async def test_a_failure_gives_none_and_is_cached_for_a_second() -> None:
    up = False
    asked = 0

    async def source(_group: int) -> frozenset[str]:
        nonlocal asked
        asked += 1
        if not up:
            raise Failed("down")
        return BOB

    clock = Clock()
    groups = GroupMembers(source, 30, clock)
    assert await groups.members(7) is None
    up = True
    assert await groups.members(7) is None
    assert asked == 1
    clock.now = 1.5
    assert await groups.members(7) == BOB


async def test_a_lookup_survives_the_cancellation_of_its_first_caller() -> None:
    gate = asyncio.Event()

    async def source(_group: int) -> frozenset[str]:
        await gate.wait()
        return BOB

    groups = GroupMembers(source, 30)
    first = asyncio.get_running_loop().create_task(groups.members(7))
    second = asyncio.get_running_loop().create_task(groups.members(7))
    await asyncio.sleep(0)
    first.cancel()
    gate.set()
    assert await second == BOB
