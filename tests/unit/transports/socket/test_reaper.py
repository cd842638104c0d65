"""One timer aborts connections that do not close in time."""

from __future__ import annotations

import asyncio

from relay.transports.socket.reaper import Reaper
from tests.unit.transports.serving import Run


class Socket:
    carrier = None

    def __init__(self) -> None:
        self.aborted = asyncio.Event()
        self.at = 0.0

    def abort(self) -> None:
        self.at = asyncio.get_running_loop().time()
        self.aborted.set()


def test_each_connection_is_aborted_at_its_deadline_unless_it_has_closed(run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        reaper = Reaper(grace_s=0.1)
        first, closed, second = Socket(), Socket(), Socket()
        begin = loop.time()
        reaper.watch(first)
        reaper.watch(closed)
        await asyncio.sleep(0.05)
        reaper.watch(first)
        reaper.watch(second)
        reaper.forget(closed)
        assert len(reaper) == 2
        await second.aborted.wait()
        assert 0.09 <= first.at - begin < second.at - begin
        assert second.at - begin >= 0.14
        assert not closed.aborted.is_set()
        assert len(reaper) == 0

    run(main())


def test_connections_that_closed_in_time_are_not_aborted(run: Run) -> None:
    async def main() -> None:
        reaper = Reaper(grace_s=0.01)
        one, two = Socket(), Socket()
        reaper.watch(one)
        reaper.forget(one)
        reaper.forget(one)
        await asyncio.sleep(0.03)
        assert not one.aborted.is_set()
        reaper.watch(two)
        await two.aborted.wait()

    run(main())
