"""What a loop that opens lost links again needs around its TaskGroup."""

from __future__ import annotations

import asyncio


def uncancel() -> None:
    """Take back what a TaskGroup that failed left behind in this task.

    Python 3.11's cancels its own task when a child fails while it waits in `__aexit__`, and does
    not take that back (read in 3.11.2's asyncio/taskgroups.py). The next `asyncio.timeout` of this
    task would then end the task without a word instead of raising TimeoutError.
    """
    task = asyncio.current_task()
    while task is not None and task.cancelling():
        task.uncancel()


async def wait_for(future: asyncio.Future[None]) -> None:
    """A task of the group: ends with the future's error."""
    await future


def first_of(group: BaseExceptionGroup[Exception]) -> BaseException:
    """The first error in it that is no group itself."""
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
