"""Tasks that ignore a cancellation are cancelled again."""

from __future__ import annotations

import asyncio

from relay.process.drain import end_all


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
