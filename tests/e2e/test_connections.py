"""`relay connections` and `relay connection`: what a running relay says about its clients."""

from __future__ import annotations

import asyncio
import re

import pytest

from relay.config.settings import RedisSettings
from relay.inspect.connections import ConnectionFilter, find_connections
from relay.inspect.questions import BadQuestion, asking
from relay.stream.shards.clients import shard_clients
from relay.stream.shards.making import keys_of
from tests.support.cli import Cli
from tests.support.clients import LIMIT_S, Native
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]

ID = re.compile(r"[0-9a-f]{12}")


@pytest.fixture
def cli(valkey: Server) -> Cli:
    return Cli(valkey)


async def test_a_connection_is_listed_with_what_an_operator_asks(
    cli: Cli, relay: RelayProcess, door: Native, channel: str
) -> None:
    user = "connections@example.com"
    sse = await door.sse(channel, token=relay.token(user, groups=["cooks"]))
    ws = await door.ws(channel, token=relay.token(user))
    await ws.next()
    event = relay.xadd(channel, data="1")
    await sse.next()
    found = await cli.objects("connections", "--user", user)
    assert [each["id"] for each in found] == sorted(each["id"] for each in found)
    by_transport = {each["transport"]: each for each in found}
    assert set(by_transport) == {"sse", "websocket"}
    row = by_transport["sse"]
    assert row["id"] == sse.headers["x-request-id"]
    assert ID.fullmatch(row["id"])
    assert (row["user"], row["protocol"], row["address"]) == (user, "native", "127.0.0.1")
    assert row["groups"] == ["cooks"]
    assert row["subscriptions"] == [
        {
            "channel": channel,
            "mode": "live",
            "position": event,
            "began": "0-0",
            "behind": 0,
            "newest": event,
        }
    ]
    (shown,) = await cli.objects("connection", row["id"])
    assert shown["subscription_count"] == 1
    text = await cli.out("connection", row["id"])
    assert f"user           {user}" in text
    assert channel in text
    # Filters.
    kind = channel.partition(":")[0]
    for words in (
        ["--channel", channel],
        ["--channel", f"{kind}:a_connection_is*", "--protocol", "native"],
        ["--channel", channel, "--user", user, "--address", "127.0"],
    ):
        assert len(await cli.objects("connections", *words)) == 2, words
    for words in (
        ["--channel", f"{kind}:nothing"],
        ["--user", user, "--door", "centrifugo"],
        ["--user", user, "--address", "10."],
        ["--user", user, "--channel", f"{kind}:nothing*"],
    ):
        assert await cli.objects("connections", *words) == [], words
    # Pages.
    first, second = found
    assert await cli.objects("connections", "--user", user, "--limit", "1") == [
        {**first, "connected_s": pytest.approx(first["connected_s"], abs=60)}
    ]
    table = await cli.out("connections", "--user", user, "--limit", "1")
    assert f"2 connections, 1 listed; continue with --after {first['id']}" in table
    (rest,) = await cli.objects("connections", "--user", user, "--after", first["id"])
    assert rest["id"] == second["id"]
    done = await cli.run("connection", "0000")
    assert (done.returncode, done.stderr) == (1, "relay: no connection 0000 is open\n")


async def test_an_error_answer_has_an_id_and_names_no_software(
    relay: RelayProcess, door: Native, channel: str
) -> None:
    answers = [
        await door.get(f"/sse?channel={channel}", Authorization="Bearer nonsense"),
        await door.get("/no/such/path"),
    ]
    for answer in answers:
        headers = {name.lower(): value for name, value in answer.headers.items()}
        assert answer.status >= 400
        assert ID.fullmatch(headers["x-request-id"])
        assert headers["server"] == "relay"
    ids = {each.headers.get("X-Request-Id") for each in answers}
    assert len(ids) == 2


async def test_a_question_of_another_version_is_rejected(
    valkey: Server, relay: RelayProcess
) -> None:
    settings = RedisSettings(url=valkey.url("maintenance"))
    keys = keys_of(settings)
    async with shard_clients(settings) as clients, asking(settings, clients, keys) as questions:

        async def failures() -> dict[str, str]:
            return (await questions.ask("colour", {})).failed

        failed = await failures()
        assert set(failed.values()) == {"unknown to this version of relay"}
        answers = await questions.ask("connections", {"limit": 10**9})
        assert set(answers.failed.values()) == {"limit must be an integer from 1 to 500"}
        with pytest.raises(BadQuestion, match="user must be a text"):
            await find_connections(questions, ConnectionFilter(user=1))  # type: ignore[arg-type]


async def test_the_journal_tells_what_happened_to_a_client(
    cli: Cli, relay: RelayProcess, door: Native, channel: str
) -> None:
    user = "journal@example.com"
    ws = await door.ws(channel, token=relay.token(user, [channel]))
    await ws.next()
    await ws.send(cmd="subscribe", channel="e2e:not-granted")
    assert (await ws.next())["error"]["code"] == "forbidden"
    (row,) = await cli.objects("connections", "--user", user)
    assert [each["reason"] for each in row["rejections"]] == ["forbidden"]
    await cli.out("disconnect", user)
    await ws.closed()

    async def kinds() -> list[str]:
        return [each["event"] for each in await cli.objects("events", "--connection", row["id"])]

    expected = ["connected", "subscribed", "rejected", "disconnected"]
    async with asyncio.timeout(LIMIT_S):
        while await kinds() != expected:
            await asyncio.sleep(0.05)
    found = await cli.objects("events", "--user", user)
    assert [each["event"] for each in found] == expected
    assert found[2]["rule"] == "none of the sources grants it: door, claims, hash"
    assert found[3]["reason"] == "disconnected"
    assert channel in found[3]["positions"]
    assert channel in await cli.out("events", "--user", user, "--channel", channel)
