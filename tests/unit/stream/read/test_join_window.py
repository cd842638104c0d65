"""Clients that join a stream at nearly the same time share its examination."""

from __future__ import annotations

import asyncio

import pytest

from relay.core.model import Channel, Principal
from relay.core.stream_interface import Followed
from relay.hub.feed import Feed
from relay.stream.read.join_window import JoinWindow
from tests.support.hub import Reads, Words, join, make_hub


def _feed(name: str) -> Feed:
    """Return a stream with a client that waits."""
    hub, channel = make_hub(Reads()), Channel(name)
    join(hub, Principal(user="ann"), Words(), channel)
    feed = hub.feed(channel)
    assert feed is not None
    return feed


class Clock:
    """The time of the running event loop, which only the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = 1000.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self._now)

    async def advance(self, seconds: float) -> None:
        self._now += seconds
        for _ in range(3):
            await asyncio.sleep(0)


async def test_the_first_client_does_not_wait_and_the_next_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    examined: list[Followed] = []
    window, news, other = JoinWindow(examined.append), _feed("news"), _feed("other")
    window.join(news)
    window.join(other)
    assert examined == [news, other]
    for _ in range(5):
        window.join(news)
    assert examined == [news, other]
    await clock.advance(0.03)
    # The stream was examined for those: the next window has begun.
    window.join(news)
    assert examined == [news, other, news]
    await clock.advance(0.03)
    assert examined == [news, other, news, news]


async def test_nothing_is_examined_without_a_waiting_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    examined: list[Followed] = []
    window, released, served, waiting = (
        JoinWindow(examined.append),
        _feed("released"),
        _feed("served"),
        _feed("waiting"),
    )
    for stream in (released, served, waiting) * 2:
        window.join(stream)
    window.discard(released)
    served.examine_request()  # for another reason
    await clock.advance(0.03)
    assert examined == [released, served, waiting, waiting]
    # A stream that was discarded may be followed again at once.
    window.join(released)
    assert examined[-1] is released
