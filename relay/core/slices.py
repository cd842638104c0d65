"""Time slices for long work on the event loop.

A request that asks for thousands of small steps must not delay the other clients of the worker.
Run such steps in a loop over `in_slices(items)`, or call `await next_slice()` between two of them.
Code that is not a coroutine calls `for_each(items, act, spawn)`, which needs a task only for many
items. All such work shares one slice of `SLICE_S` per turn of the event loop, regardless of the
number of simultaneous requests:

    async for channel in in_slices(channels):
        subscribe(channel)

A single step is never interrupted, so each must be short itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from time import perf_counter
from typing import Any, TypeVar

SLICE_S = 0.005
# Number of items that `for_each` processes at once.
AT_ONCE = 100

T = TypeVar("T")


class _Budget:
    """The remaining time for long work in the current turn of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        # None if no long work has run in this turn.
        self._until: float | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()

    def is_spent(self) -> bool:
        now = perf_counter()
        if self._until is None:
            self._begin(now)
            return False
        return now >= self._until

    async def next_turn(self) -> None:
        waiter: asyncio.Future[None] = self.loop.create_future()
        self._waiting.append(waiter)
        await waiter

    def _begin(self, now: float) -> None:
        self._until = now + SLICE_S
        self.loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._until = None
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                # One task per turn, because each may use the whole slice.
                waiter.set_result(None)
                self._begin(perf_counter())
                break


_budget: _Budget | None = None


def _current_budget() -> _Budget:
    global _budget
    loop = asyncio.get_running_loop()
    if _budget is None or _budget.loop is not loop:
        _budget = _Budget(loop)
    return _budget


async def next_slice() -> None:
    """Return at once while this turn's slice lasts; otherwise wait for a later turn."""
    if (budget := _current_budget()).is_spent():
        await budget.next_turn()


async def in_slices(items: Iterable[T]) -> AsyncIterator[T]:
    """Iterate over `items`. Wait for a later turn whenever this turn's slice is used up."""
    budget = _current_budget()
    for item in items:
        if budget.is_spent():
            await budget.next_turn()
        yield item


def for_each(
    items: Sequence[T],
    act: Callable[[T], object],
    spawn: Callable[[Coroutine[Any, Any, None]], object],
) -> None:
    """Call `act` for each item in order: at once if there are few, otherwise in slices.

    `spawn` starts a task. Items may have changed when `act` is called in a later turn.
    """
    if len(items) <= AT_ONCE:
        for item in items:
            act(item)
    else:
        spawn(_act_in_slices(items, act))


async def _act_in_slices(items: Sequence[T], act: Callable[[T], object]) -> None:
    async for item in in_slices(items):
        act(item)
