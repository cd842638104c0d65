"""The retry loop of connections to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from relay.core.errors import RedisUnavailable
from relay.stream.connection import reconnecting
from relay.stream.connection.reconnecting import Backoff, keep_connected, loss_of_connection


def test_pauses_double_up_to_the_cap_and_are_short_after_a_reset() -> None:
    backoff = Backoff(0.1, 2.0)
    for _ in range(2):
        for longest in (0.1, 0.2, 0.4, 0.8, 1.6, *[2.0] * 2000):
            assert longest / 2 <= backoff.next_s() <= longest
        backoff.reset()


async def test_only_a_connection_that_lasted_makes_the_pauses_short_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconnecting, "_STABLE_S", 0.1)
    errors: list[str] = []
    pauses: list[float] = []

    class Recorded(Backoff):
        async def pause(self) -> None:
            pauses.append(self.next_s())

    async def serve(established: Callable[[], None]) -> None:
        attempt = len(errors)
        if attempt == 6:
            return
        if attempt in (3, 4):
            established()
        if attempt == 4:
            await asyncio.sleep(0.15)
        raise RedisUnavailable(f"attempt {attempt}")

    await keep_connected(serve, lambda exc: errors.append(str(exc)), Recorded(1.0, 100.0))
    assert errors == [f"attempt {number}" for number in range(6)]
    assert [4 <= pauses[3] <= 8, 0.5 <= pauses[4] <= 1, 1 <= pauses[5] <= 2] == [True] * 3


async def test_a_bug_ends_the_loop_and_errors_in_a_task_group_do_not() -> None:
    attempts = 0
    errors: list[BaseException] = []

    async def serve(established: Callable[[], None]) -> None:
        nonlocal attempts
        attempts += 1
        lost, on_lost = loss_of_connection()
        if attempts == 2:
            # Python 3.11 cancels the loop here if the count of cancellations is not reset.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await asyncio.Event().wait()
            raise ZeroDivisionError
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(reconnecting.wait_for(lost), name="lost")
            asyncio.get_running_loop().call_soon(on_lost, None)

    with pytest.raises(ZeroDivisionError):
        await keep_connected(serve, errors.append)
    (error,) = errors
    assert isinstance(error, RedisUnavailable)
