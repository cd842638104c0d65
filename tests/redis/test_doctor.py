"""`relay doctor` on real servers, each with one fault that the doctor must name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from producers.registry import producer_settings
from relay.config.loading import Config, load
from relay.process.doctor.examination import examine
from relay.process.doctor.finding import Finding, Level
from relay.protocols import door_settings
from relay.stream.cluster.workers import WorkerHeartbeat, describe_this_worker
from relay.stream.connection.connect import command, redis_client
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import shard_clients
from relay.stream.upkeep import reports
from tests.support.relay import KEY
from tests.support.valkey import Server, free_port, running

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"), "redis")
    with running(server):
        yield server


@pytest.fixture
def healthy(redis_server: Server) -> Iterator[Server]:
    """Return an empty server without faults, and restore its configuration afterwards."""
    kept = ("maxmemory", "maxmemory-policy", "appendonly", "appendfsync", "save")
    with redis_server.client() as admin:
        admin.flushall()
        admin.config_set("maxmemory", "500mb")
        before: Any = admin.config_get(*kept)
        yield redis_server
        for name, value in before.items():
            admin.config_set(name, value)
        admin.acl_load()


def configured(server: Server, *overrides: str, user: Any = "relay") -> Config:
    settings = [f"redis.url={server.url(user)}", f"jwt.key={KEY}", f"server.port={free_port()}"]
    return load(
        None,
        environ={},
        overrides=[*settings, *overrides],
        flags={},
        doors=door_settings(),
        producers=producer_settings(),
    )


async def findings(config: Config) -> dict[str, Finding]:
    """Return the findings by name, without those about the host that runs this test."""
    async with shard_clients(config.redis) as clients:
        found = await examine(config, clients, Keys(config.redis.prefix))
    return {each.name: each for each in found if each.area != "host"}


@asynccontextmanager
async def administrator(server: Server) -> AsyncIterator[Redis]:
    async with redis_client(server.settings("admin")) as client:
        yield client


async def test_a_sound_installation_has_no_errors(healthy: Server) -> None:
    found = await findings(configured(healthy))
    # Debian's Redis 7.0 has a known fault, and its user may not read appendfsync.
    with healthy.client() as admin:
        is_debian = str(admin.info("server")["redis_version"]).startswith("7.0.")
    assert set(found) == {
        *({"redis.version"} if is_debian else ()),
        "redis.appendfsync",
        "configuration.allowed_origins",
    }
    assert all(each.level is not Level.ERROR for each in found.values())
    assert all(each.what and each.why and each.fix for each in found.values())


@pytest.mark.parametrize(
    ("setting", "value", "name", "level", "fix"),
    [
        ("maxmemory-policy", "allkeys-lru", "redis.eviction", "error", "noeviction"),
        ("maxmemory-policy", "volatile-ttl", "redis.eviction", "warning", "noeviction"),
        ("maxmemory", "0", "redis.maxmemory", "warning", "CONFIG SET maxmemory"),
        ("maxmemory", "1mb", "redis.memory", "error", "CONFIG SET maxmemory 2mb"),
        ("appendonly", "no", "redis.aof", "warning", "CONFIG SET appendonly yes"),
    ],
)
async def test_settings_of_redis(
    healthy: Server, setting: str, value: str, name: str, level: str, fix: str
) -> None:
    async with administrator(healthy) as admin:
        await admin.config_set(setting, value)
        found = (await findings(configured(healthy)))[name]
    assert found.level.value == level
    assert fix in found.fix


async def test_fsync_is_checked_by_a_user_with_the_right_to_it(healthy: Server) -> None:
    async with administrator(healthy) as admin:
        await admin.config_set("appendfsync", "no")
    found = await findings(configured(healthy, user="admin"))
    assert found["redis.appendfsync"].level is Level.ERROR
    assert "appendfsync everysec" in found["redis.appendfsync"].fix


async def test_evicted_keys(healthy: Server) -> None:
    async with administrator(healthy) as admin:
        await admin.config_set("maxmemory-policy", "allkeys-random")
        for number in range(50):
            await admin.xadd(f"relay:stream:{{filler{number}}}", {"data": "1" * 1000})
        await admin.config_set("maxmemory", "1mb")
        await admin.config_set("maxmemory", "500mb")
        assert (await admin.info("stats"))["evicted_keys"] > 0
        found = await findings(configured(healthy))
    assert found["redis.evicted"].level is Level.ERROR


async def test_missing_rights_are_named_with_the_command_that_grants_them(healthy: Server) -> None:
    async with administrator(healthy) as admin:
        await command(admin, "ACL", "SETUSER", "relay", "-xtrim", "-client|tracking")
        found = await findings(configured(healthy))
    assert found["redis.rights"].level is Level.ERROR
    assert found["redis.tracking"].level is Level.WARNING
    text = found["redis.rights"].what + found["redis.rights"].fix
    assert "user relay" in text
    assert "ACL SETUSER relay +" in text


async def test_a_server_that_rejects_info_is_shown_with_its_error(healthy: Server) -> None:
    config = configured(healthy)
    async with administrator(healthy) as admin:
        await command(admin, "ACL", "SETUSER", "relay", "-info")
    async with shard_clients(config.redis) as clients:
        (shown,) = await reports.servers(clients)
    assert "NOPERM" in str(shown["error"])
    assert "docs/redis.md" in str(shown["error"])


async def test_a_replica_and_replicas_that_nobody_waits_for(
    healthy: Server, tmp_path: Path
) -> None:
    lost = await findings(configured(healthy, "namespace.durability=replicated"))
    assert lost["redis.wait"].level is Level.ERROR
    lost = await findings(configured(healthy, "namespace.durability=fsynced"))
    assert "durability fsynced is not available" in lost["redis.durability"].what
    replica = Server(tmp_path, "redis", replica_of=healthy)
    with running(replica):
        async with administrator(healthy) as admin, administrator(replica) as other:
            while (await other.info("replication"))["master_link_status"] != "up":
                await asyncio.sleep(0.02)
            # The primary reports the replica as online after its first acknowledgement.
            assert await admin.wait(1, 30_000) == 1
        found = await findings(configured(replica))
        assert found["redis.replica"].level is Level.ERROR
        assert str(healthy.port) in found["redis.replica"].fix
        found = await findings(configured(healthy))
        assert found["redis.wait"].level is Level.WARNING
        assert "durability = replicated" in found["redis.wait"].fix
        found = await findings(configured(healthy, "namespace.durability=replicated"))
        assert "redis.wait" not in found


async def test_redis_is_away_and_the_password_is_wrong(healthy: Server) -> None:
    for url in (
        f"redis://127.0.0.1:{free_port()}/0",
        f"redis://relay:wrong@127.0.0.1:{healthy.port}/0",
    ):
        found = await findings(configured(healthy, f"redis.url={url}"))
        assert found["redis.unreachable"].level is Level.ERROR
        assert "wrong@" not in found["redis.unreachable"].what


async def test_keys_that_are_not_streams_of_channels(healthy: Server) -> None:
    async with administrator(healthy) as admin:
        await admin.xadd("relay:stream:news", {"data": "1"})
        await admin.set("relay:stream:{list}", "x")
        found = await findings(configured(healthy))
        assert found["data.misnamed"].level is Level.ERROR
        fix = found["data.misnamed"].fix.partition("redis-cli ")[2]
        assert fix == "RENAMENX 'relay:stream:news' 'relay:stream:{news}'"
        await command(admin, *fix.replace("'", "").split())
        assert found["data.foreign"].level is Level.ERROR
        await admin.delete("relay:stream:{list}")
        found = await findings(configured(healthy))
    assert not {name for name in found if name.startswith("data.")}


async def test_streams_without_retention_orphaned_groups_and_queues(healthy: Server) -> None:
    async with administrator(healthy) as admin:
        await admin.xadd("relay:stream:{logs:a}", {"data": "1"})
        await admin.xadd("relay:stream:{news}", {"data": "1"})
        await admin.xadd("relay:stream:{it's}", {"data": "1"})
        for key in ("relay:stream:{news}", "relay:stream:{it's}"):
            await admin.xgroup_create(key, "relay:web9_8000:b7e2d604", "0")
        await admin.rpush("centrifugo.api", "{}")
        endless = ["namespace:logs.retention_count=0", "namespace:logs.retention_age_s=0"]
        found = await findings(configured(healthy, *endless))
    assert "[namespace:logs]" in found["data.retention"].what
    assert "logs:a" in found["data.retention"].what
    assert "news" not in found["data.retention"].what
    # A name cannot end the quotes.
    for key in ("'relay:stream:{news}'", r"'relay:stream:{it'\''s}'"):
        fix = f"redis-cli XGROUP DESTROY {key} 'relay:web9_8000:b7e2d604'"
        assert fix in found["data.orphaned_groups"].fix
    assert found["data.queue"].fix == "[producer:queue]\nenabled = yes"


async def test_a_worker_of_an_incompatible_version(healthy: Server) -> None:
    config = configured(healthy)
    keys = Keys(config.redis.prefix)
    newer = replace(
        describe_this_worker("other", "other:5f0c9a31", "9.0"), schema=99, compatible_since=99
    )
    async with redis_client(config.redis) as client:
        await WorkerHeartbeat(client=client, keys=keys, worker=newer).beat()
    found = (await findings(config))["data.incompatible_worker"]
    assert found.level is Level.ERROR
    assert "worker other:5f0c9a31 (relay 9.0)" in found.what


async def test_a_configuration_that_serve_rejects(healthy: Server) -> None:
    found = await findings(configured(healthy, "protocol:socketio.secret=short"))
    assert "too short" in found["configuration.rejected"].what
    assert found["configuration.rejected"].level is Level.ERROR


async def test_each_of_several_servers_is_checked(healthy: Server, tmp_path: Path) -> None:
    options = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    second = Server(tmp_path, "redis", options=options)
    with running(second):
        url = f"redis.url={healthy.url('relay')},{second.url('relay')}"
        found = await findings(configured(healthy, url))
    assert str(second.port) in found["redis.eviction"].what
    assert "redis.rights" not in found
    assert "redis.tracking" not in found
