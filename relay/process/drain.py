"""Disconnect the clients of a stopping worker, spread over time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from relay.core.reasons import Reason
from relay.stream.connection.cancellation import end_all

if TYPE_CHECKING:
    from relay.doorkit.contract import Mounted
    from relay.hub.session import Session

_log = logging.getLogger(__name__)

# Clients due within this time are disconnected together, which costs less than a timer for each.
_TOGETHER_S = 0.005
# At most so many in one turn of the event loop. Each takes 0.1 to 0.2 ms, during which the clients
# that are still connected receive nothing.
_AT_ONCE = 16
_LAST_BYTES_S = 2.0


async def drain(
    sessions: Sequence[Session], doors: Mapping[str, Mounted], *, per_s: float, limit_s: float
) -> None:
    """Ask `per_s` clients per second to reconnect, or more if this took longer than `limit_s`.

    The clients of a protocol with its own `drain_s` are asked in the last tenth of that time.
    """
    own_limits = {name: door.drain_s for name, door in doors.items()}
    by_limit: dict[float | None, list[Session]] = {}
    for session in sessions:
        by_limit.setdefault(own_limits.get(session.principal.door), []).append(session)
    due: list[tuple[float, Session]] = []
    for own, clients in by_limit.items():
        start, end = (0.0, limit_s) if own is None else (0.9 * own, own)
        step = min(1 / per_s, (end - start) / len(clients))
        due += [(start + step * index, session) for index, session in enumerate(clients)]
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for index, (at, session) in enumerate(sorted(due, key=lambda each: each[0]), 1):
        wait_s = begun + at - loop.time()
        if wait_s > _TOGETHER_S or not index % _AT_ONCE:
            await asyncio.sleep(max(0.0, wait_s))
        if not session.closed:
            session.disconnect(Reason.STOPPING)
    if sessions:
        _log.info("Asked %d clients to reconnect", len(sessions))


async def wait_for_silence(opened: Callable[[], int], silence_s: float, limit_s: float) -> None:
    """Wait until no client has connected for `silence_s`, at most `limit_s`.

    `opened` returns the number of clients that have connected so far.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + limit_s
    before = -1
    while before != opened() and (left_s := end - loop.time()) > 0:  # polled
        before = opened()
        await asyncio.sleep(min(silence_s, left_s))


async def wait_closed(doors: Mapping[str, Mounted]) -> None:
    """Wait up to 2 s until the clients' sockets are closed. The caller aborts the others later."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_BYTES_S):
            for door in doors.values():
                await door.closed()


async def at_most(limit_s: float, work: Coroutine[Any, Any, None], purpose: str) -> None:
    """Run one step of a stop, and cancel it after `limit_s`. Other workers find out by themselves.

    `purpose` completes the log line "Could not ...".
    """
    task = asyncio.get_running_loop().create_task(work, name=purpose)
    try:
        await asyncio.wait({task}, timeout=limit_s)
        if not task.done():
            _log.warning(
                "Could not %s: Redis did not answer within %g s; stopping without it",
                purpose,
                limit_s,
            )
    finally:
        await end_all({task})
    if not task.cancelled():
        task.result()
