"""Concurrent calls with the same key share one call, its result and its error."""

from __future__ import annotations

import asyncio

import pytest

from relay.core.coalescing import RequestCoalescer


class Application:
    """Answers each request when the test allows it, and counts the requests."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def ask(self, key: str) -> str:
        self.requests.append(key)
        number = len(self.requests)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return f"{key}{number}"


async def _started(
    requests: RequestCoalescer[str, str], application: Application, *keys: str
) -> list[asyncio.Task[str]]:
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(requests.run(key, application.ask)) for key in keys]
    await asyncio.sleep(0)
    return tasks


async def test_concurrent_calls_with_one_key_share_one_result() -> None:
    application, requests = Application(), RequestCoalescer[str, str]()
    tasks = await _started(requests, application, "a", "a", "b", "a")
    assert set(requests.running()) == {"a", "b"}
    application.gate.set()
    assert [await task for task in tasks] == ["a1", "a1", "b2", "a1"]
    assert application.requests == ["a", "b"]
    # Results are not cached.
    assert set(requests.running()) == set()
    assert await requests.run("a", application.ask) == "a3"


async def test_an_error_is_raised_in_every_waiting_caller() -> None:
    application, requests = Application(), RequestCoalescer[str, str]()
    tasks = await _started(requests, application, "a", "a", "a")
    application.error = ValueError("no answer")
    application.gate.set()
    await asyncio.wait(tasks)
    assert [str(task.exception()) for task in tasks] == ["no answer"] * 3
    assert application.requests == ["a"]


async def test_an_error_of_a_single_caller_is_not_reported_as_unretrieved() -> None:
    application, requests = Application(), RequestCoalescer[str, str]()
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    application.error = ValueError("no answer")
    application.gate.set()
    with pytest.raises(ValueError, match="no answer"):
        await requests.run("a", application.ask)
    await asyncio.sleep(0)
    assert reported == []


async def test_a_waiting_caller_repeats_the_call_if_the_first_one_is_cancelled() -> None:
    application, requests = Application(), RequestCoalescer[str, str]()
    first, second, third = await _started(requests, application, "a", "a", "a")
    first.cancel()
    await asyncio.wait([first])
    await asyncio.sleep(0)
    application.gate.set()
    assert first.cancelled()
    assert await second == await third == "a2"
    assert application.requests == ["a", "a"]


async def test_cancelling_a_waiting_caller_does_not_affect_the_others() -> None:
    application, requests = Application(), RequestCoalescer[str, str]()
    first, second, third = await _started(requests, application, "a", "a", "a")
    second.cancel()
    await asyncio.wait([second])
    application.gate.set()
    assert second.cancelled()
    assert await first == await third == "a1"
    assert application.requests == ["a"]
