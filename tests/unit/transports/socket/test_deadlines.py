"""Deadlines share one timer: each item is due at its time, unless it was removed."""

from __future__ import annotations

import asyncio

from relay.transports.socket.deadlines import Deadlines
from tests.unit.transports.serving import Run


def test_each_item_is_due_once_in_the_order_of_deadlines(run: Run) -> None:
    async def main() -> None:
        due: list[str] = []
        done = asyncio.Event()

        def on_due(item: str) -> None:
            due.append(item)
            if item == "last":
                done.set()

        waiting = Deadlines(0.05, on_due)
        for item in ("again", "one", "removed", "two"):
            waiting.add(item)
        waiting.remove("removed")
        waiting.remove("never there")
        await asyncio.sleep(0.01)
        # Its time starts again.
        waiting.add("again")
        waiting.add("last")
        assert "one" in waiting
        assert len(waiting) == 4
        await done.wait()
        assert due == ["one", "two", "again", "last"]
        assert not len(waiting)
        assert waiting._timer is None

    run(main())


def test_a_callback_may_change_other_items(run: Run) -> None:
    async def main() -> None:
        due: list[str] = []
        done = asyncio.Event()

        def on_due(item: str) -> None:
            due.append(item)
            if item == "first":
                waiting.remove("second")
                waiting.add("third")
            else:
                done.set()

        waiting = Deadlines(0.01, on_due)
        waiting.add("first")
        waiting.add("second")
        await done.wait()
        assert due == ["first", "third"]
        waiting.add("fourth")
        waiting.remove("fourth")
        assert waiting._timer is None

    run(main())
