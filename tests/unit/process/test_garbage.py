"""relay/process/garbage.py: full collections depend on the size of the process."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from relay.process import garbage


class _Node:
    def __init__(self) -> None:
        self.me = self


def test_growth_starts_no_full_collection() -> None:
    full: list[int] = []

    def on_collection(phase: str, info: dict[str, Any]) -> None:
        if phase == "start" and info["generation"] == 2:
            full.append(1)

    before = gc.get_threshold()
    with garbage.RareCollections():
        gc.callbacks.append(on_collection)
        try:
            partial = gc.get_stats()[1]["collections"]
            kept = [[number] for number in range(1_000_000)]
            assert len(kept) == 1_000_000
            assert gc.get_stats()[1]["collections"] > partial
            assert not full
        finally:
            gc.callbacks.remove(on_collection)
    assert gc.get_threshold() == before
    assert not gc.get_freeze_count()


def test_young_cycles_are_freed() -> None:
    with garbage.RareCollections():
        for _ in range(20_000):
            _Node()
        assert sum(isinstance(each, _Node) for each in gc.get_objects()) < 1000


async def test_old_cycles_are_freed_once_the_process_has_grown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The real peak depends on the tests that ran before.
    size_kb = 100_000
    monkeypatch.setattr(garbage, "_largest_kb", lambda: size_kb)
    with garbage.RareCollections() as collections:
        node = _Node()
        for _ in range(2):
            gc.collect(1)  # Move it to the oldest generation.
        ref = weakref.ref(node)
        del node
        await collections.collect_if_grown()
        assert ref() is not None
        size_kb = 200_000
        await collections.collect_if_grown()
        assert ref() is None


def test_a_process_that_has_grown_by_a_quarter_is_due() -> None:
    assert not garbage.is_due(100_000, 160_000)
    assert garbage.is_due(100_000, 170_000)
    assert not garbage.is_due(1_000_000, 1_200_000)
    assert garbage.is_due(1_000_000, 1_250_000)
