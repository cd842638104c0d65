"""Open connections, the rate of a client's messages, and the wait for its first subscriptions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry, Gauge

from relay.core.clock import RedisClock
from relay.core.errors import Unavailable
from relay.core.model import Channel, Principal
from relay.doorkit.first_subscriptions import DeferredLog, FirstSubscriptions
from relay.doorkit.open_connections import OpenConnections
from relay.doorkit.rate_limit import RateLimit
from relay.hub.session import Session
from relay.protocols.native.settings import NativeSettings
from relay.protocols.native.sse_client import SseClient
from tests.support.hub import Reads, Words, examine, join, make_hub

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


def session_of(*channels: Channel) -> Session:
    session, _, _ = join(make_hub(Reads()), Principal(user="ann"), Words(), *channels)
    return session


async def test_the_wait_ends_when_all_channels_are_decided() -> None:
    first = FirstSubscriptions(lambda _: "", RedisClock())
    first.expect([NEWS, SPORT])
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(first.wait(session_of(NEWS, SPORT)))
        first.decide(NEWS)
        first.decide(NEWS)
        await asyncio.sleep(0)
        assert first.is_waiting
        first.decide(SPORT)


async def test_the_wait_ends_with_the_first_error() -> None:
    first = FirstSubscriptions(lambda _: "", RedisClock())
    first.expect([NEWS, SPORT])
    first.fail(Unavailable("one"))
    first.fail(Unavailable("two"))
    first.decide(NEWS)
    first.decide(SPORT)
    with pytest.raises(Unavailable, match="one"):
        await first.wait(session_of(NEWS, SPORT))


async def test_channels_that_cannot_be_read_are_not_waited_for() -> None:
    away = {SPORT}

    def not_reading(channels: Sequence[Channel]) -> str:
        return ", ".join(each for each in channels if each in away)

    first = FirstSubscriptions(not_reading, RedisClock())
    first.expect([NEWS, SPORT])
    session = session_of(NEWS, SPORT)
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(first.wait(session))
        while not first.away:
            await asyncio.sleep(0)
        assert not waiting.done()
        first.decide(NEWS)
    assert first.away == {SPORT: "sport"}
    sport, news = session.subscriptions[SPORT], session.subscriptions[NEWS]
    assert (sport.is_deferred, news.is_deferred) == (True, False)
    # The other server is lost while the client waits.
    first = FirstSubscriptions(not_reading, RedisClock())
    first.expect([NEWS, SPORT])
    async with asyncio.TaskGroup() as tasks:
        failing = tasks.create_task(_error(first, session))
        while not first.away:
            await asyncio.sleep(0)
        away.add(NEWS)
    assert failing.result() == "news"
    # Some clients can be used without any of these channels, if there is a server.
    first = FirstSubscriptions(lambda channels: ", ".join(channels), RedisClock())
    first.expect([NEWS, SPORT])
    await first.wait(session, needs_one=False)
    assert set(first.away) == {NEWS, SPORT}


def test_many_clients_without_a_channel_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    log = DeferredLog("Socket.IO")
    for number in range(1000):
        log.report({Channel(f"axr:{number}"): "Redis at one cannot be read"})
    log.report({SPORT: "Redis at two cannot be read"})
    lines = [record.getMessage() for record in caplog.records]
    assert ["without 1 of their channels" in line for line in lines] == [True, True]
    assert "axr:0 (Redis at one cannot be read)" in lines[0]
    assert "sport (Redis at two cannot be read)" in lines[1]


async def test_a_deferred_channel_that_is_rejected_before_the_response_ends_the_stream() -> None:
    away = {SPORT}
    first = FirstSubscriptions(
        lambda channels: ", ".join(each for each in channels if each in away), RedisClock()
    )
    first.expect([NEWS, SPORT])
    client = SseClient(first, NativeSettings())
    hub = make_hub(Reads())
    session = client.session = hub.open(Principal(user="ann"), Words(), client)
    for channel in (NEWS, SPORT):
        hub.subscribe(session, channel, None)
    examine(hub, NEWS)
    await first.wait(session)
    assert first.away
    # The server is read again before the request continues.
    examine(hub, SPORT, ann=b"-")
    assert session.closed


async def _error(first: FirstSubscriptions, session: Session) -> str:
    with pytest.raises(Unavailable) as caught:
        await first.wait(session)
    return str(caught.value)
