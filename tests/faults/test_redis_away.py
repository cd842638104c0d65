"""Redis is restarted, flushed or changed by hand: events arrive once, or clients get a notice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.clients import Block, Native, native, publish_ephemeral, redis, stream_key, until
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[tuple[Server, RelayProcess, Native]]:
    """Run a server, a relay and clients for one test, because these tests cannot share them."""
    server = Server(tmp_path, options=("--appendfsync", "always"))
    await asyncio.to_thread(server.start)
    relay = RelayProcess(server, settings=["redis.command_timeout_s=1"])
    try:
        await asyncio.to_thread(relay.start)
        async with native(relay) as door:
            yield server, relay, door
    finally:
        relay.kill()
        server.kill()


Site = tuple[Server, RelayProcess, Native]


async def test_a_restart_of_redis_is_told_and_loses_and_repeats_nothing(site: Site) -> None:
    """A loss cannot be excluded. Entries that Redis has kept arrive once and in order."""
    server, relay, door = site
    stream = await door.sse("a", "b")
    websocket = await door.ws("a")
    await websocket.next()
    expected = []
    for round_ in range(3):
        for number in range(10):
            relay.xadd("a", data=f"{round_}{number}" if round_ else str(number))
            expected.append(round_ * 10 + number)
        await asyncio.to_thread(server.restart)
    relay.xadd("a", data="99")
    expected.append(99)
    blocks: list[Block] = []
    while sum(block.event is None for block in blocks) < len(expected):
        blocks.append(await stream.next())
    assert [block.json() for block in blocks if block.event is None] == expected
    notices = [block for block in blocks if block.event is not None]
    assert {(block.event, block.json()["reason"]) for block in notices} == {
        ("relay:reset", "failover")
    }
    frames: list[dict[str, object]] = []
    while sum("data" in frame for frame in frames) < len(expected):
        frames.append(await websocket.next())
    assert [frame["data"] for frame in frames if "data" in frame] == expected
    assert {frame["notice"] for frame in frames if "data" not in frame} == {"reset"}
    assert await stream.quiet()
    assert relay.stop() == 0


async def test_a_frozen_redis_delays_and_loses_nothing(site: Site) -> None:
    server, relay, door = site
    stream = await door.sse("a")
    relay.xadd("a", data="0")
    server.freeze()
    # Longer than relay waits for a reply, so that it reconnects.
    await until(lambda: any("did not answer" in line for line in relay.log))
    server.thaw()
    relay.xadd("a", data="1")
    assert [block.json() for block in await stream.take(2)] == [0, 1]
    assert await stream.quiet()


async def test_a_flush_is_told_and_the_new_life_is_delivered(site: Site) -> None:
    server, relay, door = site
    stream, websocket = await door.sse("a"), await door.ws("a", "empty")
    await websocket.take(2)
    relay.xadd("a", data="0")
    await stream.next()
    await websocket.next()
    redis(server, "FLUSHALL")
    relay.xadd("a", data="1")
    relay.xadd("empty", data="2")
    notice, event = await stream.take(2)
    assert (notice.event, event.json()) == ("relay:reset", 1)
    told = await websocket.take(4)
    assert {each["channel"] for each in told if each.get("notice") == "reset"} == {"a", "empty"}
    assert sorted(each["data"] for each in told if "data" in each) == [1, 2]
    assert await stream.quiet()


@pytest.mark.parametrize("how", ["group", "all groups"])
async def test_a_group_that_an_operator_destroyed_is_made_again(site: Site, how: str) -> None:
    server, relay, door = site
    stream = await door.sse("a")
    relay.xadd("a", data="0")
    await stream.next()
    for group in redis(server, "XINFO", "GROUPS", stream_key("a")):
        name = group[b"name"]
        own = f"_{relay.port}".encode() in name
        if own or how != "group":
            redis(server, "XGROUP", "DESTROY", stream_key("a"), name)
    relay.xadd("a", data="1")
    relay.xadd("a", data="2")
    blocks = await stream.take(2)
    if blocks[0].event == "relay:reset":
        # The marker of the stream's life is lost too: a notice is allowed, silence is not.
        assert how != "group"
        blocks = [*blocks[1:], await stream.next()]
    assert [block.json() for block in blocks] == [1, 2]
    assert await stream.quiet()


async def test_a_foreign_key_hurts_only_its_channel(site: Site) -> None:
    server, relay, door = site
    good, bad = await door.sse("good"), await door.sse("bad")
    redis(server, "DEL", stream_key("bad"))
    redis(server, "SET", stream_key("bad"), "foreign")
    redis(server, "SET", stream_key("worse"), "foreign")
    # The stream may be repaired, so a browser is asked to reconnect.
    worse = await door.sse("worse")
    assert worse.opened is not None
    assert (worse.opened.comment, worse.opened.id) == (True, None)
    with pytest.raises(EOFError):
        await worse.block()
    for number in range(5):
        relay.xadd("good", data=str(number))
        assert (await good.next()).json() == number
    assert await door.status("/readyz") == 200
    redis(server, "DEL", stream_key("bad"))
    relay.xadd("bad", data="1")
    # The DEL before the SET may have been a separate life.
    *notices, event = await bad.take(2)
    if event.event is not None:
        notices, event = [*notices, event], await bad.next()
    assert {notice.event for notice in notices} == {"relay:reset"}
    assert event.json() == 1


async def test_killed_connections_lose_nothing(site: Site) -> None:
    server, relay, door = site
    stream = await door.sse("a", "b")
    ephemeral = await door.ws("a")
    await ephemeral.next()
    for number in range(5):
        relay.xadd("a", data=str(number))
        # Wait until the next kill finds new connections.
        await until(lambda: redis(server, "CLIENT", "KILL", "USER", "relay") >= 2)
        relay.xadd("a", data=str(number + 100))
        assert [block.json() for block in await stream.take(2)] == [number, number + 100]
    assert [each["data"] for each in await ephemeral.take(10)] == [
        part for number in range(5) for part in (number, number + 100)
    ]
    await publish_ephemeral(server, "a", '{"data":"live"}')
    assert (await ephemeral.next())["data"] == "live"
    assert await door.status("/readyz") == 200


async def test_tracking_turned_off_by_an_operator_is_noticed(site: Site) -> None:
    server, relay, door = site
    stream = await door.sse("a")
    # RESET by a proxy, or a bug: the connection is open, but no invalidation will arrive.
    redis(server, "ACL", "SETUSER", "relay", "-client|tracking")
    (link,) = [
        line.split()[0].removeprefix("id=")
        for line in redis(server, "CLIENT", "LIST").decode().splitlines()
        if " flags=t" in line or "flags=Pt" in line or "flags=tP" in line
    ]
    redis(server, "CLIENT", "KILL", "ID", link)
    relay.xadd("a", data="1")
    assert (await stream.next()).json() == 1
    await until(lambda: any("polling streams" in line for line in relay.log))
    relay.xadd("a", data="2")
    assert (await stream.next()).json() == 2


async def test_commands_given_while_the_relay_was_cut_off_are_obeyed(site: Site) -> None:
    server, _, door = site
    websocket = await door.ws("a")
    await websocket.next()
    redis(server, "ACL", "SETUSER", "relay", "off")
    redis(server, "CLIENT", "KILL", "USER", "relay")
    redis(server, "XADD", "relay:control", "*", "command", "disconnect", "user", "alice")
    redis(server, "ACL", "SETUSER", "relay", "on")
    _, code = await websocket.closed()
    assert code == 4403


async def test_a_revocation_while_the_relay_was_cut_off_precedes_what_was_missed(
    site: Site,
) -> None:
    server, relay, door = site
    stream = await door.sse("a")
    redis(server, "ACL", "SETUSER", "relay", "off")
    redis(server, "CLIENT", "KILL", "USER", "relay")
    redis(server, "HSET", "relay:rights:{a}", "alice", "-")
    redis(server, "XADD", stream_key("a"), "*", "revoke", "alice")
    relay.xadd("a", data='"secret"')
    redis(server, "ACL", "SETUSER", "relay", "on")
    (notice,) = await stream.ended()
    assert notice.event == "relay:revoked"
