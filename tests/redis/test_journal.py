"""The journal: what it stores in Redis, and what strangers and a slow Redis can make of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from redis.asyncio import Redis

from relay.core.connection import ConnectionInfo
from relay.core.model import Principal
from relay.inspect.journal import Journal
from relay.inspect.journal_reader import EventFilter, JournalReader
from relay.stream.format.keys import Keys
from relay.stream.shards.links import ShardLinks
from relay.stream.shards.making import shard_map
from tests.support.hub import Client, Outbox, Reads, Words, make_hub
from tests.support.valkey import Server

pytestmark = pytest.mark.redis

NAME = "web1:5f0c9a31"


@pytest.fixture
async def links(server: Server) -> AsyncIterator[ShardLinks]:
    settings = server.settings()
    links = ShardLinks(shard_map(settings), settings)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(links.run())
        await links.wait_open()
        yield links
        running.cancel()


def journal(links: ShardLinks, keys: Keys, events: int = 1000) -> Journal:
    return Journal(
        links=links,
        keys=keys,
        instance=NAME,
        events=events,
        now_ms=lambda: time.time() * 1000,
    )


async def test_events_of_a_client_are_read_in_order_and_expire(
    links: ShardLinks, admin: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "relay.inspect.journal")
    written = journal(links, keys)
    hub = make_hub(Reads())
    hub.observer = written
    info = ConnectionInfo("10.1.2.3", {"User-Agent": "Seafile/9.0.4"})
    session = hub.open(Principal(user="ann"), Words(), Client(), info)
    session.attach(Outbox())
    session.end()
    written.turned_away(ConnectionInfo("10.9.9.9"), "native", "unauthorized", "the token is old")
    # The log has the same life of the client.
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[:2] for line in lines[:2]] == [
        ["Connected", info.id],
        ["Disconnected", info.id],
    ]
    assert "the token is old" in lines[2]
    await written.flush()
    reader = JournalReader(admin, keys)
    first, second = await reader.newest(EventFilter(user="ann"), 10)
    assert (first["event"], second["event"]) == ("connected", "disconnected")
    assert first["connection"] == second["connection"] == info.id
    assert first["agent"] == "Seafile/9.0.4"
    assert second["reason"] == "connection ended"
    (stranger,) = await reader.newest(EventFilter(event="rejected"), 10)
    assert (stranger["reason"], stranger["address"]) == ("unauthorized", "10.9.9.9")
    assert 0 < await admin.ttl(keys.journal(NAME)) <= 3600
    # `read` continues.
    written.turned_away(ConnectionInfo("10.9.9.9"), "native", "unauthorized")
    await written.flush()
    assert [each["event"] for each in await reader.read(EventFilter())] == ["rejected"]
    assert await reader.read(EventFilter()) == []


async def test_a_stranger_cannot_fill_the_journal(
    links: ShardLinks, admin: Redis, keys: Keys
) -> None:
    written = journal(links, keys)
    for number in range(5000):
        written.turned_away(ConnectionInfo("10.0.0.7"), "native", "unauthorized", f"{number}")
    # Nor can many addresses, which one IPv6 host has.
    for number in range(5000):
        written.turned_away(ConnectionInfo(f"2001:db8::{number:x}"), "native", "unauthorized")
    for number in range(20_000):
        written.turned_away(ConnectionInfo(f"10.1.{number // 250}.{number % 250}"), "native", "x")
    await written.flush()
    found = await JournalReader(admin, keys).newest(EventFilter(), 100_000)
    assert sum(each["address"] == "10.0.0.7" for each in found) == 10
    assert sum(each["address"].startswith("2001:db8::") for each in found) == 10
    assert len(found) < 1200
    # What was suppressed is written as a number.
    written._sweep(time.monotonic() + 61)
    await written.flush()
    found = await JournalReader(admin, keys).newest(EventFilter(), 100_000)
    (same,) = [each for each in found if "similar" in each and each["address"] == "10.0.0.7"]
    assert same["similar"] == 4990


async def test_it_is_bounded_and_counts_what_a_lost_redis_did_not_get(
    links: ShardLinks, admin: Redis, server: Server, keys: Keys
) -> None:
    written = journal(links, keys, events=500)
    hub = make_hub(Reads())
    hub.observer = written
    for _ in range(40):
        for _ in range(100):
            info = ConnectionInfo("10.1.2.3")
            session = hub.open(Principal(user="ann"), Words(), Client(), info)
            session.attach(Outbox())
        await written.flush()
    # Redis trims whole nodes of its list, so the limit is approximate.
    assert await admin.xlen(keys.journal(NAME)) <= 100
    lost = journal(ShardLinks(shard_map(server.settings()), server.settings()), keys)
    hub.observer = lost
    for session in hub.sessions()[:7]:
        session.end()
    await lost.flush()
    assert lost.dropped == 7


async def test_a_journal_whose_first_append_failed_is_found_at_once(
    links: ShardLinks, admin: Redis, server: Server, keys: Keys
) -> None:
    settings = server.settings()
    closed = ShardLinks(shard_map(settings), settings)
    written = journal(closed, keys)
    written.turned_away(ConnectionInfo("10.9.9.9"), "native", "unauthorized")
    await written.flush()
    assert written.dropped == 1
    written._links = links
    written.turned_away(ConnectionInfo("10.9.9.9"), "native", "unauthorized")
    await written.flush()
    found = await JournalReader(admin, keys).newest(EventFilter(), 10)
    assert [each["event"] for each in found] == ["rejected", "dropped"]


async def until(found: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(30):
        while not await found():
            await asyncio.sleep(0.02)


async def test_many_events_during_an_outage_do_not_end_the_journal(
    links: ShardLinks, admin: Redis, server: Server, keys: Keys
) -> None:
    written = journal(links, keys)
    hub = make_hub(Reads())
    hub.observer = written
    settings = server.settings()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(written.run())
        await until(lambda: admin.xlen(keys.journal(NAME)))
        written._links = ShardLinks(shard_map(settings), settings)
        # More than one append has.
        for _ in range(2500):
            hub.open(Principal(user="ann"), Words(), Client(), ConnectionInfo()).attach(Outbox())
        async with asyncio.timeout(30):
            while not written.dropped:
                await asyncio.sleep(0.02)
        written._links = links
        hub.open(Principal(user="bob"), Words(), Client(), ConnectionInfo()).attach(Outbox())
        reader = JournalReader(admin, keys)
        await until(lambda: reader.newest(EventFilter(user="bob"), 1))
        running.cancel()


async def test_a_missing_right_is_logged(
    server: Server, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    settings = server.settings("maintenance")
    links = ShardLinks(shard_map(settings), settings)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(links.run())
        await links.wait_open()
        # This user has no right to `EXPIRE`.
        written = journal(links, keys)
        written.turned_away(ConnectionInfo("10.9.9.9"), "native", "unauthorized")
        await written.flush()
        running.cancel()
    assert written.dropped == 1
    assert "Could not append to the journal" in caplog.text
    assert "docs/redis.md" in caplog.text
