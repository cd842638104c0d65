"""Disconnect the clients of a stopping worker, spread over time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from relay.core.reasons import Reason

if TYPE_CHECKING:
    from relay.doorkit.contract import Mounted
    from relay.hub.session import Session

_log = logging.getLogger(__name__)

# Clients due within this time are disconnected together, which costs less than a timer for each.
_TOGETHER_S = 0.02
_LAST_BYTES_S = 2.0
_CANCEL_AGAIN_S = 0.2


async def drain(
    sessions: Sequence[Session], doors: Mapping[str, Mounted], default_s: float
) -> None:
    """Ask all clients to reconnect, spread over `default_s`.

    The clients of a protocol with its own `drain_s` are asked in the last tenth of that time.
    """
    by_door: dict[str, list[Session]] = {}
    for session in sessions:
        by_door.setdefault(session.principal.door, []).append(session)
    due: list[tuple[float, Session]] = []
    for name, clients in by_door.items():
        own = doors[name].drain_s if name in doors else None
        start, end = (0.0, default_s) if own is None else (0.9 * own, own)
        step = (end - start) / len(clients)
        due += [(start + step * index, session) for index, session in enumerate(clients)]
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for at, session in sorted(due, key=lambda each: each[0]):
        wait_s = begun + at - loop.time()
        if wait_s > _TOGETHER_S:
            await asyncio.sleep(wait_s)
        if not session.closed:
            session.client.disconnect(Reason.STOPPING)
    if sessions:
        _log.info("Asked %d clients to reconnect", len(sessions))


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


async def end_all(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel the tasks repeatedly until they have ended.

    Once is not enough: redis-py 8.1 on Python 3.11 ignores nearly half of the cancellations while
    it sends a command (132 of 300 in a loop of SET).
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_S)
