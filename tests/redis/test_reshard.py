"""`relay reshard` between real servers: streams move whole, once, and only if they must."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import pytest
from typing_extensions import override

from relay.config.settings import RedisSettings
from relay.core.errors import RelayError, StartError
from relay.core.model import Channel, EntryID
from relay.stream.connection import connect
from relay.stream.connection.connect import command
from relay.stream.connection.primary import certificate_of
from relay.stream.format.keys import Keys
from relay.stream.read.groups import MARKER_GROUP, create_marker, group_of
from relay.stream.shards.clients import ShardClients, shard_clients
from relay.stream.shards.hash_map import ServerShard
from relay.stream.shards.server_list import check_list, store_list
from relay.stream.upkeep.reshard import Move, Reshard, Resharded
from tests.support.cli import run_here
from tests.support.valkey import Server, binary, running

pytestmark = pytest.mark.redis
CHANNELS = [Channel(f"c{number}") for number in range(40)]
ONE = Keys("relay:")
LIFE = 5


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    found = [Server(tmp_path_factory.mktemp("server")) for _ in range(3)]
    with running(*found):
        yield found


@pytest.fixture(autouse=True)
def _empty(servers: list[Server]) -> None:
    for server in servers:
        with server.client() as client:
            client.flushall()


def settings(*servers: Server) -> RedisSettings:
    return RedisSettings(url=", ".join(server.url("maintenance") for server in servers))


async def fill(client: Any, certificate: int) -> None:
    for channel in CHANNELS:
        key = ONE.stream(channel)
        await command(client, *create_marker(key, LIFE, certificate))
        for number in range(1, 6):
            await command(client, "XADD", key, f"{number}-0", "data", channel)
        await command(client, "XDEL", key, "2-0")
        await command(client, "XGROUP", "CREATE", key, group_of("w:1"), "3-0")
        await command(client, "HSET", ONE.rights(channel), "anna", "r")
        await command(client, "SET", ONE.uid(channel, "u"), "1-0", "PX", 100_000)
    await command(client, "SET", ONE.source_position("emits"), "5")
    await command(client, "SADD", ONE.group("kitchen"), "anna")
    await command(client, "SET", "other", "not relay's")


async def certificate(client: Any) -> int:
    information = await command(client, "INFO", "replication")
    return certificate_of(information["master_replid"].encode())


async def reshard(clients: ShardClients, *old: ShardClients, dry: bool = False) -> Resharded:
    work = Reshard(clients, old, Keys("relay:", has_site_tag=len(clients.shards.shards) > 1))
    await work.connect()
    try:
        return await work.run(dry=dry, progress=lambda _: None)
    finally:
        await work.release()


async def where(clients: ShardClients) -> dict[Channel, str]:
    found: dict[Channel, str] = {}
    for shard, client in await clients.each():
        for channel in CHANNELS:
            if await command(client, "EXISTS", ONE.stream(channel)):
                assert channel not in found
                found[channel] = shard.name
    return found


async def test_streams_move_whole_and_only_where_they_must(servers: list[Server]) -> None:
    one, two, three = servers
    with one.client() as admin:
        own = certificate_of(admin.info("replication")["master_replid"].encode())
    async with shard_clients(one.settings("admin")) as filled:
        await fill(filled.home, own)
    async with shard_clients(settings(one, two)) as clients:
        counted = await reshard(clients, dry=True)
        assert len(await where(clients)) == 40
        moved = await reshard(clients)
        assert counted.streams == moved.streams
        assert moved.unproven == 0
        before = await where(clients)
        assert before == {each: clients.shards.shard_of(ONE.stream(each)).name for each in CHANNELS}
        assert 5 < sum(moved.streams.values()) < 35
        keys = Keys("relay:", has_site_tag=True)
        assert await command(clients.home, "GET", keys.source_position("emits")) == b"5"
        assert await command(clients.home, "SMEMBERS", keys.group("kitchen"))
        await _check(clients)
        assert not (await reshard(clients)).keys
    async with shard_clients(settings(one, two, three)) as clients:
        await reshard(clients)
        after = await where(clients)
        assert after == {each: clients.shards.shard_of(ONE.stream(each)).name for each in CHANNELS}
        # Streams move to the new server only.
        new = {after[each] for each in CHANNELS if after[each] != before[each]}
        assert len(new) == 1
        await _check(clients)
    async with (
        shard_clients(settings(three, two)) as clients,
        shard_clients(settings(one)) as removed,
    ):
        await reshard(clients, removed)
        assert len(await where(clients)) == 40
        assert not await where(removed)
        await _check(clients)


async def _check(clients: ShardClients) -> None:
    for channel in CHANNELS:
        key = ONE.stream(channel)
        client = clients.for_key(key)
        info = await command(client, "XINFO", "STREAM", key)
        assert (info[b"length"], info[b"entries-added"]) == (4, 5)
        assert info[b"max-deleted-entry-id"] == b"2-0"
        groups = await command(client, "XINFO", "GROUPS", key)
        ids = {each[b"name"]: each[b"last-delivered-id"] for each in groups}
        assert ids[group_of("w:1")] == b"3-0"
        # The same life, so that clients resume, and the certificate of the present server.
        marker = EntryID.parse(ids[MARKER_GROUP])
        assert marker.ms == LIFE
        assert marker.seq & 0xFFFFFFFF == await certificate(client)
        assert await command(client, "HGET", ONE.rights(channel), "anna") == b"r"
        assert 0 < await command(client, "PTTL", ONE.uid(channel, "u")) <= 100_000


async def test_what_is_not_proven_or_exists_twice_is_reported(servers: list[Server]) -> None:
    one, two, _ = servers
    async with shard_clients(one.settings("admin")) as filled:
        await fill(filled.home, 77)  # examined before a failover
    async with shard_clients(settings(one, two)) as clients:
        away = [
            each
            for each in CHANNELS
            if clients.shards.shard_of(ONE.stream(each)).name.endswith(f":{two.port}")
        ]
        twice, empty = ONE.stream(away[0]), ONE.stream(away[1])
        with two.client() as admin:
            admin.xadd(twice, {"data": "other"})
            admin.execute_command(*create_marker(empty, 1, 1))
        result = await reshard(clients)
        assert [move.key for move in result.conflicts] == [twice]
        assert result.unproven == len(away) - 1
        with one.client() as first, two.client() as second:
            assert (first.xlen(twice), second.xlen(twice)) == (4, 1)
            assert (first.exists(empty), second.xlen(empty)) == (0, 4)


async def test_a_running_worker_is_found(servers: list[Server]) -> None:
    one, two, _ = servers
    with one.client() as admin:
        admin.sadd("relay:nodes", "w:1")
        worker = (
            '{"instance": "w:1", "name": "w", "host": "h", "pid": 1, "started": "", "version": ""}'
        )
        admin.set("relay:node:w:1", worker)
    async with shard_clients(settings(one, two)) as clients:
        work = Reshard(clients, [], Keys("relay:", has_site_tag=True))
        await work.connect()
        assert await work.live() == ["w:1"]


async def test_a_cluster_moves_its_keys_itself() -> None:
    async with shard_clients(RedisSettings(url="redis+cluster://127.0.0.1:1")) as clients:
        with pytest.raises(RelayError, match="redis-cli --cluster reshard"):
            Reshard(clients, [], Keys("relay:", has_site_tag=True))


async def test_a_server_of_the_present_list_must_not_be_forgotten(servers: list[Server]) -> None:
    one, two, _ = servers
    async with shard_clients(settings(one, two)) as clients:
        await store_list(clients, Keys("relay:", has_site_tag=True))
    async with shard_clients(settings(one)) as clients, shard_clients(settings(two)) as removed:
        with pytest.raises(RelayError, match=rf":{two.port}/0: add --removed"):
            await reshard(clients, dry=True)
        assert not (await reshard(clients, removed)).keys


async def test_keys_that_are_written_meanwhile_are_neither_lost_nor_overlooked(
    servers: list[Server],
) -> None:
    one, two, _ = servers
    async with shard_clients(one.settings("admin")) as filled:
        await fill(filled.home, 77)
    written: list[bytes] = []
    async with shard_clients(settings(one, two)) as clients:
        work = Reshard(clients, [], Keys("relay:", has_site_tag=True))
        await work.connect()
        mine, other = [
            channel
            for channel in CHANNELS
            if clients.shards.shard_of(ONE.stream(channel)).name.endswith(f":{two.port}")
        ][:2]
        with one.client() as first, two.client() as second:

            def progress(_: int) -> None:
                if not written:
                    # A producer uses the new list already, and one uses the old list.
                    for client, channel in ((second, mine), (first, other)):
                        client.xadd(ONE.stream(channel), {"data": "late"})
                        written.append(ONE.stream(channel))

            result = await work.run(dry=False, progress=progress)
            late = await work.count_misplaced(result)
            lengths = [[client.xlen(key) for client in (first, second)] for key in written]
        # Each entry is on one of the servers. What is not on its own server was reported.
        assert [sum(each) for each in lengths] == [5, 5]
        assert len(result.conflicts) + late == sum(first_length > 0 for first_length, _ in lengths)


async def test_a_changed_copy_is_not_deleted(servers: list[Server]) -> None:
    one, two, _ = servers
    async with shard_clients(settings(one, two)) as clients:
        work = Reshard(clients, [], Keys("relay:", has_site_tag=True))
        await work.connect()
        key = ONE.stream(CHANNELS[0])
        with two.client() as target:
            target.xadd(key, {"data": "copied"})
            payload: Any = target.dump(key)
            target.xadd(key, {"data": "appended by a producer"})
        shards = clients.shards.shards
        move = Move(cast(ServerShard, shards[0]), cast(ServerShard, shards[1]), key, key)
        _, client = (await clients.each())[1]
        assert not await work.delete_copy(client, move, payload)
        assert await command(client, "XLEN", key) == 2


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a server of an older version, unless the tests run with one version only."""
    found = Server(tmp_path_factory.mktemp("older"), "redis")
    with running(found):
        yield found


def misplaced(clients: ShardClients, *, on: Server) -> Channel:
    """Return a channel of which the keys belong to another server."""
    shards = clients.shards
    return next(
        each for each in CHANNELS if str(on.port) not in shards.shard_of(ONE.stream(each)).name
    )


@pytest.mark.parametrize("is_interrupted", [False, True])
async def test_contents_are_compared_if_servers_store_them_in_another_form(
    servers: list[Server], older: Server, is_interrupted: bool
) -> None:
    if binary("redis") != binary("valkey"):
        with older.client() as admin:
            if not str(admin.info("server")["redis_version"]).startswith("7."):
                pytest.skip("Valkey reads keys of Redis 7 only")
    # Redis serializes large hashes and sets in an order that depends on the process.
    large = {f"user{number}": "r" for number in range(1000)}
    async with shard_clients(settings(older, servers[0])) as clients:
        channel = misplaced(clients, on=older)
        client = clients.for_key(ONE.stream(channel))
        with older.client() as admin:
            admin.flushall()
            admin.hset(ONE.rights(channel), mapping=large)
            admin.sadd(ONE.group("kitchen"), *large)
            admin.set(ONE.uid(channel, "u"), "1-0")
            admin.zadd(b"relay:other:{%s}" % channel.encode(), {"a": 1.5})
            admin.xadd(ONE.stream(channel), {"data": "1"})
            if is_interrupted:
                for key in (ONE.rights(channel), ONE.stream(channel)):
                    await command(client, "RESTORE", key, 0, admin.dump(key))
        result = await reshard(clients)
        assert (result.conflicts, result.keys.total()) == ([], 5)
        assert await command(client, "HGETALL", ONE.rights(channel)) == {
            user.encode(): b"r" for user in large
        }
        assert await command(client, "XLEN", ONE.stream(channel)) == 1
        assert not (await reshard(clients)).keys
        with older.client() as admin:
            assert not admin.exists(ONE.rights(channel), ONE.stream(channel))


async def test_a_server_that_cannot_read_the_keys_is_named_before_any_is_moved(
    servers: list[Server], older: Server
) -> None:
    if binary("redis") == binary("valkey"):
        pytest.skip("needs servers of two versions")
    async with shard_clients(settings(older, servers[0])) as clients:
        channel = misplaced(clients, on=servers[0])
        with older.client() as target, servers[0].client() as source:
            target.flushall()
            source.xadd(ONE.stream(channel), {"data": "1"})
            for dry in (True, False):
                expected = rf":{older.port} \(.*\) cannot read keys of .*:{servers[0].port} \("
                with pytest.raises(RelayError, match=expected):
                    await reshard(clients, dry=dry)
                assert (target.dbsize(), source.xlen(ONE.stream(channel))) == (0, 1)


async def test_another_name_of_a_server_loses_nothing(servers: list[Server]) -> None:
    one, two, _ = servers
    renamed = one.url("maintenance").replace("127.0.0.1", "localhost")
    async with shard_clients(one.settings("admin")) as filled:
        await fill(filled.home, await certificate(filled.home))
    async with (
        shard_clients(settings(one, two)) as clients,
        shard_clients(RedisSettings(url=renamed)) as removed,
    ):
        await reshard(clients, removed)
        assert len(await where(clients)) == 40
        await _check(clients)
    async with shard_clients(RedisSettings(url=f"{one.url('admin')}, {renamed}")) as clients:
        for refused in (reshard(clients), check_list(clients, Keys("relay:", has_site_tag=True))):
            with pytest.raises(StartError, match="127.0.0.1:.* and localhost:.* are the same"):
                await refused


async def test_lists_of_removed_servers_and_of_a_single_one(servers: list[Server]) -> None:
    one, two, _ = servers
    several = Keys("relay:", has_site_tag=True)
    async with shard_clients(settings(one, two)) as clients:
        await store_list(clients, several)
        async with shard_clients(settings(one)) as left:
            with pytest.raises(StartError, match="another list"):
                await check_list(left, ONE)
            await store_list(left, ONE, [clients])
            await check_list(left, ONE)
        with two.client() as admin:
            assert not admin.exists(several.servers)
        with pytest.raises(StartError, match="another list"):
            await check_list(clients, several)
    # Hosts may know a single server under different names.
    url = one.url("admin").replace("127.0.0.1", "localhost")
    async with shard_clients(RedisSettings(url=url)) as clients:
        await check_list(clients, ONE)


async def test_a_forgotten_reshard_is_noticed(servers: list[Server]) -> None:
    one, two, _ = servers
    async with shard_clients(one.settings("admin")) as filled:
        await fill(filled.home, 77)
    several = Keys("relay:", has_site_tag=True)
    url = f"{one.url('admin')}, {two.url('admin')}"
    async with shard_clients(RedisSettings(url=url)) as clients:
        with pytest.raises(StartError, match="belongs to another server of the list.*reshard"):
            await check_list(clients, several)
        await reshard(clients)
        await check_list(clients, several)


@pytest.mark.parametrize(
    "words", [["revoke", "c1", "anna"], ["grant", "c1", "anna"], ["publish", "c1", "1"], ["doctor"]]
)
async def test_commands_with_another_list_are_refused(
    servers: list[Server], words: list[str]
) -> None:
    one, two, _ = servers
    async with shard_clients(settings(one, two)) as clients:
        await store_list(clients, Keys("relay:", has_site_tag=True))
    environment = {"RELAY_REDIS_URL": one.url("maintenance"), "RELAY_SERVER_PORT": "0"}
    done = await asyncio.to_thread(run_here, words, environment)
    assert done.returncode == 1
    assert "[redis] url: this site uses another list of servers" in done.stdout + done.stderr
    with one.client() as admin:
        assert admin.keys() == [b"relay:servers"]


async def test_two_runs_at_a_time_lose_nothing(servers: list[Server]) -> None:
    one, two, _ = servers
    async with shard_clients(one.settings("admin")) as filled:
        await fill(filled.home, await certificate(filled.home))
    several = Keys("relay:", has_site_tag=True)
    async with shard_clients(settings(one, two)) as clients:
        first, second = (Reshard(clients, [], several) for _ in range(2))
        for each in (first, second):
            await each.connect()
        refused: list[RelayError] = []

        async def run(work: Reshard) -> None:
            try:
                await work.run(dry=False, progress=lambda _: None)
            except RelayError as exc:
                refused.append(exc)

        async with asyncio.TaskGroup() as tasks:
            for each in (first, second):
                tasks.create_task(run(each))
        assert refused
        assert all("another relay reshard uses" in str(each) for each in refused)
        for each in (first, second):
            await each.release()
        await reshard(clients)
        assert len(await where(clients)) == 40
        await _check(clients)


async def test_a_refused_run_releases_the_servers_that_it_had(servers: list[Server]) -> None:
    one, two, _ = servers
    lease = ONE.lease("reshard")
    async with shard_clients(settings(one, two)) as clients:
        channel = misplaced(clients, on=two)
        with one.client() as first, two.client() as second:
            second.xadd(ONE.stream(channel), {"data": "1"})
            # A run with the servers in another order has the second one.
            second.set(lease, "other")
            work = Reshard(clients, [], Keys("relay:", has_site_tag=True))
            await work.connect()
            with pytest.raises(RelayError, match="another relay reshard uses"):
                await work.run(dry=False, progress=lambda _: None)
            await work.release()
            assert first.get(lease) is None
            assert second.get(lease) == b"other"


async def test_the_copy_of_a_key_that_disappeared_is_kept(servers: list[Server]) -> None:
    one, two, _ = servers
    async with shard_clients(settings(one, two)) as clients:
        key = ONE.stream(misplaced(clients, on=one))
        with one.client() as source, two.client() as target:
            source.xadd(key, {"data": "1"})

            class Other(Reshard):
                """A second run finishes while the first one copies the key."""

                @override
                async def _copy(self, *words: Any) -> bytes | None:
                    copied = await super()._copy(*words)
                    source.delete(key)
                    return copied

            work = Other(clients, [], Keys("relay:", has_site_tag=True))
            await work.connect()
            result = await work.run(dry=False, progress=lambda _: None)
            assert (result.keys.total(), result.conflicts) == (0, [])
            assert target.xlen(key) == 1


async def test_a_key_that_expires_while_it_is_read_leaves_no_copy(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, _ = servers
    async with shard_clients(settings(one, two)) as clients:
        key = ONE.uid(misplaced(clients, on=one), "u")
        with one.client() as source, two.client() as target:
            source.set(key, "1-0", ex=1000)

            async def expire_first(client: Any, *words: Any) -> Any:
                if words[0] == "PTTL":
                    source.pexpireat(key, 1)
                return await command(client, *words)

            work = Reshard(clients, [], Keys("relay:", has_site_tag=True))
            await work.connect()
            monkeypatch.setattr(connect, "command", expire_first)
            result = await work.run(dry=False, progress=lambda _: None)
            assert result.keys.total() == 0
            # A copy would have no time to live.
            assert not target.exists(key)
