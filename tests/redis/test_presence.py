"""relay/stream/cluster/presence.py on real servers, with relay's rights."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest
from redis.asyncio import Redis

from relay.core.errors import Unavailable
from relay.core.model import Channel
from relay.stream.cluster.workers import DeadWorkerDetector
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import ShardClients
from relay.stream.upkeep.dead_workers import DeadWorkersJob
from tests.support.clients import until, within
from tests.support.site import site
from tests.support.valkey import Server, running

pytestmark = pytest.mark.redis
NEWS = Channel("news")
KEY = "relay:presence:{news}"


async def lives(admin: Redis, *instances: str) -> None:
    for instance in instances:
        await admin.set(f"relay:node:{instance}", "{}")
        await admin.sadd("relay:nodes", instance)


async def test_every_worker_sees_the_clients_of_all(server: Server, admin: Redis) -> None:
    await lives(admin, "one:1", "two:2")
    async with site(server, "one:1") as one, site(server, "two:2") as two:
        one.presence.add(NEWS, "a", b'{"user":"anna"}')
        two.presence.add(NEWS, "b", b'{"user":"bob"}')
        two.presence.add(Channel("other"), "b", b"{}")
        # A worker sees its own changes at once.
        assert (await one.presence.read(NEWS))["a"] == b'{"user":"anna"}'
        everyone = {"a": b'{"user":"anna"}', "b": b'{"user":"bob"}'}

        async def seen_by_all(wanted: dict[str, bytes]) -> bool:
            return all([await each.presence.read(NEWS) == wanted for each in (one, two)])

        while not await seen_by_all(everyone):
            await asyncio.sleep(0)
        one.presence.add(NEWS, "a", b'{"user":"anna","mood":1}')
        two.presence.remove(NEWS, "b")
        two.presence.remove(NEWS, "nobody")
        while not await seen_by_all({"a": b'{"user":"anna","mood":1}'}):
            await asyncio.sleep(0)
        one.presence.remove(NEWS, "a")
        while await admin.exists(KEY, "relay:present:one:1"):
            await asyncio.sleep(0)
        assert await admin.smembers("relay:present:two:2") == {b"other"}
        await two.presence.leave()
        assert not await admin.keys("relay:presen*")


async def test_what_changes_in_one_turn_is_one_command_a_channel(
    server: Server, admin: Redis
) -> None:
    async with site(server, "one:1") as one:
        await admin.config_resetstat()
        for number in range(400):
            one.presence.add(NEWS, f"c{number}", b"{}")
        while await admin.hlen(KEY) < 400:
            await asyncio.sleep(0)
        for number in range(400):
            one.presence.remove(NEWS, f"c{number}")
        while await admin.exists(KEY):
            await asyncio.sleep(0)
        stats = await admin.info("commandstats")
        assert [stats[f"cmdstat_{word}"]["calls"] for word in ("hset", "hdel")] == [1, 1]
        # The channel is empty, so nothing is checked.
        await one.presence.check()
        assert "cmdstat_scard" not in await admin.info("commandstats")


async def test_of_those_who_ask_at_once_one_asks_redis(server: Server, admin: Redis) -> None:
    async with site(server, "one:1") as one:
        one.presence.add(NEWS, "a", b"{}")
        await admin.config_resetstat()
        asked = [one.presence.read(NEWS) for _ in range(100)]
        assert [await each for each in asked] == [{"a": b"{}"}] * 100
        stats = await admin.info("commandstats")
        assert stats["cmdstat_hgetall"]["calls"] == 1


async def test_a_worker_that_is_dead_does_not_count(server: Server, admin: Redis) -> None:
    await lives(admin, "two:2", "three:3")
    async with (
        site(server, "one:1", dead="three:3".__eq__) as one,
        site(server, "two:2") as two,
        site(server, "three:3") as three,
    ):
        for name, each in (("a", one), ("b", two), ("c", three)):
            each.presence.add(NEWS, name, b"{}")
        while await admin.hlen(KEY) < 3:
            await asyncio.sleep(0)
        # `one` knows that `three` is dead, although its heartbeat has not expired.
        assert set(await one.presence.read(NEWS)) == {"a", "b"}
        assert set(await two.presence.read(NEWS)) == {"b", "c"}
        await admin.delete("relay:node:two:2")
        assert set(await one.presence.read(NEWS)) == {"a"}


async def test_a_worker_writes_again_what_redis_has_lost(server: Server, admin: Redis) -> None:
    async with site(server, "one:1") as one:
        for number in range(1200):
            one.presence.add(NEWS, f"c{number}", b"{}")
        while await admin.hlen(KEY) < 1200:
            await asyncio.sleep(0)
        await admin.flushall()
        await one.presence.check()
        while await admin.hlen(KEY) < 1200:
            await asyncio.sleep(0)
        assert await admin.smembers("relay:present:one:1") == {b"news"}


async def test_what_changes_while_redis_is_away_is_made_up_for(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    server = Server(tmp_path_factory.mktemp("own"), options=("--appendonly", "yes"))
    with running(server):
        async with site(server, "one:1") as one:
            for name in ("stays", "goes"):
                one.presence.add(NEWS, name, b"{}")
            with server.client() as admin:
                await until(lambda: admin.hlen(KEY) == 2)
            server.stop()
            one.presence.remove(NEWS, "goes")
            one.presence.add(NEWS, "comes", b"{}")
            with pytest.raises(Unavailable):
                await one.presence.read(NEWS)
            server.start()
            await within(30, one.wait_open())
            with server.client() as admin:
                await until(lambda: set(admin.hkeys(KEY)) == {b"stays", b"comes"})


async def test_what_redis_refuses_is_tried_again(server: Server, admin: Redis) -> None:
    async with site(server, "one:1") as one:
        await admin.set(KEY, "no hash")
        one.presence.add(NEWS, "a", b"{}")
        while not await admin.exists("relay:present:one:1"):
            await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await one.presence.read(NEWS)
        await admin.delete(KEY)
        await one.presence.check()
        while await admin.hkeys(KEY) != [b"a"]:
            await asyncio.sleep(0)


@pytest.fixture
def doomed(server: Server) -> Iterator[subprocess.Popen[str]]:
    """Run a worker `dead:1` with 1,200 clients in its own process."""
    command = [sys.executable, "-m", "tests.support.site"]
    command += [server.url("relay"), "dead:1", "news", "1200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        yield worker
        worker.kill()


async def test_a_killed_worker_leaves_nobody_behind_and_each_is_told_of_once(
    doomed: subprocess.Popen[str], server: Server, admin: Redis, client: Redis, keys: Keys
) -> None:
    dead = "dead:1"
    assert doomed.stdout is not None
    with doomed.stdout as lines:
        assert await asyncio.to_thread(lines.readline) == "present\n"
        await lives(admin, "one:1", "two:2")
        async with site(server, "one:1") as one, site(server, "two:2") as two:
            told: list[str] = []

            def gone(channel: Channel, clients: Mapping[str, bytes]) -> None:
                assert (channel, set(clients.values())) == (NEWS, {b"{}"})
                told.extend(clients)

            for each in (one, two):
                each.presence.on_clients_lost(gone)
            one.presence.add(NEWS, "mine", b"{}")
            assert len(await two.presence.read(NEWS)) >= 1200
            doomed.kill()
            doomed.wait()
            # Its heartbeat expires by itself. The test does not wait for it.
            await admin.pexpire(f"relay:node:{dead}", 1)
            while len(await two.presence.read(NEWS)) > 1:
                await asyncio.sleep(0)
            silence = DeadWorkerDetector(client=client, keys=keys, patience_s=0)
            assert await silence.check() == []
            assert await silence.check() == [dead]
            async with asyncio.TaskGroup() as both:
                for each in (one, two):
                    both.create_task(each.presence.clear(dead))
            assert sorted(told) == sorted(f"{dead}-{number}" for number in range(1200))
            assert await admin.hkeys(KEY) == [b"mine"]
            assert not await admin.exists(f"relay:present:{dead}")


async def test_a_worker_that_was_taken_for_dead_is_there_again(
    doomed: subprocess.Popen[str], server: Server, admin: Redis
) -> None:
    assert doomed.stdout is not None
    with doomed.stdout as lines:
        assert await asyncio.to_thread(lines.readline) == "present\n"
        async with site(server, "one:1") as one:
            doomed.send_signal(signal.SIGSTOP)
            await admin.delete("relay:node:dead:1")
            await one.presence.clear("dead:1")
            assert not await one.presence.read(NEWS)
            doomed.send_signal(signal.SIGCONT)
            async with asyncio.timeout(30):
                while len(await one.presence.read(NEWS)) < 1200:
                    await asyncio.sleep(0.05)
            assert await admin.smembers("relay:present:dead:1") == {b"news"}


async def test_the_registration_goes_last(
    server: Server, admin: Redis, clients: ShardClients, keys: Keys
) -> None:
    await admin.sadd("relay:nodes", "dead:1")
    await admin.sadd("relay:present:dead:1", "news", "no channel {")
    await admin.hset(KEY, "a", "dead:1\n{}")
    async with site(server, "one:1") as one:
        told: list[str] = []
        one.presence.on_clients_lost(lambda _, clients: told.extend(clients))
        job = DeadWorkersJob(
            clients=clients, keys=keys, dead="dead:1".__eq__, clear=one.presence.clear
        )
        # The job has found the worker to be dead, so other workers do not wait for its heartbeat.
        assert await job.remove() == ["dead:1"]
        assert told == ["a"]
        assert not await admin.keys("relay:pres*")
        assert not await admin.smembers("relay:nodes")


@pytest.mark.parametrize("frozen_s", [19.0, 60.0])
async def test_after_a_freeze_each_leave_is_sent_once(
    server: Server, admin: Redis, frozen_s: float
) -> None:
    await lives(admin, "one:1", "two:2")
    async with site(server, "one:1") as one, site(server, "two:2") as two:
        reconnecting: list[set[str]] = []
        leaves: list[str] = []

        def reconnect(clients: set[str]) -> None:
            reconnecting.append(clients)
            for client in clients:
                one.presence.remove(NEWS, client)
                one.presence.add(NEWS, f"{client} again", b"{}")

        one.presence.on_own_removed(reconnect)
        for each in (one, two):
            each.presence.on_clients_lost(lambda _, clients: leaves.extend(clients))
        one.presence.add(NEWS, "a", b"{}")
        while await two.presence.read(NEWS) != {"a": b"{}"}:
            await asyncio.sleep(0)
        # Nobody can have removed the clients yet.
        one.presence.on_wake(12.0)
        await one.presence.check()
        assert not reconnecting
        await two.presence.clear("one:1")
        one.presence.add(NEWS, "b", b"{}")
        while await two.presence.read(NEWS) != {"b": b"{}"}:
            await asyncio.sleep(0)
        one.presence.on_wake(frozen_s)
        # Already now: the leave messages that wait to be read must not reach these clients.
        assert reconnecting == [{"a", "b"}]
        async with asyncio.timeout(30):
            while leaves != ["a", "b"] or len(await two.presence.read(NEWS)) != 2:
                await asyncio.sleep(0.01)
        assert await two.presence.read(NEWS) == {"a again": b"{}", "b again": b"{}"}
        assert await admin.smembers("relay:present:one:1") == {b"news"}
        await one.presence.check()
        assert len(reconnecting) == 1
