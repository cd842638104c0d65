"""`relay explain` on a running relay: each reason, with a client to which it happened."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.cli import Cli
from tests.support.clients import LIMIT_S, Native, redis, stream_key, until
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]


class Asking:
    """Runs `relay explain` until it has the expected outcome: the journal is a moment late."""

    def __init__(self, cli: Cli, channel: str) -> None:
        self._cli = cli
        self._channel = channel

    async def __call__(self, user: str, event_id: str, outcome: str) -> dict[str, Any]:
        async with asyncio.timeout(3 * LIMIT_S):
            while True:
                (found,) = await self._cli.objects("explain", user, self._channel, event_id)
                if found["outcome"] == outcome:
                    return found
                await asyncio.sleep(0.2)


@pytest.fixture
def explain(valkey: Server, channel: str) -> Asking:
    return Asking(Cli(valkey), channel)


async def test_who_received_it_when_and_who_came_too_late(
    explain: Asking, relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    cli = Cli(valkey)
    live = await door.sse(channel, token=relay.token("x-live"))
    left = await door.sse(channel, token=relay.token("x-left"))
    before = relay.xadd(channel, data="0")
    await live.next()
    await left.next()
    position = left.last_id
    left.drop()
    # An event that is written before relay notices the loss counts as received.
    async with asyncio.timeout(LIMIT_S):
        while await cli.objects("connections", "--user", "x-left"):
            await asyncio.sleep(0.05)
    event = relay.xadd(channel, data="1")
    await live.next()
    late = await door.sse(channel, token=relay.token("x-late"))
    found = await explain("x-live", event, "received")
    (client,) = found["clients"]
    assert client["at_ms"] == int(event.partition("-")[0])
    assert client["connection"] == live.headers["x-request-id"]
    assert found["sentence"].startswith(f"x-live received {event} on 1 of 1 client, first at about")
    assert "live, at about" in client["sentence"]
    assert found["unknown"] == []
    found = await explain("x-late", event, "subscribed_later")
    assert "subscribed later" in found["sentence"]
    found = await explain("x-left", event, "disconnected_before")
    assert "connection ended" in found["sentence"]
    await explain("x-left", before, "received")
    found = await explain("x-never", event, "not_connected")
    assert found["clients"] == []
    # It resumes, on another connection.
    again = await door.sse(channel, token=relay.token("x-left"), last=position)
    await again.next()
    found = await explain("x-left", event, "received")
    assert {each["outcome"] for each in found["clients"]} == {"received", "disconnected_before"}
    assert "as a missed event" in " ".join(each["sentence"] for each in found["clients"])
    late.drop()


async def test_a_few_of_many_clients_are_listed_first_those_that_missed_it(
    explain: Asking, relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    token = relay.token("x-many")
    clients = [await door.sse(channel, token=token) for _ in range(60)]
    event = relay.xadd(channel, data="1")
    for each in clients:
        await each.next()
    others = [await door.sse(channel, token=token) for _ in range(3)]
    found = await explain("x-many", event, "received")
    assert f"on 60 of {len(clients) + len(others)} clients" in found["sentence"]
    assert [each["outcome"] for each in found["clients"]] == [
        *["subscribed_later"] * 3,
        *["received"] * 47,
    ]
    assert found["others"] == {"received": 13}
    assert {each["connection"] for each in found["clients"][:3]} == {
        each.headers["x-request-id"] for each in others
    }
    printed = await Cli(valkey).out("explain", "x-many", channel, event)
    assert "  Other clients: 13 received." in printed


async def test_entries_that_nobody_could_receive(
    explain: Asking, relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    user = "x-entries"
    assert "has no stream" in (await explain(user, "1-1", "no_entry"))["sentence"]
    client = await door.sse(channel, token=relay.token(user))
    first = relay.xadd(channel, data="1")
    await client.next()
    assert "the newest ID" in (await explain(user, "99999999999999-0", "no_entry"))["sentence"]
    broken = relay.xadd(channel, nothing="1")
    found = await explain(user, broken, "dead_letter")
    assert "data" in found["sentence"]
    line = f"Entry {broken} of {channel} cannot be delivered: "
    await until(lambda: any(line in each for each in relay.log))
    last = relay.xadd(channel, data="2")
    await client.next()
    redis(valkey, "XTRIM", stream_key(channel), "MAXLEN", 1)
    # The user's client had received it before.
    await explain(user, first, "received")
    found = await explain("x-other", first, "trimmed")
    assert f"begins at {last}" in found["sentence"]
    # A client that resumes after the trim is notified instead.
    ms = int(first.partition("-")[0])
    await door.sse(channel, token=relay.token("x-gap"), last=f"{ms - 1}-0")
    found = await explain("x-gap", first, "gap")
    assert "received a notice of missing events instead (gap, trimmed)" in found["sentence"]
    redis(valkey, "DEL", "relay:dead-letters")


async def test_recipients_and_rights(
    explain: Asking, relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    cli = Cli(valkey)
    cook = await door.sse(channel, token=relay.token("x-cook", groups=["cooks"]))
    guest = await door.ws(channel, token=relay.token("x-guest"))
    await guest.next()
    event = relay.xadd(channel, data="1", to='["group:cooks"]')
    await cook.next()
    await explain("x-cook", event, "received")
    found = await explain("x-guest", event, "not_addressed")
    assert "group:cooks" in found["sentence"]
    await cli.out("revoke", channel, "x-guest")
    revoked = await guest.next()
    assert revoked["notice"] == "revoked"
    event = relay.xadd(channel, data="2")
    await cook.next()
    found = await explain("x-guest", event, "no_right")
    assert "was revoked at" in found["sentence"]
    await guest.send(cmd="subscribe", channel=channel)
    assert (await guest.next())["error"]["code"] == "forbidden"
    await cli.out("grant", channel, "x-guest")
    other = await door.ws(token=relay.token("x-other", ["elsewhere"]))
    await other.send(cmd="subscribe", channel=channel)
    assert (await other.next())["error"]["code"] == "forbidden"
    event = relay.xadd(channel, data="3")
    await cook.next()
    found = await explain("x-other", event, "no_right")
    assert "none of the sources grants it" in found["sentence"]


async def test_a_client_that_does_not_read_is_behind(
    explain: Asking, relay: RelayProcess, door: Native, channel: str
) -> None:
    client = await door.sse(channel, token=relay.token("x-slow"))
    client.transport.pause_reading()
    text = "x" * 200_000
    for _ in range(39):
        relay.xadd(channel, data=text)
    event = relay.xadd(channel, data=text)
    found = await explain("x-slow", event, "behind")
    assert "bytes wait to be sent" in found["sentence"]
    assert found["clients"][0]["connection"] == client.headers["x-request-id"]
