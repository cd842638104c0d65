"""Cancel tasks for certain: libraries and Python 3.11 swallow some cancellations."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# How long a task may take to end before it is cancelled again.
_AGAIN_S = 0.2


@contextmanager
def cancellation_kept() -> Iterator[None]:
    """Raise CancelledError at the end of the block if the task was cancelled during the block.

    Python 3.11 swallows a cancellation in two cases, and the task would then run on:

    - `asyncio.wait_for`, through which redis-py 8.1 sends commands, returns a result that is ready
      at the moment of the cancellation.
    - A task that is cancelled while it awaits another one gets that one's error instead, if that
      one fails while it is being cancelled.

    Don't use a TaskGroup in the block: one that fails leaves its task cancelled in Python 3.11, and
    the block then raises CancelledError although its task was not cancelled.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        yield
    except Exception as exc:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from exc
        raise
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError


async def end_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel the tasks repeatedly until they have ended.

    Once is not enough outside `cancellation_kept`: redis-py 8.1 on Python 3.11 swallows nearly half
    of the cancellations while it sends a command (132 of 300 in a loop of SET).
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)
