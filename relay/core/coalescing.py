"""Coalesce identical requests to an application that are made at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, KeysView
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Result = TypeVar("_Result")


class RequestCoalescer(Generic[_Key, _Result]):
    """Runs at most one call per key at a time. Concurrent callers receive its result or error.

    The call runs in the task of its first caller. If that task is cancelled, one of the waiting
    callers makes the call again. Results are not cached.
    """

    def __init__(self) -> None:
        self._running: dict[_Key, asyncio.Future[_Result]] = {}

    def running(self) -> KeysView[_Key]:
        """Return the keys of the running calls."""
        return self._running.keys()

    async def run(self, key: _Key, call: Callable[[_Key], Awaitable[_Result]]) -> _Result:
        """Return the result of `call(key)`, or of the running call with this key."""
        while (running := self._running.get(key)) is not None:
            await asyncio.wait((running,))
            if not running.cancelled():
                return running.result()
        future: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        self._running[key] = future
        try:
            result = await call(key)
        except Exception as exc:
            future.set_exception(exc)
            # Retrieve the exception, because no caller may be waiting.
            future.exception()
            raise
        else:
            future.set_result(result)
            return result
        finally:
            del self._running[key]
            # Has no effect unless this task was cancelled.
            future.cancel()
