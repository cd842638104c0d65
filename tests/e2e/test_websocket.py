"""The JSON websocket on a running relay: commands, errors, limits and close codes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

from tests.support.clients import Native, native, redis, stream_key
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def strict(valkey: Server) -> Iterator[RelayProcess]:
    """Run a relay with small limits."""
    settings = [
        "channels_per_connection=2",
        "ws_max_frame_bytes=1024",
        "commands_per_s=5",
        "heartbeat_s=1",
        "pong_timeout_s=1",
    ]
    process = RelayProcess(
        valkey,
        settings=["hub.connections_per_user=2", *(f"protocol:native.{each}" for each in settings)],
    ).start()
    yield process
    process.kill()


async def test_subscribe_is_answered_with_the_position_that_events_follow(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    client = await door.ws()
    before = relay.xadd(channel, data="0")
    reply = await client.ask(cmd="subscribe", channel=channel, ref=7)
    position = reply.pop("id")
    assert reply == {"reply": "subscribe", "ref": 7, "channel": channel}
    entry = relay.xadd(channel, data='{"a":1.0}', type="note", client="page-1")
    assert await client.next() == {
        "channel": channel, "id": entry, "type": "note", "data": {"a": 1.0}, "client": "page-1",
    }  # fmt: skip
    text = relay.xadd(channel, data="<xml/>\r\n")
    assert await client.next() == {"channel": channel, "id": text, "data": "<xml/>\r\n"}
    # A client can resume from the position in the reply or from the ID of any event.
    for last, first in ((position, entry), (entry, text), (before, entry)):
        other = await door.ws()
        await other.ask(cmd="subscribe", channel=channel, last_event_id=last)
        assert (await other.next())["id"] == first


async def test_query_channels_are_subscribed_and_resumed_by_cursor(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    names = [f"{channel}-a", f"{channel}-b"]
    client = await door.ws(*names)
    replies = await client.take(2)
    assert {reply["channel"] for reply in replies} == set(names)
    assert all(reply["reply"] == "subscribe" and reply["ref"] is None for reply in replies)
    await client.socket.close()
    for name in names:
        relay.xadd(name, data='"missed"')
    parts = [reply["id"].removeprefix("c1.") for reply in replies]
    client = await door.ws(*names, last="c1." + ".".join(parts))
    found = await client.take(4)
    events = [each for each in found if "data" in each]
    assert sorted(each["channel"] for each in events) == names
    assert all(each["data"] == "missed" for each in events)


@pytest.mark.parametrize("ref", ["a", "x" * 200, 0, -1, 2**53 - 1, 1.5])
async def test_a_ref_comes_back(door: Native, ref: object) -> None:
    client = await door.ws()
    assert await client.ask(cmd="ping", ref=ref) == {"reply": "ping", "ref": ref}


async def test_null_is_no_ref(door: Native) -> None:
    client = await door.ws()
    assert await client.ask(cmd="ping", ref=None) == {"reply": "ping", "ref": None}
    assert await client.ask(cmd="ping") == {"reply": "ping", "ref": None}


async def test_unsubscribe_ends_the_events_of_one_channel(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    kept = f"{channel}-kept"
    client = await door.ws(channel, kept)
    await client.take(2)
    assert await client.ask(cmd="unsubscribe", channel=channel, ref="u") == {
        "reply": "unsubscribe", "ref": "u", "channel": channel,
    }  # fmt: skip
    relay.xadd(channel, data="1")
    relay.xadd(kept, data="2")
    assert (await client.next())["channel"] == kept
    # Subscribe again, with a position.
    await client.send(cmd="subscribe", channel=channel, last_event_id="0-0", ref="s")
    assert (await client.next())["ref"] == "s"
    assert (await client.next())["data"] == 1


async def test_resume_by_the_last_id(relay: RelayProcess, door: Native, channel: str) -> None:
    client = await door.ws(channel)
    await client.next()
    relay.xadd(channel, data="0")
    last = (await client.next())["id"]
    await client.socket.close()
    relay.xadd(channel, data="1")
    client = await door.ws(channel, last=last)
    reply, event = await client.take(2)
    assert (reply["reply"], event["data"]) == ("subscribe", 1)


async def test_a_gap_is_a_notice(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    ids = [relay.xadd(channel, data=str(number)) for number in range(4)]
    redis(valkey, "XTRIM", stream_key(channel), "MAXLEN", 1)
    client = await door.ws(channel, last=ids[0])
    reply, notice, event = await client.take(3)
    assert reply["reply"] == "subscribe"
    assert notice == {
        "notice": "gap", "channel": channel, "from": ids[0], "to": ids[3], "reason": "trimmed",
    }  # fmt: skip
    assert event["data"] == 3
    redis(valkey, "DEL", stream_key(channel))
    assert (await client.next())["notice"] == "reset"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ({"cmd": "subscribe"}, "bad_request"),
        ({"cmd": "subscribe", "channel": 1}, "bad_request"),
        ({"cmd": "subscribe", "channel": "x", "lastEventId": "0-0"}, "bad_request"),
        ({"cmd": "subscribe", "channel": "x", "last_event_id": "never"}, "bad_request"),
        ({"cmd": "unsubscribe", "channel": "never-subscribed"}, "bad_request"),
        ({"cmd": "refresh", "token": "bad"}, "unauthorized"),
        ({"cmd": "refresh"}, "bad_request"),
        ({"cmd": "shout"}, "bad_request"),
    ],
)
async def test_a_mistake_is_answered_and_the_connection_stays(
    door: Native, command: dict[str, Any], code: str
) -> None:
    client = await door.ws()
    answer = await client.ask(**command, ref="r")
    assert answer["error"]["code"] == code
    assert answer["error"]["message"]
    assert answer["ref"] == "r"
    if isinstance(command.get("channel"), str):
        assert answer["channel"] == command["channel"]
    assert (await client.ask(cmd="ping"))["reply"] == "ping"


@pytest.mark.parametrize("text", ["no json", "[]", "1", '{"cmd":"ping","cmd":"ping"}', "{}"])
async def test_the_third_frame_that_is_no_command_closes_with_4400(door: Native, text: str) -> None:
    client = await door.ws()
    for _ in range(3):
        await client.socket.send_str(text)
    said, code = await client.closed()
    assert [each["error"]["code"] for each in said] == ["bad_request"] * 3
    assert code == 4400


async def test_a_second_subscribe_to_a_channel_is_refused(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    client = await door.ws(channel)
    await client.next()
    answer = await client.ask(cmd="subscribe", channel=channel, ref=1)
    assert answer["error"]["code"] == "bad_request"
    relay.xadd(channel, data="1")
    relay.xadd(channel, data="2")
    assert [each["data"] for each in await client.take(2)] == [1, 2]


async def test_a_refused_subscribe_leaves_the_others(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    secret = f"{channel}-secret"
    client = await door.ws(channel, secret, token=relay.token(channels=[channel]))
    said = await client.take(2)
    (error,) = [each for each in said if "error" in each]
    assert (error["error"]["code"], error["channel"]) == ("forbidden", secret)
    relay.xadd(channel, data="1")
    assert (await client.next())["data"] == 1


async def test_a_pattern_is_no_channel_to_follow(door: Native, channel: str) -> None:
    client = await door.ws(channel, "team:*")
    error = (await client.next())["error"]
    assert error["code"] == "bad_request"
    assert "'team:*' is a pattern" in error["message"]
    error = (await client.ask(cmd="subscribe", channel="*"))["error"]
    assert error["code"] == "bad_request"
    assert (await client.ask(cmd="ping"))["reply"] == "ping"


async def test_several_query_channels_need_a_cursor(door: Native, channel: str) -> None:
    client = await door.ws(channel, f"{channel}-b", last="1-1")
    answer = await client.next()
    assert answer["error"]["code"] == "bad_request"
    assert answer["ref"] is None


async def test_a_bad_token_is_told_in_the_websocket_and_closes_with_4401(door: Native) -> None:
    client = await door.ws("any", token="bad")
    said, code = await client.closed()
    assert [each["error"]["code"] for each in said] == ["unauthorized"]
    assert code == 4401


async def test_a_plain_get_is_told_to_upgrade(door: Native) -> None:
    answer = await door.get("/ws")
    assert answer.status == 426
    assert answer.headers["Upgrade"] == "websocket"


async def test_binary_closes_with_1003(door: Native) -> None:
    client = await door.ws()
    await client.socket.send_bytes(b'{"cmd":"ping"}')
    assert (await client.closed())[1] == 1003


async def test_text_that_is_not_utf8_closes_with_1007(door: Native) -> None:
    client = await door.ws()
    await client.socket.send_frame(b"\xff\xfe", aiohttp.WSMsgType.TEXT)
    assert (await client.closed())[1] == 1007


async def test_a_frame_too_large_closes_with_1009(door: Native) -> None:
    client = await door.ws()
    await client.socket.send_str(" " * 65537)
    assert (await client.closed())[1] == 1009


async def test_a_large_frame_of_the_allowed_size_is_read(door: Native) -> None:
    client = await door.ws()
    text = json.dumps({"cmd": "ping", "ref": "r"})
    await client.socket.send_str(text + " " * (65536 - len(text)))
    assert (await client.next())["ref"] == "r"


async def test_one_channel_too_many_is_refused(strict: RelayProcess, channel: str) -> None:
    async with native(strict, user=channel) as door:
        client = await door.ws(f"{channel}1", f"{channel}2")
        await client.take(2)
        answer = await client.ask(cmd="subscribe", channel=f"{channel}3", ref=3)
        assert (answer["error"]["code"], answer["ref"]) == ("limit_exceeded", 3)
        await client.ask(cmd="unsubscribe", channel=f"{channel}1")
        assert "reply" in await client.ask(cmd="subscribe", channel=f"{channel}3")
        many = await door.ws("a", "b", "c")
        assert (await many.next())["error"]["code"] == "limit_exceeded"


async def test_too_many_connections_of_one_user(strict: RelayProcess, channel: str) -> None:
    async with native(strict, user=channel) as door:
        clients = [await door.ws(), await door.ws()]
        said, code = await (await door.ws()).closed()
        assert [each["error"]["code"] for each in said] == ["limit_exceeded"]
        assert code == 4429
        answer = await door.get(f"/sse?channel=x&token={door.token}")
        assert (answer.status, answer.error["code"]) == (429, "limit_exceeded")
        # The limit does not affect other users. A client that disconnects makes room.
        other = await door.ws(token=strict.token(f"{channel}-other"))
        assert (await other.ask(cmd="ping"))["reply"] == "ping"
        await clients[0].socket.close()
        async with asyncio.timeout(30):
            while "reply" not in await (await door.ws()).ask(cmd="ping"):
                pass


async def test_commands_too_fast_close_with_4429(strict: RelayProcess, channel: str) -> None:
    async with native(strict, user=channel) as door:
        client = await door.ws()
        # More than relay accepts in the time in which a busy machine sends them.
        with suppress(ConnectionError):
            for _ in range(2000):
                await client.send(cmd="ping")
        said, code = await client.closed()
        assert code == 4429
        assert said[-1]["error"]["code"] == "limit_exceeded"
        assert 20 <= len([each for each in said if "reply" in each]) < 2000


async def test_who_does_not_answer_pings_is_closed_with_4408(
    strict: RelayProcess, channel: str
) -> None:
    async with native(strict, user=channel) as door, asyncio.TaskGroup() as tasks:
        silent = await door.ws(channel, autoping=False)
        lively = await door.ws(channel)
        await lively.next()
        # aiohttp answers pings only while receive() is waiting.
        event = tasks.create_task(lively.next())
        async with asyncio.timeout(30):
            while (message := await silent.socket.receive()).type is not aiohttp.WSMsgType.CLOSE:
                assert message.type in (aiohttp.WSMsgType.PING, aiohttp.WSMsgType.TEXT)
        assert message.data == 4408
        strict.xadd(channel, data="1")
        assert (await event)["data"] == 1


async def test_resume_over_a_restart(valkey: Server, channel: str) -> None:
    relay = RelayProcess(valkey).start()
    try:
        async with native(relay) as door:
            client = await door.ws(channel)
            position = (await client.next())["id"]
            async with asyncio.TaskGroup() as tasks:
                stopped = tasks.create_task(asyncio.to_thread(relay.stop))
                said, code = await client.closed()
            assert stopped.result() == 0
            assert (said, code) == ([{"notice": "closing", "reason": "stopping"}], 1001)
            relay.xadd(channel, data="1")
            relay.start()
            client = await door.ws(channel, last=position)
            reply, event = await client.take(2)
            assert (reply["reply"], event["data"]) == ("subscribe", 1)
    finally:
        relay.kill()
