"""`relay workers`, `status`, `disconnect` and `unsubscribe` on a running relay."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.cli import Cli
from tests.support.clients import Native, redis, until
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]


@pytest.fixture
def cli(valkey: Server) -> Cli:
    return Cli(valkey)


async def test_workers_and_status_tell_what_the_relay_does(
    cli: Cli, relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    client = await door.sse(channel)
    relay.xadd(channel, data="1")
    await client.next()

    def beaten() -> object:
        (instance,) = redis(valkey, "SMEMBERS", "relay:nodes") or [b""]
        beat = redis(valkey, "GET", b"relay:node:" + instance)
        return beat and json.loads(beat)["connections"]

    await until(beaten, 30)
    (worker,) = await cli.objects("workers")
    assert worker["pid"] == relay.pid
    assert (worker["ready"], worker["connections"], worker["streams"]) == (True, 1, 1)
    assert 0 <= worker["lag_ms"] < 5000
    assert 0 <= worker["up_s"] < 600
    head, row, total = (await cli.out("workers")).splitlines()
    assert head.split()[0] == "WORKER"
    assert row.split()[:3] == [worker["instance"], worker["host"], str(relay.pid)]
    assert total == "1 worker on 1 host, 1 connection"
    (status,) = await cli.objects("status")
    assert (status["good"], status["workers"], status["wrong"]) == (True, 1, [])
    assert (await cli.out("status")).splitlines()[0].split() == ["status", "good"]


async def test_status_is_1_with_a_line_for_each_thing_that_is_wrong(
    cli: Cli, relay: RelayProcess, valkey: Server
) -> None:
    await until(lambda: redis(valkey, "SMEMBERS", "relay:nodes"), 30)
    redis(valkey, "XADD", "relay:dead-letters", "*", "reason", "a test")
    redis(valkey, "SADD", "relay:nodes", "killed:1")
    done = await cli.run("status", "--min-workers", "2", "--max-dead-letters", "0")
    redis(valkey, "DEL", "relay:dead-letters")
    assert done.returncode == 1
    assert "NOT GOOD" in done.stdout
    assert "1 alive, 1 ready, 1 silent" in done.stdout
    assert done.stderr.splitlines() == [
        "relay: 1 worker alive, expected at least 2",
        "relay: 1 dead letter, expected at most 0",
    ]
    assert "killed:1" in await cli.out("workers")
    # The list may be incomplete.
    done = await cli.run("connections")
    assert done.returncode == 1
    assert done.stderr == "relay: killed:1 did not answer: its connections are missing\n"
    redis(valkey, "SREM", "relay:nodes", "killed:1")


async def test_workers_of_an_incompatible_version_are_refused(
    cli: Cli, relay: RelayProcess, valkey: Server
) -> None:
    newer = {"instance": "newer:1", "name": "n", "host": "h", "pid": 1, "started": "x"}
    newer |= {"version": "9", "schema": 9, "compatible_since": 8}
    redis(valkey, "SADD", "relay:nodes", "newer:1")
    redis(valkey, "SET", "relay:node:newer:1", json.dumps(newer))
    conflict = "worker newer:1 (relay 9) shares this Redis and writes schema 9"
    await until(lambda: any(conflict in line for line in relay.log), 30)
    refused = await cli.process("serve", "--port", "0")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"relay: {conflict}")
    assert len(refused.stderr.splitlines()) == 1
    versions = await cli.run("status")
    assert conflict in versions.stderr
    assert "1 worker of 9, schema 9" in versions.stdout
    redis(valkey, "DEL", "relay:node:newer:1")
    redis(valkey, "SREM", "relay:nodes", "newer:1")
    async with asyncio.timeout(30):
        while (await cli.run("status")).returncode:
            await asyncio.sleep(0.5)


async def test_disconnect_and_unsubscribe_reach_the_worker(
    cli: Cli, relay: RelayProcess, door: Native, channel: str
) -> None:
    stays = await door.ws(channel, token=relay.token("ben"))
    gone = await door.ws(channel, token=relay.token("anna"))
    await stays.next()
    await gone.next()
    assert "of ben" in await cli.out("unsubscribe", channel, "ben")
    notice = await stays.next()
    assert (notice["notice"], notice["reason"]) == ("revoked", "unsubscribed")
    (told,) = await cli.objects("disconnect", "anna")
    assert (told["user"], told["workers"], told["closed"]) == ("anna", 1, 1)
    await gone.closed()
    assert (await stays.ask(cmd="ping"))["reply"] == "ping"
    text = await cli.out("disconnect", "ghost")
    assert text.startswith("Closed 0 connections of ghost on 1 worker (control entry")
    done = await cli.run("unsubscribe", "team:*", "ben")
    assert (
        "CHANNEL is a name, not a pattern: this applies to one channel, named team:*" in done.stderr
    )


async def test_a_worker_is_ready_soon_after_it_began(cli: Cli, valkey: Server) -> None:
    """The worker is reported as ready well before its second regular heartbeat."""
    relay = RelayProcess(valkey)
    await asyncio.to_thread(relay.start)
    try:
        async with asyncio.timeout(30):
            while True:
                found = [each for each in await cli.objects("workers") if each["pid"] == relay.pid]
                if found and found[0]["ready"]:
                    break
    finally:
        await asyncio.to_thread(relay.stop)
