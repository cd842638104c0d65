"""Presence, join and leave of Centrifugo v1 on one and several workers, and after a kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.centrifugo_client import SECRET, Centrifugo, V1Client, centrifugo
from tests.support.clients import redis, until
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis
RULES = [
    f"protocol:centrifugo.secret={SECRET}",
    "protocol:centrifugo:here.presence=true",
    "protocol:centrifugo:here.join_leave=true",
    "protocol:centrifugo:quiet.presence=true",
    "protocol:centrifugo:told.join_leave=true",
]


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=RULES).start()
    yield process
    process.kill()


@pytest.fixture
async def site(relay: RelayProcess) -> AsyncIterator[Centrifugo]:
    async with centrifugo(relay.url) as one:
        yield one


async def present(client: V1Client, channel: str) -> list[str]:
    reply = await client.ask("presence", channel=channel)
    return list(reply["body"]["data"])


async def seen(client: V1Client, channel: str, wanted: set[str], limit_s: float = 10) -> None:
    """Wait for this presence: other workers have it shortly after the client's reply."""
    async with asyncio.timeout(limit_s):
        while set(await present(client, channel)) != wanted:
            await asyncio.sleep(0.05)


def clients_of(valkey: Server, pid: int, channel: str) -> set[str]:
    """Return the clients of this worker process."""
    found: set[str] = set()
    for client, value in redis(valkey, "HGETALL", f"relay:presence:{{{channel}}}").items():
        instance, _, _ = value.partition(b"\n")
        beat = redis(valkey, "GET", f"relay:node:{instance.decode()}")
        if json.loads(beat)["pid"] == pid:
            found.add(client.decode())
    return found


async def test_presence_is_reported_by_client(site: Centrifugo) -> None:
    anna = await site.client("anna", '{"name": "Anna <3"}')
    bob = await site.client("bob")
    await anna.subscribe("here:room")
    await bob.subscribe("here:room")
    reply = await anna.ask("presence", channel="here:room")
    wanted = {
        anna.id: {"user": "anna", "client": anna.id, "default_info": {"name": "Anna <3"}},
        bob.id: {"user": "bob", "client": bob.id},
    }
    assert reply["body"] == {"channel": "here:room", "data": wanted}
    await bob.ask("unsubscribe", channel="here:room")
    assert await present(anna, "here:room") == [anna.id]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("count", [1, 2])
async def test_presence_enabled_by_a_reload_contains_current_subscribers(
    valkey: Server, tmp_path: Path, count: int
) -> None:
    path = tmp_path / "late.ini"
    # Clients of a relay that was killed remain until its heartbeat expires.
    channel = f"late:{count}"
    path.write_text("[protocol:centrifugo:late]\n")
    flags = ["--workers", str(count), "-c", str(path)]
    relay = RelayProcess(valkey, settings=[f"protocol:centrifugo.secret={SECRET}"], flags=flags)
    await asyncio.to_thread(relay.start)
    try:
        async with centrifugo(relay.url) as site:
            clients = [await site.client(f"u{number}") for number in range(6)]
            for each in clients:
                await each.subscribe(channel)
            reply = await clients[0].ask("presence", channel=channel)
            assert reply["error"] == "not available"
            path.write_text("[protocol:centrifugo:late]\npresence = yes\n")
            relay.send(signal.SIGHUP)
            await until(
                lambda: (
                    sum("relay.process.app" in e and "reloaded" in e for e in relay.log) >= count
                )
            )
            everybody = {each.id for each in clients}
            await seen(clients[0], channel, everybody)
            await clients[1].ask("unsubscribe", channel=channel)
            await seen(clients[0], channel, everybody - {clients[1].id})
    finally:
        await asyncio.to_thread(relay.kill)


async def test_joins_and_leaves_are_sent_once_and_not_stored(
    site: Centrifugo, relay: RelayProcess
) -> None:
    anna = await site.client("anna")
    await anna.subscribe("told:room")
    assert await anna.push("join") == {
        "channel": "told:room",
        "data": {"user": "anna", "client": anna.id},
    }
    bob = await site.client("bob", '{"n":1}')
    await bob.subscribe("told:room")
    who = {"default_info": {"n": 1}, "user": "bob", "client": bob.id}
    assert await anna.push("join") == {"channel": "told:room", "data": who}
    await bob.stop()
    assert await anna.push("leave") == {"channel": "told:room", "data": who}
    assert anna.pushes == []
    assert redis(relay.server, "XLEN", "relay:stream:{told:room}") == 0
    # `presence` is disabled in this namespace.
    reply = await anna.ask("presence", channel="told:room")
    assert (reply["error"], reply["advice"]) == ("not available", "retry")


async def test_without_the_option_nothing_is_sent(site: Centrifugo) -> None:
    anna = await site.client("anna")
    bob = await site.client("bob")
    await anna.subscribe("quiet:room")
    await bob.subscribe("quiet:room")
    assert set(await present(anna, "quiet:room")) == {anna.id, bob.id}
    assert anna.pushes == []


async def gone(client: V1Client, count: int) -> list[str]:
    """Return the clients of the next leave messages."""
    return [(await client.push("leave", 45))["data"]["client"] for _ in range(count)]


@pytest.mark.timeout(90)
async def test_after_a_kill_of_a_worker_its_clients_leave_once(valkey: Server) -> None:
    relay = RelayProcess(valkey, settings=RULES, flags=["--workers", "2"])
    await asyncio.to_thread(relay.start)
    try:
        async with centrifugo(relay.url) as site:
            clients = [await site.client(f"u{number}") for number in range(24)]
            for client in clients:
                await client.subscribe("here:two")
            await seen(clients[0], "here:two", {each.id for each in clients})
            children = Path(f"/proc/{relay.pid}/task/{relay.pid}/children").read_text()
            victim = int(children.split()[0])
            dead = clients_of(valkey, victim, "here:two")
            left = [each for each in clients if each.id not in dead]
            assert dead
            assert left
            os.kill(victim, signal.SIGKILL)
            await until(lambda: {each.id for each in clients if each.closed} == dead)
            # Its host detects the death at once, without waiting for the expiry of the heartbeat.
            await seen(left[0], "here:two", {each.id for each in left})
            assert set(await gone(left[0], len(dead))) == dead
            later = await site.client("later")
            await later.subscribe("here:two")
            joined = set()
            while later.id not in joined:
                joined.add((await left[-1].push("join"))["data"]["client"])
            told = [each["body"] for each in left[-1].pushes if each["method"] == "leave"]
            assert sorted(each["data"]["client"] for each in told) == sorted(dead)
    finally:
        relay.kill()


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_after_the_loss_of_a_host_its_clients_leave_once(valkey: Server) -> None:
    hosts = [RelayProcess(valkey, settings=RULES) for _ in range(3)]
    for host in hosts:
        await asyncio.to_thread(host.start)
    try:
        async with centrifugo(hosts[0].url) as site:
            one, two, three = [await site.client(f"u{n}", url=h.url) for n, h in enumerate(hosts)]
            for client in (one, two, three):
                await client.subscribe("here:hosts")
            await seen(one, "here:hosts", {one.id, two.id, three.id})
            hosts[2].kill()
            await seen(one, "here:hosts", {one.id, two.id}, 30)
            assert [await gone(each, 1) for each in (one, two)] == [[three.id]] * 2
            last = await site.client("last")
            await last.subscribe("here:hosts")
            while (await two.push("join"))["data"]["client"] != last.id:
                pass
            assert not [each for each in two.pushes if each["method"] == "leave"]
    finally:
        for host in hosts:
            host.kill()
