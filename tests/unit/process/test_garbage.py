"""relay/process/garbage.py: full collections depend on the size of the process."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from relay.process import garbage


class _Node:
    def __init__(self) -> None:
        self.me = self


async def test_growth_starts_no_full_collection() -> None:
    full: list[int] = []

    def on_collection(phase: str, info: dict[str, Any]) -> None:
        if phase == "start" and info["generation"] == 2:
            full.append(1)

    before = gc.get_threshold()
    collecting = asyncio.get_running_loop().create_task(garbage.collect_rarely())
    await asyncio.sleep(0)
    gc.callbacks.append(on_collection)
    try:
        partial = gc.get_stats()[1]["collections"]
        kept = [[number] for number in range(1_000_000)]
        assert len(kept) == 1_000_000
        assert gc.get_stats()[1]["collections"] > partial
        assert not full
    finally:
        gc.callbacks.remove(on_collection)
        collecting.cancel()
        await asyncio.wait((collecting,))
    assert gc.get_threshold() == before
    assert not gc.get_freeze_count()


async def test_young_cycles_are_freed() -> None:
    collecting = asyncio.get_running_loop().create_task(garbage.collect_rarely())
    await asyncio.sleep(0)
    try:
        for _ in range(20_000):
            _Node()
        assert sum(isinstance(each, _Node) for each in gc.get_objects()) < 1000
    finally:
        collecting.cancel()
        await asyncio.wait((collecting,))


def test_a_process_that_has_grown_by_a_quarter_is_due() -> None:
    assert not garbage.is_due(100_000, 160_000)
    assert garbage.is_due(100_000, 170_000)
    assert not garbage.is_due(1_000_000, 1_200_000)
    assert garbage.is_due(1_000_000, 1_250_000)
