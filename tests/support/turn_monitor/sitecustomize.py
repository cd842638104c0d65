"""Measures the turns of a relay's event loop. Python imports this file at its start.

Each line of the file RELAY_TURNS is the processor time in milliseconds that the main thread has
used between two beats of a timer. The timer beats every 2 ms, so a long turn makes a large number.
Time in which other processes had the processor is not counted.
"""

from __future__ import annotations

import asyncio
import importlib.abc
import os
import sys
import time
from collections.abc import Coroutine
from typing import Any, TextIO

_BEAT_S = 0.002
_SHORTEST_S = 0.005


async def _measured(main: Coroutine[Any, Any, Any], turns: TextIO) -> Any:
    loop = asyncio.get_running_loop()
    begin = time.thread_time()

    def beat() -> None:
        nonlocal begin
        used = time.thread_time() - begin
        if used > _SHORTEST_S:
            turns.write(f"{used * 1000:.1f}\n")
        begin = time.thread_time()
        loop.call_later(_BEAT_S, beat)

    beat()
    return await main


class _Patch(importlib.abc.MetaPathFinder):
    """Patches uvloop.run when the relay imports its main module."""

    def find_spec(self, name: str, _path: object, _target: object = None) -> None:
        if name != "relay.process.app":
            return
        sys.meta_path.remove(self)
        import uvloop

        run = uvloop.run
        turns = open(os.environ["RELAY_TURNS"], "w", buffering=1)  # noqa: SIM115  # until the end
        uvloop.run = lambda main, **options: run(_measured(main, turns), **options)


if "RELAY_TURNS" in os.environ:
    sys.meta_path.insert(0, _Patch())
