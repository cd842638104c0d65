"""Read access: tokens, the rights hash, the order of revocations, and cookies."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import jwt
import pytest
from redis import Redis

from relay.cli import access
from relay.config.settings import RedisSettings
from relay.core.model import Channel
from relay.stream.format.entry import encode_revocation
from relay.stream.write.revoke import _REVOKE
from tests.support.clients import (
    Native,
    Refused,
    native,
    publish_ephemeral,
    redis,
    rights_key,
    stream_key,
)
from tests.support.relay import KEY, ROOT, RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis


async def _revoke(server: Server, channel: str, user: str) -> str:
    """Revoke with the library, as the maintenance user. Return the ID of the revocation."""
    settings = RedisSettings(url=server.url("maintenance"))
    return str(await access.revoke(settings, Channel(channel), user))


def _grant(server: Server, channel: str, user: str, right: str) -> None:
    redis(server, "HSET", rights_key(channel), user, right)


def _place(entry_id: str) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split("-")))


async def _status(door: Native, channel: str, token: str) -> int:
    """Try to subscribe, and return the HTTP status."""
    try:
        client = await door.sse(channel, token=token)
    except Refused as exc:
        return exc.answer.status
    client.drop()
    return 200


@pytest.mark.parametrize(
    ("claims", "allowed"),
    [
        (["e2e:claim"], True),
        (["e2e:*"], True),
        (["*"], True),
        (["*claim"], True),
        (["e2e"], False),
        (["e2e:claims", "x:*"], False),
        ([], False),
    ],
)
async def test_claims_name_channels_or_patterns(
    relay: RelayProcess, door: Native, claims: list[str], allowed: bool
) -> None:
    token = relay.token(channels=claims)
    assert await _status(door, "e2e:claim", token) == (200 if allowed else 403)


async def test_the_hash_grants_live_and_its_change_takes_effect_at_once(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    token = relay.token("bob", [])
    assert await _status(door, channel, token) == 403
    _grant(valkey, channel, "bob", "rw")
    client = await door.sse(channel, token=token)
    relay.xadd(channel, data="1")
    assert (await client.next()).json() == 1
    redis(valkey, "HDEL", rights_key(channel), "bob")
    (notice,) = await client.ended()
    assert notice.event == "relay:revoked"
    assert notice.json()["reason"] == "rights_changed"
    assert await _status(door, channel, token) == 403


async def test_a_refusal_in_the_hash_wins_over_the_token(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    client = await door.ws(channel, token=relay.token("bob"))
    await client.next()
    _grant(valkey, channel, "bob", "-")
    notice = await client.next()
    assert (notice["notice"], notice["channel"], notice["reason"]) == (
        "revoked", channel, "revoked",
    )  # fmt: skip
    assert "error" in await client.ask(cmd="subscribe", channel=channel)


async def test_after_a_revocation_nothing_leaves_for_that_user(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    token = relay.token("bob")
    others = await door.sse(channel)
    stream = await door.sse(channel, token=token)
    socket = await door.ws(channel, token=token)
    await socket.next()
    relay.xadd(channel, data="1")
    entry = await _revoke(valkey, channel, "bob")
    relay.xadd(channel, data="2")
    event, notice = await stream.ended()
    assert (event.json(), notice.event, notice.id) == (1, "relay:revoked", None)
    assert (await socket.next())["data"] == 1
    said = await socket.next()
    assert said.pop("notice") == "revoked"
    for told in (said, notice.json()):
        # Relay may notice the change of the hash before it reads the entry. Then `from` is the ID
        # of the last event that was sent.
        assert _place(told.pop("from")) <= _place(entry) <= _place(told.pop("to"))
        assert told == {"channel": channel, "reason": "revoked"}
    assert [block.json() for block in await others.take(2)] == [1, 2]
    # The websocket stays open, but receives no more events of this channel.
    assert (await socket.ask(cmd="ping"))["reply"] == "ping"


async def test_a_burst_around_a_revocation_is_cut_at_its_place(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    client = await door.sse(channel, token=relay.token("bob"))
    with valkey.client() as server, server.pipeline() as pipeline:
        for number in range(200):
            pipeline.execute_command("XADD", stream_key(channel), "*", "data", number)
            if number == 99:
                pipeline.execute_command("HSET", rights_key(channel), "bob", "-")
                pipeline.execute_command("XADD", stream_key(channel), "*", "revoke", "bob")
        pipeline.execute()
    *events, notice = await client.ended()
    assert notice.event == "relay:revoked"
    assert [event.json() for event in events] == list(range(len(events)))
    assert len(events) <= 100


async def test_replay_is_refused_after_a_revocation_and_whole_after_a_new_grant(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    token = relay.token("bob", [])
    _grant(valkey, channel, "bob", "r")
    client = await door.sse(channel, token=token)
    client.drop()
    relay.xadd(channel, data="1")
    await _revoke(valkey, channel, "bob")
    relay.xadd(channel, data="2")
    with pytest.raises(Refused) as refused:
        await door.sse(channel, token=token, header=client.last_id)
    assert refused.value.answer.error == {
        "code": "forbidden",
        "message": f"no right to read {channel}",
        "channel": channel,
    }
    _grant(valkey, channel, "bob", "r")
    client = await door.sse(channel, token=token, header=client.last_id)
    assert [block.json() for block in await client.take(2)] == [1, 2]
    # The old revocation entry does not affect the new grant.
    relay.xadd(channel, data="3")
    assert (await client.next()).json() == 3


async def test_a_revocation_reaches_who_is_catching_up(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    load = "x" * 200_000
    client = await door.sse(channel, token=relay.token("bob"), limit=65536)
    client.transport.pause_reading()
    for number in range(60):
        relay.xadd(channel, data=f'{{"n":{number},"load":"{load}"}}')
    async with asyncio.timeout(30):
        while not await door.metric("relay_catch_up_clients"):
            await asyncio.sleep(0.02)
    await _revoke(valkey, channel, "bob")
    relay.xadd(channel, data='{"n":"after"}')
    async with asyncio.timeout(30):
        while await door.metric("relay_catch_up_clients"):
            await asyncio.sleep(0.02)
    client.transport.resume_reading()
    raw = await asyncio.wait_for(client._reader.read(-1), 30)
    assert b'"after"' not in raw
    assert b"relay:revoked" in raw[-300:]
    # The backlog was not sent completely, because the revocation took effect before.
    assert raw.count(load.encode()) < 60


async def test_the_revoke_command_names_its_entry(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    client = await door.sse(channel, token=relay.token("bob"))
    words = [sys.executable, "-m", "relay", "revoke", "--redis", valkey.url("maintenance")]
    run = await asyncio.to_thread(
        subprocess.run, [*words, channel, "bob"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (notice,) = await client.ended()
    assert notice.event == "relay:revoked"
    assert notice.json()["to"] in run.stdout
    assert redis(valkey, "HGET", rights_key(channel), "bob") == b"-"
    words[3] = "grant"
    run = await asyncio.to_thread(
        subprocess.run, [*words, channel, "bob"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    ((entry_id, _),) = redis(valkey, "XREVRANGE", stream_key(channel), "+", "-", "COUNT", "1")
    assert entry_id.decode() in run.stdout
    assert redis(valkey, "HGET", rights_key(channel), "bob") is None
    assert await _status(door, channel, relay.token("bob")) == 200


async def test_a_grant_ends_a_revocation_for_every_source_of_rights(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    claims, by_hash = relay.token("bob"), relay.token("ben", [])
    _grant(valkey, channel, "ben", "r")
    clients = [await door.sse(channel, token=claims), await door.sse(channel, token=by_hash)]
    relay.xadd(channel, data="1")
    for user in ("bob", "ben"):
        await _revoke(valkey, channel, user)
    for client, token in zip(clients, (claims, by_hash), strict=True):
        event, notice = await client.ended()
        assert (event.json(), notice.event) == (1, "relay:revoked")
        assert await _status(door, channel, token) == 403
    relay.xadd(channel, data="2")
    settings = RedisSettings(url=valkey.url("maintenance"))
    for user in ("bob", "ben"):
        newest = await access.grant(settings, Channel(channel), user)
        ((entry_id, fields),) = redis(
            valkey, "XREVRANGE", stream_key(channel), "+", "-", "COUNT", "1"
        )
        assert (entry_id.decode(), fields) == (str(newest), {b"grant": user.encode()})
    # The hash has the same content as before the revocation.
    assert redis(valkey, "HGETALL", rights_key(channel)) == {b"ben": b"r"}
    assert await _status(door, channel, relay.token("bob", [])) == 403
    relay.xadd(channel, data="3")
    # Replay uses the current rights. The entries of the revocation and grant are not delivered.
    back = [
        await door.sse(channel, token=token, header=client.last_id)
        for client, token in zip(clients, (claims, by_hash), strict=True)
    ]
    for client in back:
        assert [block.json() for block in await client.take(2)] == [2, 3]
    relay.xadd(channel, data="4")
    for client in back:
        assert (await client.next()).json() == 4
    assert await access.grant(settings, Channel(channel), "bob") is None


async def test_a_grant_entry_alone_opens_nothing(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    token = relay.token("bob")
    await _revoke(valkey, channel, "bob")
    relay.xadd(channel, grant="bob")
    assert await _status(door, channel, token) == 403
    client = await door.sse(channel, last="0-0")
    relay.xadd(channel, data="1")
    assert (await client.next()).json() == 1
    assert redis(valkey, "XLEN", "relay:dead-letters") == 0 or not any(
        channel.encode() in fields[b"stream"]
        for _, fields in redis(valkey, "XRANGE", "relay:dead-letters", "-", "+")
    )


@pytest.mark.parametrize("kind", ["sse", "ws"])
async def test_a_token_that_runs_out_ends_the_connection(
    relay: RelayProcess, door: Native, channel: str, kind: str
) -> None:
    # Long enough to connect on a busy machine.
    token = relay.token("bob", ttl_s=8)
    began = time.monotonic()
    if kind == "sse":
        stream = await door.sse(channel, token=token)
        notice, error = await stream.ended()
        assert (notice.event, notice.json()["reason"]) == ("relay:revoked", "expired")
        assert (error.event, error.json()["code"]) == ("relay:error", "unauthorized")
    else:
        socket = await door.ws(channel, token=token)
        (_, said, wrong), code = await socket.closed()
        assert (said["notice"], said["reason"]) == ("revoked", "expired")
        assert wrong["error"]["code"] == "unauthorized"
        assert code == 4401
    assert time.monotonic() - began > 4
    assert await _status(door, channel, token) == 401


async def test_refresh_prolongs_narrows_and_keeps_the_user(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    other = f"{channel}-other"
    client = await door.ws(channel, other, token=relay.token("bob", ttl_s=8))
    await client.take(2)
    wrong = await client.ask(cmd="refresh", token=relay.token("eve"), ref=1)
    assert (wrong["error"]["code"], wrong["ref"]) == ("unauthorized", 1)
    # A token with fewer channels ends the other subscriptions.
    reply = await client.ask(cmd="refresh", token=relay.token("bob", [channel]), ref=2)
    assert reply == {"reply": "refresh", "ref": 2}
    notice = await client.next()
    assert (notice["notice"], notice["channel"], notice["reason"]) == (
        "revoked", other, "rights_changed",
    )  # fmt: skip
    with pytest.raises(TimeoutError):
        await client.next(8.7)
    relay.xadd(channel, data="1")
    assert (await client.next())["data"] == 1


async def test_to_names_users_groups_and_clients(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    claims = {"sub": "bob", "channels": ["*"], "groups": ["staff"], "client": "page-1"}
    bob = await door.sse(channel, token=jwt.encode(claims, KEY, algorithm="HS256"))
    alice = await door.ws(channel)
    await alice.next()
    for number, to in enumerate(
        ("bob", "user:alice", "group:staff", "client:page-1", "alice,bob", "group:none")
    ):
        relay.xadd(channel, data=str(number), to=to)
    relay.xadd(channel, data="99")
    assert [block.json() for block in await bob.take(5)] == [0, 2, 3, 4, 99]
    assert [event["data"] for event in await alice.take(3)] == [1, 4, 99]
    # Replay uses the same recipients.
    bob = await door.sse(
        channel, token=jwt.encode(claims, KEY, algorithm="HS256"), last="0-0"
    )  # fmt: skip
    assert [block.json() for block in await bob.take(5)] == [0, 2, 3, 4, 99]


async def test_ephemeral_events_reach_who_is_there_and_nobody_else(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    clients = [await door.sse(channel), await door.sse(channel, f"{channel}-b")]
    socket = await door.ws(channel)
    await socket.next()
    entry = relay.xadd(channel, data="1")
    assert (await clients[0].next()).id == entry
    last = (await clients[1].next()).id
    await socket.next()
    for payload in (
        '{"data":{"t":1},"type":"typing","client":"c"}',
        '{"text":"a","to":["user:eve"]}',
    ):
        await publish_ephemeral(valkey, channel, payload)
    for client, kept in zip(clients, (entry, last), strict=True):
        block = await client.next()
        assert (block.id, block.event, block.json()) == (None, "typing", {"t": 1})
        assert client.last_id == kept
    assert await socket.next() == {
        "channel": channel, "type": "typing", "data": {"t": 1}, "client": "c",
    }  # fmt: skip
    relay.xadd(channel, data="2")
    assert (await clients[0].next()).json() == 2
    replay = await door.sse(channel, last="0-0")
    assert [block.json() for block in await replay.take(2)] == [1, 2]


async def test_operators_disconnect_and_unsubscribe(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    token = relay.token(channel)  # a user that no other test has
    socket = await door.ws(channel, f"{channel}-b", token=token)
    await socket.take(2)
    stream = await door.sse(channel, token=token)
    await _control(valkey, command="unsubscribe", channel=channel, user=channel)
    notice = await socket.next()
    assert (notice["notice"], notice["channel"]) == ("revoked", channel)
    assert [block.event for block in await stream.ended()] == ["relay:revoked"]
    # The user still has access and may subscribe again.
    stream = await door.sse(channel, token=token)
    await _control(valkey, command="disconnect", user=channel)
    said, code = await socket.closed()
    assert ([each["notice"] for each in said], code) == (["closing"], 4403)
    (closing,) = await stream.ended()
    assert (closing.event, closing.json()) == ("relay:closing", {"reason": "disconnected"})


async def test_commands_take_effect_after_the_events_before_them(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    """Each event is appended directly before the command, in one write."""
    client = valkey.client("maintenance")
    control = ("XADD", "relay:control", "*", "user", channel, "command")
    keys = [f"relay:{key}:{{{channel}}}" for key in ("rights", "revoked", "stream")]
    revoke: tuple[str | bytes | int, ...] = ("EVAL", _REVOKE.text, 3, *keys)
    for number, (command, ending) in enumerate(
        [
            ((*control, "unsubscribe", "channel", channel), "revoked"),
            ((*control, "unsubscribe"), "revoked"),
            ((*control, "disconnect"), "closing"),
            ((*revoke, "-", channel, "*", *encode_revocation(channel)), "revoked"),
        ]
        * 5
    ):
        redis(valkey, "HDEL", rights_key(channel), channel)
        stream = await door.sse(channel, token=relay.token(channel))
        add = ("XADD", stream_key(channel), "*", "data", str(number))
        await asyncio.to_thread(_send_together, client, add, command)
        event, last = await stream.ended()
        assert (event.json(), last.event) == (number, f"relay:{ending}"), command


def _send_together(client: Redis, *commands: tuple[str | bytes | int, ...]) -> None:
    with client.pipeline(transaction=False) as pipeline:
        for command in commands:
            pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
        pipeline.execute()


async def _control(server: Server, **fields: str) -> None:
    words = [word for pair in fields.items() for word in pair]
    command = ("XADD", "relay:control", "*", *words)
    await asyncio.to_thread(server.client("maintenance").execute_command, *command)


async def test_a_cookie_needs_an_allowed_origin(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    cookie = {"Cookie": f"relay_token={door.token}"}
    own = f"http://127.0.0.1:{relay.port}"
    for headers, status in (
        ({}, 403),
        ({"Origin": "https://evil.example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 400),
        ({"Origin": own}, 400),
    ):
        # 400 means that the credentials were accepted: the request names no channel.
        answer = await door.get("/sse", **cookie, **headers)
        assert answer.status == status, headers
    answer = await door.get("/sse", **cookie, Origin="https://evil.example.org")
    assert json.loads(answer.body)["error"]["message"] == (
        "Origin 'https://evil.example.org' is not allowed; "
        "add it to [protocol:native] allowed_origins"
    )
    client = await door.sse(channel, token="", headers={**cookie, "Origin": own})
    relay.xadd(channel, data="1")
    assert (await client.next()).json() == 1
    socket = await door.ws(channel, token="", headers={**cookie, "Origin": own})
    assert (await socket.next())["reply"] == "subscribe"
    for headers in ({}, {"Origin": "https://evil.example.org"}):
        answer = await door.get(f"/ws?channel={channel}", **cookie, **headers, **_UPGRADE)
        assert answer.status == 403


_UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


async def test_header_wins_over_query_and_query_over_cookie(
    relay: RelayProcess, door: Native
) -> None:
    good, bad = {"Authorization": f"Bearer {door.token}"}, {"Authorization": "Bearer bad"}
    assert (await door.get("/sse?token=bad", **good)).status == 400
    assert (await door.get(f"/sse?token={door.token}", **bad)).status == 401
    evil = {"Origin": "https://evil.example.org", "Cookie": "relay_token=bad"}
    assert (await door.get(f"/sse?token={door.token}", **evil)).status == 400
    assert (await door.get("/sse", Authorization=f"Basic {relay.token()}")).status == 401


@pytest.fixture(scope="module")
def open_relay(valkey: Server) -> Iterator[RelayProcess]:
    """Run a relay with --insecure."""
    process = RelayProcess(valkey, flags=["--insecure"]).start()
    yield process
    process.kill()


async def test_insecure_opens_the_native_doors_channels_only(
    open_relay: RelayProcess, channel: str
) -> None:
    async with native(open_relay) as door:
        client = await door.sse(channel, token="")
        open_relay.xadd(channel, data="1")
        assert (await client.next()).json() == 1
        for name in ("seafile:lib", "pydio:ws", "axr:room"):
            assert await _status(door, name, "") == 403
        assert await _status(door, channel, "bad") == 401
    assert any("INSECURE" in line for line in open_relay.log)
