"""Open connections, the rate of a client's messages, and the wait for its first subscriptions."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry, Gauge

from relay.core.errors import Unavailable
from relay.core.model import Channel
from relay.doorkit.first_subscriptions import FirstSubscriptions
from relay.doorkit.open_connections import OpenConnections
from relay.doorkit.rate_limit import RateLimit

NEWS, SPORT = Channel("news"), Channel("sport")


async def test_a_stop_waits_for_the_last_connection() -> None:
    registry = CollectorRegistry()
    connections = OpenConnections(Gauge("open", "Open", registry=registry))
    await connections.wait_closed()
    connections.opened()
    connections.opened()
    assert registry.get_sample_value("open") == 2
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(connections.wait_closed())
        connections.closed()
        await asyncio.sleep(0)
        assert not waiting.done()
        connections.closed()
    assert registry.get_sample_value("open") == 0


def test_a_client_may_send_a_burst_and_then_its_rate() -> None:
    now = 0.0
    rate = RateLimit(2.0, 3, lambda: now)
    assert [rate.accept() for _ in range(4)] == [True, True, True, False]
    now = 60.0
    assert [rate.accept() for _ in range(4)] == [True, True, True, False]
    # What is rejected does not extend the time.
    for _ in range(1000):
        assert not rate.accept()
    now = 60.5
    assert [rate.accept() for _ in range(2)] == [True, False]


async def test_the_wait_ends_when_all_channels_are_decided() -> None:
    first = FirstSubscriptions()
    first.expect([NEWS, SPORT])
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(first.wait())
        first.decide(NEWS)
        first.decide(NEWS)
        await asyncio.sleep(0)
        assert first.is_waiting
        first.decide(SPORT)


async def test_the_wait_ends_with_the_first_error() -> None:
    first = FirstSubscriptions()
    first.expect([NEWS, SPORT])
    first.fail(Unavailable("one"))
    first.fail(Unavailable("two"))
    first.decide(NEWS)
    first.decide(SPORT)
    with pytest.raises(Unavailable, match="one"):
        await first.wait()
