"""The thread in which a `Publisher` runs its event loop, for programs without asyncio.

It works in programs that gevent or eventlet has patched. There, `threading` starts a greenlet in
the caller's own thread, which can run only one event loop. Therefore:

- The thread is started by the unpatched function. Its loop is uvloop's, which uses neither
  `socket` nor `select`, because those are patched too.
- A caller waits for its result by receiving a byte from a socket. In a patched program this lets
  other greenlets run, whereas locks of patched programs do not work between threads.
- Disk operations run in the thread itself instead of in a pool of threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import uvloop
from typing_extensions import override

T = TypeVar("T")
P = ParamSpec("P")


class NetworkThread:
    """An event loop in its own thread. Starting it raises RuntimeError if threads are exhausted."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._loop.set_default_executor(_SameThread())
        try:
            _start_thread(self._serve)
        except BaseException:
            self._loop.close()
            raise

    def begin(self, call: Coroutine[Any, Any, T]) -> Callable[[], T]:
        """Start a coroutine. Return a function that waits for its result.

        Raises:
            OSError: No socket could be opened.
        """
        try:
            waiting, done = socket.socketpair()
        except OSError:
            call.close()
            raise
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            tasks.append(self._loop.create_task(call))
            tasks[0].add_done_callback(finish)

        def finish(_: asyncio.Task[T]) -> None:
            with contextlib.suppress(OSError):  # an exception, such as a signal's, ended the wait
                done.send(b".")

        def result() -> T:
            with waiting:
                waiting.recv(1)
            done.close()
            return tasks[0].result()

        self._loop.call_soon_threadsafe(start)
        return result

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Wait for the running calls and for `last`, then stop the loop and end the thread.

        No call may be begun afterwards.
        """
        self.begin(self._finish(last))()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _finish(self, last: Coroutine[Any, Any, None]) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others)
        await last

    def _serve(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()


class _SameThread(ThreadPoolExecutor):
    """An executor that runs functions at once, because the loop's thread has no other work."""

    @override
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as exc:  # noqa: BLE001  # the caller of the future gets it
            future.set_exception(exc)
        return future


def _start_thread(function: Callable[[], None]) -> None:
    gevent, eventlet = (sys.modules.get(name) for name in ("gevent.monkey", "eventlet.patcher"))
    if gevent is not None and gevent.is_module_patched("threading"):
        gevent.get_original("_thread", "start_new_thread")(function, ())
    elif eventlet is not None and eventlet.is_monkey_patched("thread"):
        eventlet.original("threading").Thread(target=function, daemon=True).start()
    else:
        threading.Thread(target=function, name="relay-publisher", daemon=True).start()
