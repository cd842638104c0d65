"""relay/stream/cluster/workers.py on real servers, with relay's rights."""

from __future__ import annotations

import argparse
import asyncio
import json

import orjson
import pytest
from redis.asyncio import Redis

from relay.cli.operator_context import OperatorContext
from relay.cli.workers import status
from relay.config.loading import load as load_config
from relay.core.errors import RelayError, StartError, WorkerUnreachable
from relay.core.model import Channel
from relay.core.worker_deaths import WorkerDeaths
from relay.stream.cluster import leases, workers
from relay.stream.cluster.directory import WorkerDirectory
from relay.stream.connection.connect import command
from relay.stream.connection.refusals import Refusals
from relay.stream.format.keys import Keys
from relay.stream.read import groups, stream_commands
from relay.stream.shards.clients import ShardClients, shard_clients
from relay.stream.upkeep import dead_workers
from relay.stream.upkeep.unused import remove_unused
from tests.support.valkey import Server

pytestmark = pytest.mark.redis
NEWS = Channel("news")


def heartbeat(client: Redis, keys: Keys, name: str) -> tuple[str, workers.WorkerHeartbeat]:
    instance = workers.new_instance(name)
    worker = workers.describe_this_worker(name, instance, "1.2")
    return instance, workers.WorkerHeartbeat(client=client, keys=keys, worker=worker)


async def test_the_living_say_who_they_are(
    client: Redis, admin: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    instance, beat = heartbeat(client, keys, "one")
    await beat.beat()
    (node,) = await workers.live_workers(client, keys)
    assert (node.instance, node.name, node.version) == (instance, "one", "1.2")
    assert 10 < await admin.ttl(keys.node(instance)) <= 15
    await admin.set(keys.node("strange"), "x")
    await admin.sadd(keys.nodes, "strange")
    # Another version may write anything.
    values = orjson.loads(await admin.get(keys.node(instance)) or b"")
    for name, value in (("schema", "2"), ("schema", None), ("lag_ms", "x"), ("host", None)):
        await admin.set(keys.node("strange"), orjson.dumps({**values, name: value}))
        assert await workers.list_workers(client, keys) == ([node], ["strange"])
        assert f"worker strange, which this version cannot read ({name}: " in caplog.text
        caplog.clear()
    newer = {**values, "schema": 10**30, "compatible_since": 10**30, "more": []}
    # Its other fields may be unreadable.
    for changed in ({}, {"lag_ms": {"max": 1}}):
        await admin.set(keys.node("strange"), json.dumps({**newer, **changed}))
        with pytest.raises(StartError, match="writes schema 1000"):
            await workers.check_schema(client, keys)
    await beat.leave()
    await admin.delete(keys.node("strange"))
    assert await workers.live_workers(client, keys) == []
    assert await admin.smembers(keys.nodes) == {b"strange"}


async def test_a_worker_that_is_not_ready_is_written_more_often(
    client: Redis, admin: Redis, keys: Keys
) -> None:
    instance, ready = "one:1", False

    def load() -> workers.WorkerLoad:
        return workers.WorkerLoad(ready=ready, connections=0, streams=0, lag_ms=0)

    worker = workers.describe_this_worker("one", instance, "1")
    beat = workers.WorkerHeartbeat(client=client, keys=keys, worker=worker, load=load)
    await beat.beat()
    ready = True
    await beat.beat_unless_ready()
    assert [worker.ready for worker in await workers.live_workers(client, keys)] == [True]
    await admin.delete(keys.node(instance))
    await beat.beat_unless_ready()
    assert await workers.live_workers(client, keys) == []


async def test_status_shows_a_worker_that_redis_rejects_while_it_runs(
    server: Server,
    client: Redis,
    admin: Redis,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refusals = Refusals()
    configuration = load_config(None, environ={}, overrides=[], flags={}, doors={})

    def load() -> workers.WorkerLoad:
        return workers.WorkerLoad(
            ready=True, connections=0, streams=0, lag_ms=0, refused=str(refusals)
        )

    async def problems() -> str:
        options = argparse.Namespace(json=True, min_workers=1, max_lag=5, max_dead_letters=None)
        async with shard_clients(server.settings("admin")) as operators:
            site = OperatorContext(config=configuration, clients=operators, keys=keys)
            code = await status(site, options)
        found = json.loads(capsys.readouterr().out)["wrong"]
        assert code == bool(found)
        return "; ".join(found)

    worker = workers.describe_this_worker("one", "one:1", "1")
    beat = workers.WorkerHeartbeat(
        client=client, keys=keys, worker=worker, load=load, refusals=refusals
    )
    await beat.beat()
    assert await problems() == ""
    try:
        await command(admin, "ACL", "SETUSER", "relay", "-sadd")
        await beat.beat()
        # Twice a second.
        await beat.beat_unless_ready()
        assert "Redis refuses the list of workers (NOPERM" in await problems()
        await command(admin, "ACL", "SETUSER", "relay", "+sadd")
        await beat.beat()
        await beat.beat_unless_ready()
        assert await problems() == ""
        await command(admin, "ACL", "SETUSER", "relay", "-set")
        monkeypatch.setattr(workers, "DEAD_AFTER_S", 0.3)
        await beat.beat()
        async with asyncio.timeout(30):
            while "one:1 has not written its heartbeat for" not in await problems():
                await asyncio.sleep(0.05)
        await command(admin, "ACL", "SETUSER", "relay", "+set")
        await beat.beat()
        await beat.beat_unless_ready()
        assert await problems() == ""
    finally:
        await command(admin, "ACL", "LOAD")


async def test_a_full_redis_does_not_hide_the_other_workers(
    client: Redis, admin: Redis, keys: Keys
) -> None:
    def directory() -> WorkerDirectory:
        return WorkerDirectory(client=client, keys=keys, deaths=WorkerDeaths())

    instance = workers.new_instance("one")
    worker = workers.describe_this_worker("one", instance, "1.2")
    beat = workers.WorkerHeartbeat(client=client, keys=keys, worker=worker)
    await beat.publish_internal("10.0.0.5:7400")
    before, after = directory(), directory()
    await before.refresh()
    assert len(before.key) == 32
    await admin.config_set("maxmemory", "1")
    try:
        address = instance.rpartition(":")[2]
        # Of a worker that was not known yet.
        assert await after.address_of(address) == ("10.0.0.5", 7400)
        await before.refresh()
        assert before.key == after.key
        # The key that the workers have stays in use until they can agree on a new one.
        await admin.delete(keys.internal_key)
        with pytest.raises(RelayError):
            await before.refresh()
        assert before.key == after.key
        assert await before.address_of(address) == ("10.0.0.5", 7400)
    finally:
        await admin.config_set("maxmemory", "0")
    await after.refresh()
    await before.refresh()
    assert before.key == after.key == await admin.get(keys.internal_key)


async def test_a_worker_that_has_just_opened_its_address_is_found(
    client: Redis, keys: Keys
) -> None:
    instance, beat = heartbeat(client, keys, "one")
    await beat.beat()
    directory = WorkerDirectory(client=client, keys=keys, deaths=WorkerDeaths())
    await directory.refresh()
    # A heartbeat that has begun before does not replace the one with the address.
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(beat.beat())
        tasks.create_task(beat.publish_internal("10.0.0.5:7400"))
        tasks.create_task(beat.beat_unless_ready())
    address = instance.rpartition(":")[2]
    assert await directory.address_of(address) == ("10.0.0.5", 7400)


async def test_workers_that_start_together_have_one_key(client: Redis, keys: Keys) -> None:
    made = [WorkerDirectory(client=client, keys=keys, deaths=WorkerDeaths()) for _ in range(8)]
    async with asyncio.TaskGroup() as tasks:
        for each in made:
            tasks.create_task(each.refresh())
    assert len({each.key for each in made}) == 1


async def test_a_worker_whose_heartbeat_has_expired_is_not_dead_yet(
    client: Redis, admin: Redis, keys: Keys
) -> None:
    deaths = WorkerDeaths()
    directory = WorkerDirectory(client=client, keys=keys, deaths=deaths)
    instance = workers.new_instance("one")
    worker = workers.describe_this_worker("one", instance, "1.2")
    beat = workers.WorkerHeartbeat(client=client, keys=keys, worker=worker)
    await beat.publish_internal("10.0.0.5:7400")
    await directory.refresh()
    # After an outage of Redis, or in a freeze of the worker, which still has its sessions.
    await admin.delete(keys.node(instance))
    await directory.refresh()
    address = instance.rpartition(":")[2]
    assert await directory.address_of(address) == ("10.0.0.5", 7400)
    other = WorkerDirectory(client=client, keys=keys, deaths=deaths)
    with pytest.raises(WorkerUnreachable):
        await other.address_of(address)
    deaths.report(instance)
    assert await directory.address_of(address) is await other.address_of(address) is None
    await beat.beat()
    await other.refresh()
    assert await other.address_of(address) == ("10.0.0.5", 7400)


async def test_what_the_dead_left_is_removed_after_a_while(
    client: Redis, clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    alive, alive_beat = heartbeat(client, keys, "alive")
    dead, dead_beat = heartbeat(client, keys, "dead")
    await alive_beat.beat()
    await dead_beat.beat()
    used, unused, shared = (keys.stream(Channel(name)) for name in ("used", "unused", "shared"))
    await admin.xadd(used, {"data": "1"})
    for key in (used, unused, shared):
        await command(admin, *groups.create_marker(key, 5, 1))
        await admin.xgroup_create(key, groups.group_of(dead))
    await admin.xgroup_create(shared, groups.group_of(alive))
    await admin.set(keys.stream(Channel("foreign")), "x")

    job = dead_workers.DeadWorkersJob(clients=clients, keys=keys, patience_s=0.05)
    assert await job.remove() == []
    await admin.delete(keys.node(dead))
    assert await job.remove() == []
    assert await job.remove() == []
    await asyncio.sleep(0.06)
    assert await job.remove() == [dead]
    assert await job.remove() == []
    assert await admin.smembers(keys.nodes) == {alive.encode()}
    assert await group_names(admin, used) == {groups.MARKER_GROUP}
    assert await group_names(admin, shared) == {groups.MARKER_GROUP, groups.group_of(alive)}
    assert not await admin.exists(unused)


async def group_names(admin: Redis, key: bytes) -> set[bytes]:
    raw = await command(admin, "XINFO", "GROUPS", key)
    return set(stream_commands.parse_groups(raw))


async def test_an_outage_kills_nobody(
    client: Redis, clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    instance, beat = heartbeat(client, keys, "one")
    await beat.beat()
    job = dead_workers.DeadWorkersJob(clients=clients, keys=keys, patience_s=0)
    await admin.delete(keys.node(instance))
    assert await job.remove() == []
    await beat.beat()
    assert await job.remove() == []
    assert [node.instance for node in await workers.live_workers(client, keys)] == [instance]


@pytest.mark.parametrize("what", ["entry", "once", "follower", "id"])
async def test_a_stream_that_someone_used_stays(
    clients: ShardClients, admin: Redis, keys: Keys, what: str
) -> None:
    key = keys.stream(NEWS)
    await command(admin, *groups.create_marker(key, 5, 1))
    match what:
        case "entry":
            await admin.xadd(key, {"data": "1"})
        case "once":
            await admin.xadd(key, {"data": "1"})
            await admin.xtrim(key, maxlen=0, approximate=False)
        case "follower":
            await admin.xgroup_create(key, "mine")
        case _:
            await command(admin, "XSETID", key, "5-0")
    ((_, client, _),) = await clients.split([key])
    assert await remove_unused(client, [key]) == 0
    assert await admin.exists(key)


async def test_an_entry_appended_meanwhile_is_never_lost(
    server: Server, clients: ShardClients, keys: Keys
) -> None:
    """Appends and removals race on one stream. Every append that returned an ID is in the stream.

    The removal only deletes the stream while it is empty.
    """
    key = keys.stream(NEWS)
    rounds = 300
    ((_, client, _),) = await clients.split([key])
    async with shard_clients(server.settings("admin")) as admins:
        ((_, admin, _),) = await admins.split([key])
        for n in range(rounds):
            await admin.delete(key)
            await command(admin, *groups.create_marker(key, 5, 1))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(remove_unused(client, [key]))
                for _ in range(n % 7):
                    await asyncio.sleep(0)
                await admin.xadd(key, {"data": "1"})
            assert await admin.xlen(key) == 1


@pytest.fixture
def lease(client: Redis, keys: Keys) -> leases.Lease:
    return leases.Lease(client=client, keys=keys, name="trim", instance="one", ttl_s=60)


async def test_a_lease_has_one_holder(
    client: Redis, admin: Redis, keys: Keys, lease: leases.Lease
) -> None:
    other = leases.Lease(client=client, keys=keys, name="trim", instance="two", ttl_s=60)
    assert await lease.hold()
    assert not await other.hold()
    await admin.pexpire(keys.lease("trim"), 5000)
    assert await lease.hold()
    assert await admin.pttl(keys.lease("trim")) > 5000
    await other.release()
    assert not await other.hold()
    await lease.release()
    assert await other.hold()
    assert not await lease.hold()
