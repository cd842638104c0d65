"""Server-sent events on a running relay: delivery, heartbeats and rejections."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.clients import Block, Native, Refused, SseClient, native
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis


def _key(channel: str) -> str:
    return f"relay:stream:{{{channel}}}"


def _numbers(blocks: list[Block]) -> list[Any]:
    return [block.json() for block in blocks]


async def _resumed(door: Native, client: SseClient, *channels: str) -> SseClient:
    client.drop()
    return await door.sse(*channels, header=client.last_id)


async def test_an_event_arrives_with_its_stream_id_type_and_data(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    client = await door.sse(channel)
    first = relay.xadd(channel, data='{"big":12345678901234567890,"f":1.0}', type="note")
    second = relay.xadd(channel, data="<xml/>")
    blocks = await client.take(2)
    assert [(block.id, block.event, block.data) for block in blocks] == [
        (first, "note", '{"big":12345678901234567890,"f":1.0}'),
        (second, None, "<xml/>"),
    ]


async def test_head_says_event_stream_that_nothing_may_hold_back(
    door: Native, channel: str
) -> None:
    client = await door.sse(channel)
    # Python's clients take text without a charset for Latin-1.
    assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
    # Proxies that compress hold events back.
    assert client.headers["cache-control"] == "no-store, no-transform"
    assert client.headers["x-accel-buffering"] == "no"


async def test_first_block_has_jittered_retry_and_a_position(door: Native, channel: str) -> None:
    clients = [await door.sse(channel) for _ in range(6)]
    retries = {client.retry_ms for client in clients}
    assert all(retry is not None and 1000 <= retry <= 3000 for retry in retries)
    assert len(retries) > 1
    assert all(client.opened.id and client.opened.event == "relay:open" for client in clients)


async def test_data_of_many_lines_arrives_as_lines(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    client = await door.sse(channel)
    relay.xadd(channel, data="one\ntwo\r\nthree\rfour\n")
    assert (await client.next()).data == "one\ntwo\nthree\nfour\n"


async def test_a_type_that_would_forge_a_notice_is_a_dead_letter(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    client = await door.sse(channel)
    relay.xadd(channel, data="1", type="relay:gap")
    relay.xadd(channel, data="2", type="a\ndata: forged")
    relay.xadd(channel, data="3")
    block = await client.next()
    assert (block.event, block.data) == (None, "3")


async def test_envelope_shows_channel_id_type_and_client_without_an_event_line(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    client = await door.sse(channel, envelope="1")
    opened = client.opened
    assert opened.event == "relay:open"
    assert opened.json() == {
        "retry_ms": client.retry_ms,
        "channels": [{"channel": channel, "id": "0-0"}],
    }
    entry = relay.xadd(channel, data='"a\\r\\nb"', type="note", client="page-1")
    block = await client.next()
    assert (block.event, block.id) == (None, entry)
    assert block.json() == {
        "channel": channel, "id": entry, "type": "note", "data": "a\r\nb", "client": "page-1",
    }  # fmt: skip
    text = relay.xadd(channel, data="no json\r\n")
    assert (await client.next()).json() == {"channel": channel, "id": text, "data": "no json\r\n"}


async def test_without_envelope_a_client_named_by_the_entry_leaves_the_data_alone(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    client = await door.sse(channel)
    relay.xadd(channel, data='{"a":1}', client="page-1")
    assert (await client.next()).data == '{"a":1}'


async def test_several_channels_share_one_stream_and_one_cursor(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    names = [f"{channel}{index}" for index in range(3)]
    client = await door.sse(*names)
    for index, name in enumerate(names):
        relay.xadd(name, data=str(index))
        block = await client.next()
        assert block.json() == index
        assert block.id is not None
        assert block.id.startswith("c1.")
        assert len(block.id) <= 3 + 40 * len(names)
    for index, name in enumerate(names):
        relay.xadd(name, data=str(10 + index))
    client = await _resumed(door, client, *names)
    assert sorted(_numbers(await client.take(3))) == [10, 11, 12]


async def test_several_channels_with_envelopes_tell_them_apart(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    names = [f"{channel}1", f"{channel}2"]
    client = await door.sse(*names, envelope="1")
    assert [each["channel"] for each in client.opened.json()["channels"]] == names
    relay.xadd(names[1], data="1")
    block = await client.next()
    assert block.json()["channel"] == names[1]
    assert block.id is not None
    assert block.id.startswith("c1.")


async def test_a_quiet_stream_has_heartbeats(valkey: Server, channel: str) -> None:
    relay = RelayProcess(valkey, settings=["protocol:native.heartbeat_s=1"]).start()
    try:
        async with native(relay) as door:
            client = await door.sse(channel)
            for _ in range(2):
                beat = await client.block(3)
                assert beat.comment
                assert (beat.id, beat.data) == (None, None)
    finally:
        relay.kill()


async def test_retry_is_configured(valkey: Server, channel: str) -> None:
    relay = RelayProcess(valkey, settings=["protocol:native.retry_ms=100000"]).start()
    try:
        async with native(relay) as door:
            client = await door.sse(channel)
            assert client.retry_ms is not None
            assert 50_000 <= client.retry_ms <= 150_000
    finally:
        relay.kill()


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/sse?token={token}", 400, "bad_request"),
        ("/sse?channel=&token={token}", 400, "bad_request"),
        ("/sse?channel=team:*&token={token}", 400, "bad_request"),
        ("/sse?channel=a&channel=*&token={token}", 400, "bad_request"),
        ("/sse?channel=a&lastId=1-1&token={token}", 400, "bad_request"),
        ("/sse?channel=a&x=1700000000000-0&token={token}", 400, "bad_request"),
        ("/sse?channel=a&token=bad", 401, "unauthorized"),
        ("/sse?channel=a", 403, "forbidden"),
        ("/sse?token={token}" + "&channel=%s" * 129 % tuple(range(129)), 429, "limit_exceeded"),
    ],
)  # fmt: skip
async def test_refusals_are_json_with_their_status(
    door: Native, path: str, status: int, code: str
) -> None:
    answer = await door.get(path.format(token=door.token))
    assert answer.status == status
    assert answer.error["code"] == code
    assert answer.error["message"]
    assert "application/json" in answer.headers["Content-Type"]
    assert door.token not in answer.body.decode()


@pytest.mark.parametrize("last", ["c6a0b5f2-9a8e-4b8e-8a54-b1d1c3c0a6ad", "c1.", "never", "17"])
async def test_a_position_of_another_server_is_a_notice(
    relay: RelayProcess, door: Native, channel: str, last: str
) -> None:
    """A browser sends it by itself, and after an error it would never reconnect."""
    names = [channel, f"{channel}2"]
    client = await door.sse(*names, header=last)
    for name in names:
        block = await client.next()
        assert (block.event, block.json()) == (
            "relay:reset", {"channel": name, "reason": "unknown_position"}
        )  # fmt: skip
    relay.xadd(channel, data="1")
    assert (await client.next()).data == "1"
    # The client's next position is a valid one.
    client = await _resumed(door, client, *names)
    relay.xadd(channel, data="2")
    assert (await client.next()).data == "2"


@pytest.mark.parametrize("name", ["last_event_id", "lastEventId", "evs_last_event_id"])
async def test_libraries_send_their_position_in_the_query(
    relay: RelayProcess, door: Native, channel: str, name: str
) -> None:
    """They append it to the URL of the page, which may have an older one."""
    first, second = (relay.xadd(channel, data=data) for data in "12")
    relay.xadd(channel, data="3")
    query: dict[str, Any] = {"last_event_id": first, name: second}
    client = await door.sse(channel, **query)
    assert (await client.next()).data == "3"


async def test_names_that_a_browser_dispatches_itself_arrive_as_messages(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    client = await door.sse(channel)
    for kind in ("error", "open", "note"):
        relay.xadd(channel, data=f'"{kind}"', type=kind)
    blocks = await client.take(3)
    assert [(block.event, block.json()) for block in blocks] == [
        (None, "error"), (None, "open"), ("note", "note")
    ]  # fmt: skip


async def test_monitors_and_slashes(door: Native, relay: RelayProcess, channel: str) -> None:
    url = f"{relay.url}/sse/?channel={channel}&token={door.token}"
    async with door.session.get(url) as answer:
        assert answer.status == 200
        assert (await answer.content.readline()).startswith(b"retry: ")
    async with door.session.head(url) as answer:
        assert (answer.status, await answer.read()) == (200, b"")
        assert answer.headers["Content-Type"].startswith("text/event-stream")
    async with door.session.head(f"{relay.url}/sse/?channel={channel}&token=bad") as answer:
        assert answer.status == 401
    async with door.session.ws_connect(f"{relay.url}/ws/?channel={channel}"):
        pass


async def test_one_refused_channel_of_several_refuses_all_and_is_named(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    token = relay.token(channels=[channel])
    with pytest.raises(Refused) as refused:
        await door.sse(channel, f"{channel}-secret", token=token)
    answer = refused.value.answer
    assert answer.status == 403
    assert (answer.error["code"], answer.error["channel"]) == ("forbidden", f"{channel}-secret")


async def test_a_channel_that_is_named_twice_is_followed_once(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    client = await door.sse(channel, channel)
    relay.xadd(channel, data="1")
    relay.xadd(channel, data="2")
    blocks = await client.take(2)
    assert _numbers(blocks) == [1, 2]
    assert re.fullmatch(r"\d+-\d+", blocks[0].id or "")


async def test_cors_is_for_allowed_origins_only(valkey: Server, channel: str) -> None:
    origin = "https://app.example.org"
    setting = f"protocol:native.allowed_origins={origin}"
    relay = RelayProcess(valkey, settings=[setting]).start()
    try:
        async with native(relay) as door:
            good = await door.sse(channel, headers={"Origin": origin})
            assert good.headers["access-control-allow-origin"] == origin
            assert good.headers["access-control-allow-credentials"] == "true"
            assert good.headers["vary"] == "Origin"
            bad = await door.sse(channel, headers={"Origin": "https://evil.example.org"})
            assert "access-control-allow-origin" not in bad.headers
            refused = await door.get("/sse", Origin=origin)
            assert refused.headers["Access-Control-Allow-Origin"] == origin
            url = f"{relay.url}/sse"
            wanted = "authorization,cache-control,last-event-id"
            asked = {"Origin": origin, "Access-Control-Request-Headers": wanted}
            async with door.session.options(url, headers=asked) as answer:
                assert answer.status == 204
                assert answer.headers["Access-Control-Allow-Origin"] == origin
                # Libraries have headers of their own.
                assert answer.headers["Access-Control-Allow-Headers"] == wanted
    finally:
        relay.kill()
