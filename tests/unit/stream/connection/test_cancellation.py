"""Cancellations that a library or Python 3.11 swallows still end their task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from relay.core.errors import RedisUnavailable
from relay.stream.connection.cancellation import cancellation_kept, end_all
from relay.stream.connection.reconnecting import keep_connected
from tests.support.clients import within


async def _deaf(times: int) -> None:
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            times -= 1
            if times < 0:
                raise


async def test_a_task_that_ignores_cancellations_ends() -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_deaf(times)) for times in (0, 1, 3)]
        await asyncio.sleep(0)
        await end_all(tasks)
        assert all(task.cancelled() for task in tasks)
        await end_all(tasks)
        await end_all([])


async def _swallow(error: Exception | None) -> None:
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        if error is not None:
            raise error from None


@pytest.mark.parametrize("error", [None, RedisUnavailable("lost")])
async def test_a_swallowed_cancellation_is_raised(error: Exception | None) -> None:
    async def work() -> None:
        with cancellation_kept():
            await _swallow(error)

    task = asyncio.get_running_loop().create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_timeout_is_no_cancellation() -> None:
    with cancellation_kept(), pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await asyncio.sleep(3600)

    # One around the block ends with its own error.
    async def work() -> None:
        async with asyncio.timeout(0.01):
            with cancellation_kept():
                await _swallow(None)

    with pytest.raises(TimeoutError):
        await work()


async def test_a_connection_that_is_lost_while_its_loop_is_cancelled_is_not_opened_again() -> None:
    attempts = 0
    errors: list[BaseException] = []

    async def serve(established: Callable[[], None]) -> None:
        nonlocal attempts
        attempts += 1
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_swallow(RedisUnavailable("lost")))

    task = asyncio.get_running_loop().create_task(keep_connected(serve, errors.append))
    while not attempts:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    await within(20, asyncio.wait([task]))
    assert task.cancelled()
    assert (attempts, errors) == (1, [])
