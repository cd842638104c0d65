"""Resuming clients receive missed events, or a notice if events are unavailable."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.clients import Block, Native, native, redis, stream_key
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis

# Reasons for a connected client. The reason depends on whether relay examines the stream before or
# after the next append.
OTHER_LIFE = {"other_incarnation", "position_ahead"}


def _key(channel: str) -> str:
    return f"relay:stream:{{{channel}}}"


def _numbers(blocks: list[Block]) -> list[Any]:
    return [block.json() for block in blocks]


@pytest.mark.parametrize("where", ["header", "query"])
async def test_resume_gives_exactly_what_was_missed(
    relay: RelayProcess, door: Native, channel: str, where: str
) -> None:
    client = await door.sse(channel)
    for number in range(3):
        relay.xadd(channel, data=str(number))
    assert _numbers(await client.take(3)) == [0, 1, 2]
    client.drop()
    for number in range(3, 6):
        relay.xadd(channel, data=str(number))
    words = {"header": client.last_id} if where == "header" else {"last": client.last_id}
    client = await door.sse(channel, **words)  # type: ignore[arg-type]  # a str by now
    relay.xadd(channel, data="6")
    assert _numbers(await client.take(4)) == [3, 4, 5, 6]


async def test_header_wins_over_the_query(relay: RelayProcess, door: Native, channel: str) -> None:
    ids = [relay.xadd(channel, data=str(number)) for number in range(4)]
    client = await door.sse(channel, last=ids[0], header=ids[2])
    assert (await client.next()).json() == 3


@pytest.mark.parametrize("several", [False, True])
async def test_a_client_that_dropped_before_its_first_event_loses_nothing(
    relay: RelayProcess, door: Native, channel: str, several: bool
) -> None:
    names = [channel, f"{channel}-b"] if several else [channel]
    relay.xadd(channel, data="0")
    client = await door.sse(*names)
    client.drop()
    relay.xadd(channel, data="1")
    client = await door.sse(*names, header=client.last_id)
    assert (await client.next()).json() == 1


async def test_a_first_connect_begins_now(relay: RelayProcess, door: Native, channel: str) -> None:
    relay.xadd(channel, data="0")
    client = await door.sse(channel)
    relay.xadd(channel, data="1")
    assert (await client.next()).json() == 1


async def test_a_cursor_from_the_beginning_gives_everything(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    for number in range(3):
        relay.xadd(channel, data=str(number))
    client = await door.sse(channel, last="0-0")
    assert _numbers(await client.take(3)) == [0, 1, 2]


async def test_ids_are_numbers_and_not_text(door: Native, valkey: Server, channel: str) -> None:
    for entry in ("9-1", "10-2", "10-10", "100-0"):
        redis(valkey, "XADD", stream_key(channel), entry, "data", f'"{entry}"')
    client = await door.sse(channel, last="10-2")
    assert _numbers(await client.take(2)) == ["10-10", "100-0"]


async def test_a_channel_that_the_cursor_does_not_know_begins_now(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    old, new = f"{channel}-old", f"{channel}-new"
    client = await door.sse(old, f"{channel}-gone")
    client.drop()
    relay.xadd(old, data="1")
    relay.xadd(new, data='"before"')
    client = await door.sse(new, old, header=client.last_id)
    assert (await client.next()).json() == 1
    relay.xadd(new, data='"after"')
    assert (await client.next()).json() == "after"


@pytest.mark.parametrize("several", [False, True])
async def test_a_trimmed_past_is_told(
    relay: RelayProcess, door: Native, valkey: Server, channel: str, several: bool
) -> None:
    names = [channel, f"{channel}-b"] if several else [channel]
    client = await door.sse(*names)
    first = relay.xadd(channel, data="0")
    await client.next()
    client.drop()
    ids = [relay.xadd(channel, data=str(number)) for number in range(1, 6)]
    redis(valkey, "XTRIM", stream_key(channel), "MAXLEN", "2")
    client = await door.sse(*names, header=client.last_id)
    notice, *events = await client.take(3)
    assert notice.event == "relay:gap"
    assert notice.json() == {
        "channel": channel, "from": first, "to": ids[3], "reason": "trimmed",
    }  # fmt: skip
    assert _numbers(events) == [4, 5]
    # With several channels, a cursor for each notice would be too much work.
    assert (notice.id is None) == several


async def test_a_trim_of_what_the_client_has_seen_is_no_gap(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    client = await door.sse(channel, f"{channel}-b")
    for number in range(3):
        relay.xadd(channel, data=str(number))
    await client.take(3)
    client.drop()
    relay.xadd(channel, data="3")
    redis(valkey, "XTRIM", stream_key(channel), "MAXLEN", "1")
    client = await door.sse(channel, f"{channel}-b", header=client.last_id)
    assert (await client.next()).json() == 3


async def test_a_deleted_entry_is_told(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    ids = [relay.xadd(channel, data=str(number)) for number in range(4)]
    redis(valkey, "XDEL", stream_key(channel), ids[2])
    client = await door.sse(channel, last=ids[0])
    notice, *events = await client.take(3)
    assert notice.event == "relay:gap"
    assert notice.json()["reason"] == "deleted"
    assert notice.json()["from"] == ids[0]
    assert _numbers(events) == [1, 3]


async def test_a_deleted_stream_is_told_and_the_new_one_is_delivered_whole(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    client = await door.sse(channel, f"{channel}-b")
    relay.xadd(channel, data="0")
    await client.next()
    client.drop()
    redis(valkey, "DEL", stream_key(channel))
    relay.xadd(channel, data="1")
    client = await door.sse(channel, f"{channel}-b", header=client.last_id)
    notice, event = await client.take(2)
    assert notice.event == "relay:reset"
    assert notice.json()["reason"] == "other_incarnation"
    assert event.json() == 1


async def test_an_empty_past_of_another_life_is_told(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    client = await door.sse(channel)
    client.drop()
    relay.xadd(channel, data='"lost"')
    redis(valkey, "DEL", stream_key(channel))
    relay.xadd(channel, data="1")
    client = await door.sse(channel, header=client.last_id)
    notice, event = await client.take(2)
    assert notice.event == "relay:reset"
    assert notice.json()["reason"] == "other_incarnation"
    assert event.json() == 1


async def test_a_live_client_is_told_of_a_deleted_stream(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    client = await door.sse(channel)
    relay.xadd(channel, data="0")
    await client.next()
    redis(valkey, "DEL", stream_key(channel))
    relay.xadd(channel, data="1")
    notice, event = await client.take(2)
    assert notice.event == "relay:reset"
    assert notice.json()["reason"] in OTHER_LIFE
    assert event.json() == 1
    client.drop()
    client = await door.sse(channel, header=notice.id)
    assert (await client.next()).json() == 1


@pytest.mark.parametrize(
    ("asked", "reason"),
    [("99999999999999-0", "position_ahead"), ("{}-7", "unknown_position")],
)
async def test_a_position_that_the_stream_never_had_is_told(
    relay: RelayProcess, door: Native, channel: str, asked: str, reason: str
) -> None:
    ms = relay.xadd(channel, data="0").partition("-")[0]
    redis(relay.server, "XADD", stream_key(channel), f"{ms}-9", "data", "1")
    client = await door.sse(channel, last=asked.format(ms))
    notice = await client.next()
    assert notice.event == "relay:reset"
    assert notice.json()["reason"] == reason


async def test_who_drops_right_after_a_notice_is_told_again(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    ids = [relay.xadd(channel, data=str(number)) for number in range(4)]
    redis(valkey, "XTRIM", stream_key(channel), "MAXLEN", "1")
    for _ in range(2):
        client = await door.sse(channel, last=ids[0])
        assert (await client.next()).event == "relay:gap"
        assert client.last_id is not None
        client.drop()


async def test_resume_over_a_restart_of_the_relay(valkey: Server, channel: str) -> None:
    relay = RelayProcess(valkey).start()
    try:
        async with native(relay) as door:
            one = await door.sse(channel)
            many = await door.sse(channel, f"{channel}-b")
            relay.xadd(channel, data="0")
            assert (await one.next()).json() == (await many.next()).json() == 0
            relay.kill()
            relay.xadd(channel, data="1")
            relay.xadd(f"{channel}-b", data="1")
            relay.start()
            one = await door.sse(channel, header=one.last_id)
            many = await door.sse(channel, f"{channel}-b", header=many.last_id)
            relay.xadd(channel, data="2")
            assert _numbers(await one.take(2)) == [1, 2]
            assert sorted(_numbers(await many.take(3))) == [1, 1, 2]
    finally:
        relay.kill()


async def test_flushall_is_told_to_live_clients_and_to_who_resumes(valkey: Server) -> None:
    relay = RelayProcess(valkey).start()
    try:
        async with native(relay) as door:
            live = await door.sse("flushed")
            relay.xadd("flushed", data="0")
            await live.next()
            away = await door.sse("flushed", "other")
            away.drop()
            redis(valkey, "FLUSHALL")
            relay.xadd("flushed", data="1")
            notice, event = await live.take(2)
            assert notice.event == "relay:reset"
            assert notice.json()["reason"] in OTHER_LIFE
            assert event.json() == 1
            back = await door.sse("flushed", "other", header=away.last_id)
            blocks = await back.take(3)
            resets = [block for block in blocks if block.event == "relay:reset"]
            assert {block.json()["channel"] for block in resets} == {"flushed", "other"}
            assert [block.data for block in blocks if block.event is None] == ["1"]
    finally:
        relay.kill()


async def test_a_gap_up_to_the_end_of_a_stream_is_reported_once(
    relay: RelayProcess, valkey: Server, door: Native, channel: str
) -> None:
    first, *_ = [relay.xadd(channel, data=str(number)) for number in range(3)]
    redis(valkey, "XTRIM", stream_key(channel), "MAXLEN", "0")
    resumed = await door.sse(channel, last=first)
    assert (await resumed.next()).event == "relay:gap"
    relay.xadd(channel, data="3")
    assert (await resumed.next()).json() == 3
