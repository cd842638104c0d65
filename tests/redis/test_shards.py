"""Shard maps of real servers: a Redis Cluster whose slots move, and several servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
from redis.exceptions import ResponseError

from producers.outgoing import PublishFailed
from producers.publisher import AsyncPublisher
from relay.cli.connections import connections
from relay.cli.dead_letters import dead_letters
from relay.cli.operator_context import OperatorContext
from relay.cli.streams import streams
from relay.cli.workers import status
from relay.config.loading import load
from relay.config.settings import NamespaceSettings, PublishSettings, RedisSettings, StreamSettings
from relay.core.durability import Durability
from relay.core.errors import NotDurable, RedisUnavailable, StartError
from relay.core.model import Channel, EntryID
from relay.stream.connection.connect import (
    RedisClient,
    command,
    command_if_equal,
    pipelined,
    transaction,
)
from relay.stream.connection.pipeline_connection import PipelineConnection, connected
from relay.stream.connection.primary import Primaries
from relay.stream.connection.scripts import Script
from relay.stream.format import entry
from relay.stream.format.keys import Keys
from relay.stream.read.control_reader import ControlReader
from relay.stream.read.groups import create_marker
from relay.stream.read.history import History
from relay.stream.read.shard_readers import ShardReaders
from relay.stream.shards.clients import ShardClients, shard_clients
from relay.stream.shards.cluster_map import ClusterMap
from relay.stream.shards.links import ShardLinks
from relay.stream.shards.making import keys_of, shard_map
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.shards.server_list import check_list
from relay.stream.shards.shard import SLOTS, Shard, ShardMap, is_misplaced, slot_of
from relay.stream.upkeep.dead_workers import DeadWorkersJob
from relay.stream.upkeep.retention import trim
from relay.stream.upkeep.unused import UnusedStreamsJob
from relay.stream.write.append import AppendCommands, send, send_one
from relay.stream.write.appender import Appender
from tests.support.clients import until, within
from tests.support.redis_cluster import RedisCluster, running_cluster
from tests.support.stream_reader import stream_reader
from tests.support.valkey import Flavour, Server, free_port, running

NEWS = Channel("news")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, flavour: Flavour) -> Iterator[RedisCluster]:
    with running_cluster(RedisCluster(tmp_path_factory.mktemp("cluster"), flavour)) as started:
        yield started


async def test_the_map_follows_a_slot(cluster: RedisCluster) -> None:
    settings = cluster.settings()
    key = keys_of(settings).stream(NEWS)
    shards = ClusterMap(settings)
    with pytest.raises(RedisUnavailable, match="no server"):
        shards.shard_of(key)
    await shards.refresh()
    assert len(shards.shards) == 3
    for shard in shards.shards:
        assert shards.shard_of(f"any{{{shard.tag}}}".encode()) is shard
    source = await asyncio.to_thread(cluster.owner_of, key)
    before = shards.shard_of(key)
    assert before.name == f"127.0.0.1:{cluster.servers[source].port}"
    async with shard_clients(settings, shards) as clients:
        await command(clients.for_key(key), "XADD", key, "*", "data", "1")
        target = (source + 1) % 3
        await asyncio.to_thread(cluster.move, key, target)
        connection = await PipelineConnection.open(await before.locate(), settings=settings)
        (reply,) = await connection.execute([("XLEN", key)])
        connection.close()
        assert is_misplaced(str(reply))
        await shards.refresh()
        assert shards.shard_of(key).name == f"127.0.0.1:{cluster.servers[target].port}"
        # The client has not been told, and follows the redirection.
        assert await command(clients.for_key(key), "XLEN", key) == 1
        found = [await command(client, "DBSIZE") for _, client in await clients.each()]
        assert sum(found) == 1


async def test_commands_and_transactions_follow_their_slot(cluster: RedisCluster) -> None:
    key, settings = b"follow:{moved}", cluster.settings()
    links = ShardLinks(ClusterMap(settings), settings)

    async def move() -> None:
        source = await asyncio.to_thread(cluster.owner_of, key)
        await asyncio.to_thread(cluster.move, key, (source + 1) % 3)

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(links.run())
        await links.wait_open()
        await move()
        assert await links.call("INCR", key) == 1
        await move()
        replies, done, _ = await links.transaction(key, lambda _: [("INCR", key)], [("GET", key)])
        assert (replies, done) == ([b"1"], [2])
        running.cancel()


async def test_the_end_of_a_subscription_shifts_no_reply(cluster: RedisCluster) -> None:
    pushes: list[list[object]] = []
    shards = ClusterMap(cluster.settings())
    await shards.refresh()
    moved = b"shift:{moved}"
    shard = shards.shard_of(moved)
    kept = f"shift:{{{shard.tag}}}".encode()
    connection = await PipelineConnection.open(
        await shard.locate(), settings=shard.settings, on_push=pushes.append
    )
    try:
        await connection.execute([("SSUBSCRIBE", moved), ("SSUBSCRIBE", kept)])
        source = await asyncio.to_thread(cluster.owner_of, moved)
        # Redis sends the push of an unsubscription unasked.
        asked = connection.execute([("ECHO", "1"), ("ECHO", "2")])
        await asyncio.to_thread(cluster.move, moved, (source + 1) % 3)
        assert await asked == [b"1", b"2"]
        await until(lambda: [push[:2] for push in pushes] == [[b"sunsubscribe", moved]])
        # It answers one of these with an error, and the other with a push.
        connection.end_sharded(moved)
        connection.end_sharded(kept)
        assert await connection.execute([("ECHO", "3")]) == [b"3"]
        assert [push[1] for push in pushes] == [moved, kept]
    finally:
        connection.close()


@pytest.mark.single_server("the shared server is the one without cluster mode")
async def test_a_server_without_cluster_mode_is_named(server: Server) -> None:
    url = RedisCluster.url_of(server).replace("://", "://admin:any@")
    settings = RedisSettings(url=url)
    with pytest.raises(StartError, match="is not part of a Redis Cluster; use redis://"):
        await ClusterMap(settings).refresh()
    async with AsyncPublisher(url, limit_ms=8000) as publisher:
        with pytest.raises(PublishFailed, match="is not part of a Redis Cluster"):
            await publisher.publish("news", 1)


async def test_an_address_may_belong_to_another_server_later(tmp_path: Path) -> None:
    with running_cluster(RedisCluster(tmp_path / "cluster", primaries=1)) as small:
        shards = ClusterMap(small.settings())
        await shards.refresh()
        (node,) = small.servers
        node.kill()
        other = Server(tmp_path / "other", acl=False, options=("--port", str(node.port)))
        with running(other), pytest.raises(RedisUnavailable, match="is not part of a Redis"):
            await shards.refresh()
        assert len(shards.shards) == 1


async def test_appends_follow_their_slot_in_order(cluster: RedisCluster) -> None:
    settings = cluster.settings()
    keys, shards = keys_of(settings), ClusterMap(settings)
    await shards.refresh()
    channel = Channel("order")
    stream = keys.stream(channel)
    shard = shards.shard_of(stream)
    names = (Channel(f"other:{number}") for number in range(1000))
    other = next(name for name in names if shards.shard_of(keys.stream(name)) is shard)
    # There are no replicas: it is appended, but not confirmed.
    durable = Durability.parse("replicated:1:10")
    appender = Appender(
        shards=shards,
        keys=keys,
        redis=settings,
        settings=PublishSettings(timeout_s=10),
        namespace_of=lambda _: NamespaceSettings(retention_count=0),
    )
    sent: list[asyncio.Future[EntryID]] = []
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(appender.run())
        await appender.append(channel, [b"data", b"0"])
        source = await asyncio.to_thread(cluster.owner_of, stream)
        target = (source + 1) % 3
        # Meanwhile Redis rejects uids, but accepts appends without one for some time.
        move = partial(cluster.move, stream, target, lambda _: time.sleep(0.1))
        moved = tasks.create_task(asyncio.to_thread(move))
        pressure: list[asyncio.Future[EntryID]] = []
        while not moved.done() or len(sent) < 500:
            if len(appender) < 200:
                # Replies to appends in other slots are always expected.
                pressure.append(appender.append(other, [b"data", b"1"]))
                data = b"%d" % (len(sent) + 1)
                chosen = None if len(sent) % 3 else durable
                uid = None if len(sent) % 4 else data.decode()
                sent.append(appender.append(channel, [b"data", data], uid, durability=chosen))
            await asyncio.sleep(0)
        await asyncio.wait([*sent, *pressure])
        task.cancel()
    problems = [each.exception() for each in (*sent, *pressure)]
    assert {type(each) for each in problems} == {type(None), NotDurable}
    found = await asyncio.to_thread(cluster.call, target, "XRANGE", stream, "-", "+")
    numbers = [int(entry[1][b"data"]) for entry in found]
    assert numbers == list(range(len(sent) + 1))


async def test_a_known_uid_is_confirmed_only_when_the_replica_has_its_entry(
    tmp_path: Path, flavour: Flavour
) -> None:
    wanted = Durability.parse("replicated:1:300")
    with running_cluster(RedisCluster(tmp_path, flavour, primaries=1, replicas=1)) as small:
        settings = small.settings()
        # The second appender has a new connection, which has written nothing yet.
        for number in range(2):
            shards = ClusterMap(settings)
            await shards.refresh()
            appender = Appender(
                shards=shards,
                keys=keys_of(settings),
                redis=settings,
                settings=PublishSettings(timeout_s=10),
                namespace_of=lambda _: NamespaceSettings(),
            )
            async with asyncio.TaskGroup() as tasks:
                task = tasks.create_task(appender.run())
                try:
                    if number == 0:
                        assert await appender.append(NEWS, [b"data", b"1"], "a", durability=wanted)
                        small.servers[1].freeze()
                    with pytest.raises(NotDurable):
                        await appender.append(NEWS, [b"data", b"2"], "b", durability=wanted)
                finally:
                    task.cancel()
        async with AsyncPublisher(small.url, limit_ms=8000) as publisher:
            with pytest.raises(PublishFailed, match="0 of 1 replicas"):
                await publisher.publish("news", 2, uid="b", durability="replicated:1:300")
        async with connected(
            settings.model_copy(update={"url": small.servers[0].url("admin")})
        ) as one:
            commands = AppendCommands(
                keys_of(settings), lambda _: NamespaceSettings(), uid_window_s=60
            )
            known = commands.build(NEWS, [b"data", b"2"], unless_latest=b"data", durability=wanted)
            (found,) = await send(one, [known], wait_ms=300)
            assert isinstance(found, NotDurable)
            with pytest.raises(NotDurable):
                await send_one(one, commands.build(NEWS, [b"data", b"2"], "b", durability=wanted))
        small.servers[1].thaw()


async def test_appends_are_confirmed_while_a_slot_is_moved(
    tmp_path: Path, flavour: Flavour
) -> None:
    wanted = Durability.parse("replicated:1")
    with running_cluster(RedisCluster(tmp_path, flavour, primaries=2, replicas=1)) as small:
        settings = small.settings()
        keys, shards = keys_of(settings), ClusterMap(settings)
        await shards.refresh()
        appender = Appender(
            shards=shards,
            keys=keys,
            redis=settings,
            settings=PublishSettings(timeout_s=20),
            namespace_of=lambda _: NamespaceSettings(),
        )
        stream = keys.stream(NEWS)
        other = next(channels_of(shards, keys, shards.shard_of(stream)))
        migrating, resume = threading.Event(), threading.Event()

        def between(step: str) -> None:
            if step == "migrating":
                migrating.set()
                assert resume.wait(60)

        def update(value: bytes) -> asyncio.Future[EntryID]:
            fields = [b"data", b"1", b"type", b"t", b"value", value]
            return appender.append(NEWS, fields, unless_latest=b"value", durability=wanted)

        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(appender.run())
            try:
                known = await appender.append(NEWS, [b"data", b"0"], "a", durability=wanted)
                latest = await update(b"x")
                source = await asyncio.to_thread(small.owner_of, stream)
                target = 1 - source
                # The mark that an append may have left soon expires.
                await asyncio.to_thread(small.call, source, "DEL", keys.uid(NEWS, ""))
                move = partial(small.move, stream, target, between)
                moving = tasks.create_task(asyncio.to_thread(move))
                await asyncio.to_thread(migrating.wait)
                # Neither of these appends anything, and one that does is in the same batch.
                repeated = appender.append(NEWS, [b"data", b"0"], "a", durability=wanted)
                same = update(b"x")
                await within(60, appender.append(other, [b"data", b"1"], durability=wanted))
                changed = [update(b"y"), update(b"y"), update(b"x")]
                last = appender.append(other, [b"data", b"2"], "b", durability=wanted)
                await within(60, last)
                resume.set()
                assert [await within(60, repeated), await within(60, same)] == [known, latest]
                found = [await within(60, each) for each in changed]
                assert found[0] == found[1]
                await moving
            finally:
                resume.set()
                task.cancel()
        entries = await asyncio.to_thread(small.call, target, "XRANGE", stream, "-", "+")
        assert [EntryID.parse(each[0]) for each in entries] == [known, latest, found[0], found[2]]


@contextlib.asynccontextmanager
async def one_away(server: Server) -> AsyncIterator[tuple[ShardClients, Keys, str]]:
    """Yield the clients of two servers, of which one cannot be reached and comes first, the keys,
    and the address of that server. The other one has the keys of the site."""
    while True:
        address = f"127.0.0.1:{free_port()}"
        settings = RedisSettings(url=f"redis://{address}, {server.url('admin')}")
        async with shard_clients(settings) as clients:
            if clients.shards.home.name != address:
                yield clients, keys_of(settings), address
                return


def channels_of(shards: ShardMap, keys: Keys, shard: Shard) -> Iterator[Channel]:
    """Yield channels whose streams are on this server."""
    for number in itertools.count():
        channel = Channel(f"c{number}")
        if shards.shard_of(keys.stream(channel)) is shard:
            yield channel


@pytest.mark.single_server("combines the shared server with another")
async def test_a_server_that_is_away_does_not_stop_the_jobs_for_others(server: Server) -> None:
    async with one_away(server) as (clients, keys, address):
        channel, empty = itertools.islice(channels_of(clients.shards, keys, clients.shards.home), 2)
        client = clients.home
        stream, unused = keys.stream(channel), keys.stream(empty)
        await command(client, "XADD", stream, "1-*", "data", "1")
        await command(client, "XGROUP", "CREATE", stream, "relay:dead:1", "0")
        await command(client, *create_marker(unused, 5, 1))
        await command(client, "SADD", keys.nodes, "dead:1")

        cleared: list[str] = []

        async def clear(instance: str, errors: ServerErrors) -> None:
            del errors
            cleared.append(instance)

        dead_workers = DeadWorkersJob(clients=clients, keys=keys, dead="dead:1".__eq__, clear=clear)
        unused_streams = UnusedStreamsJob(clients, keys)
        jobs: list[Callable[[], Awaitable[object]]] = [
            dead_workers.remove,
            unused_streams.run,
            unused_streams.run,
            lambda: trim(clients, keys, lambda _: NamespaceSettings(retention_age_s=60)),
        ]
        for job in jobs:
            with pytest.raises(RedisUnavailable, match=address):
                await job()
        assert await command(client, "XLEN", stream) == 0
        assert await command(client, "XINFO", "GROUPS", stream) == []
        assert await command(client, "EXISTS", unused) == 0
        # The next run finds the worker again, because its groups are not removed everywhere.
        assert await command(client, "SISMEMBER", keys.nodes, "dead:1")
        assert cleared == ["dead:1"]


@pytest.mark.single_server("combines the shared server with another")
async def test_commands_show_what_they_can_read_and_name_a_server_that_is_away(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    async with one_away(server) as (clients, keys, address):
        home = clients.shards.home
        (away,) = (shard for shard in clients.shards.shards if shard is not home)
        near, far = (next(channels_of(clients.shards, keys, shard)) for shard in (home, away))
        await command(clients.home, "XADD", keys.stream(near), "*", "data", "1")
        config = load(None, environ={}, overrides=[], flags={}, doors={})
        site = OperatorContext(config=config, clients=clients, keys=keys)
        assert await streams(site, Namespace(pattern="*", json=True)) == 1
        shown, said = capsys.readouterr()
        assert orjson.loads(shown)["channel"] == near
        assert said.count("\n") == 1
        assert address in said
        options = Namespace(json=True, min_workers=0, max_lag=10, max_dead_letters=None)
        assert await status(site, options) == 1
        shown, said = capsys.readouterr()
        assert orjson.loads(shown)["workers"] == 0
        assert said.count("\n") == 1
        assert address in said
        found = {"user": None, "channel": None, "protocol": None, "address": None}
        options = Namespace(**found, after="", limit=10, json=False)
        assert await connections(site, options) == 0
        shown, said = capsys.readouterr()
        assert "0 connections" in shown
        for channel in (far, near, far):
            words = "stream", keys.stream(channel), "fields", '[["data","2"]]'
            await command(clients.home, "XADD", keys.dead_letters, "*", *words)
        options = Namespace(action="requeue", all=True, ids=[], json=False)
        assert await dead_letters(site, options) == 1
        shown, said = capsys.readouterr()
        assert shown == "1 requeued\n"
        assert said.count("\n") == 1
        assert address in said
        assert await command(clients.home, "XLEN", keys.stream(near)) == 2
        assert await command(clients.home, "XLEN", keys.dead_letters) == 2


@pytest.mark.single_server("combines the shared server with another")
async def test_another_list_of_servers_is_refused(server: Server, valkey: Server) -> None:
    one, two = server.url("admin"), valkey.url("admin")
    keys = keys_of(RedisSettings(url=f"{one}, {two}"))

    async def check(*urls: str) -> None:
        settings = RedisSettings(url=", ".join(urls))
        async with shard_clients(settings) as clients:
            await check_list(clients, keys_of(settings))

    await check(one)
    await check(two, one)
    await check(one, two)
    names = ", ".join(sorted(f"127.0.0.1:{each.port}/0" for each in (server, valkey)))
    three = "redis://127.0.0.1:1/0"
    for urls in ([one], [two], [one, two, three]):
        with pytest.raises(StartError, match=f"Stored in Redis: {names}. Use the same") as refused:
            await check(*urls)
        assert "any" not in str(refused.value).split("Here: ")[1].split(". Stored")[0]
    async with shard_clients(RedisSettings(url=f"{one}, {two}")) as clients:
        for _, client in await clients.each():
            await command(client, "DEL", keys.servers)
        # Workers that use the server alone have stored no list.
        single = keys_of(RedisSettings(url=one))
        for _, client in await clients.each():
            await command(client, "SADD", single.nodes, "web:1")
        await check(one, two)
        (_, alone), *_ = await clients.each()
        await command(alone, "SET", single.node("web:1"), "x")
        with pytest.raises(StartError, match="worker web:1 uses one of the servers alone"):
            await check(one, two)
        for _, client in await clients.each():
            await command(client, "FLUSHALL")


def _stored(server: Server, keys: Keys) -> str:
    found = server.client().get(keys.servers)
    assert isinstance(found, bytes)
    return found.decode()


@pytest.mark.single_server("combines the shared server with another")
async def test_a_server_is_checked_when_it_becomes_reachable(
    server: Server, valkey: Server, tmp_path: Path
) -> None:
    await asyncio.to_thread(valkey.client().flushall)
    third = Server(tmp_path)
    urls = [each.url("admin") for each in (server, valkey, third)]
    settings = RedisSettings(url=", ".join(urls))
    keys = keys_of(settings)
    names = ", ".join(sorted(f"127.0.0.1:{each.port}/0" for each in (server, valkey, third)))
    for is_other in (False, True):
        async with shard_clients(settings) as clients:
            await check_list(clients, keys)
            shards = list(clients.shards.shards)
            late = next(each for each in shards if str(third.port) in each.name)
            for shard in shards:
                if shard is not late:
                    await shard.locate()
            with pytest.raises(RedisUnavailable):
                await late.locate()
            with running(third):
                if not is_other:
                    for _ in range(2):
                        await late.locate()
                    assert await asyncio.to_thread(_stored, third, keys) == names
                    continue
                # The first connection is refused, and each later one.
                await asyncio.to_thread(third.client().set, keys.servers, "127.0.0.1:1/0")
                for _ in range(2):
                    with pytest.raises(StartError) as refused:
                        await late.locate()
                    assert f"Here: {names}. Stored in Redis: 127.0.0.1:1/0." in str(refused.value)
    await asyncio.to_thread(valkey.client().flushall)


async def test_the_check_of_a_frozen_server_ends(tmp_path: Path) -> None:
    servers = [Server(tmp_path / name) for name in ("one", "two")]
    urls = ", ".join(each.url("admin") for each in servers)
    settings = RedisSettings(url=urls, connect_timeout_s=60, command_timeout_s=60)
    keys, shards = keys_of(settings), shard_map(settings)
    frozen = servers[1]
    channel = next(
        channel
        for channel in map(Channel, map(str, range(99)))
        if str(frozen.port) in shards.shard_of(keys.stream(channel)).name
    )

    def appender() -> Appender:
        return Appender(
            shards=shards,
            keys=keys,
            redis=settings,
            settings=PublishSettings(timeout_s=1),
            namespace_of=lambda _: NamespaceSettings(),
        )

    with running(*servers):
        frozen.freeze()
        async with shard_clients(settings, shards) as clients:
            await within(20, check_list(clients, keys))
            appends = appender()
            sending = asyncio.get_running_loop().create_task(appends.run())
            with pytest.raises(RedisUnavailable):
                await within(20, appends.append(channel, [b"data", b"1"]))
            sending.cancel()
            await asyncio.wait([sending])
            # At whatever moment it is cancelled.
            stopped = []
            for turns in range(60):
                appends = appender()
                sending = asyncio.get_running_loop().create_task(appends.run())
                await asyncio.sleep(0)
                future = appends.append(channel, [b"data", b"1"])
                future.add_done_callback(asyncio.Future.exception)
                for _ in range(turns):
                    await asyncio.sleep(0)
                sending.cancel()
                stopped.append(sending)
            _, running_on = await asyncio.wait(stopped, timeout=20)
            assert not running_on
            frozen.thaw()
            # It is still checked before its first use.
            found = await asyncio.to_thread(_stored, servers[0], keys)
            assert await asyncio.to_thread(frozen.client().get, keys.servers) is None
            await within(20, shards.shard_of(keys.stream(channel)).locate())
            assert await asyncio.to_thread(_stored, frozen, keys) == found


@pytest.mark.single_server("combines the shared server with another")
async def test_clients_of_several_servers(server: Server, valkey: Server) -> None:
    settings = RedisSettings(url=f"{server.url('admin')}, {valkey.url('admin')}")
    keys = keys_of(settings)
    streams = [keys.stream(Channel(f"several:{number}")) for number in range(20)]
    async with shard_clients(settings) as clients:
        for stream in streams:
            await command(clients.for_key(stream), "XADD", stream, "*", "data", "1")
        sizes = []
        for shard, client in await clients.each():
            here = [stream for stream in streams if clients.shards.shard_of(stream) is shard]
            sizes.append(len(here))
            assert await command(client, "EXISTS", *here) == len(here)
            await command(client, "DEL", *here)
    assert sum(sizes) == 20
    assert 0 not in sizes


@pytest.mark.single_server("combines the shared server with another")
async def test_commands_that_have_not_begun_end_with_the_connections(
    server: Server, valkey: Server
) -> None:
    settings = RedisSettings(url=f"{server.url('admin')}, {valkey.url('admin')}")
    async with shard_clients(settings) as clients, asyncio.TaskGroup() as tasks:
        links = ShardLinks(clients.shards, settings)
        running_links = tasks.create_task(links.run())
        await links.wait_open()
        running_links.cancel()
        pending = links.execute([("GET", b"a"), ("GET", b"b")])
        async with asyncio.timeout(20):
            with pytest.raises(RedisUnavailable):
                await pending


@pytest.mark.single_server("combines the shared server with another")
async def test_scripts_are_loaded_again_after_a_flush(server: Server, valkey: Server) -> None:
    settings = RedisSettings(url=f"{server.url('admin')}, {valkey.url('admin')}")
    script = Script("return {KEYS[1], ARGV[1]}")
    async with shard_clients(settings) as clients, asyncio.TaskGroup() as tasks:
        links = ShardLinks(clients.shards, settings)
        running_links = tasks.create_task(links.run())
        await links.wait_open()
        keys = [b"%d" % number for number in range(20)]
        calls = [(script, [key], [b"x"]) for key in keys]
        assert {clients.shards.shard_of(key) for key in keys} == {*clients.shards.shards}
        for _ in range(2):
            assert await links.evaluate(calls) == [[key, b"x"] for key in keys]
            (shard, _), *_ = await clients.each()
            assert await links.evaluate(calls[:1], shard) == [[keys[0], b"x"]]
            for _, client in await clients.each():
                await command(client, "SCRIPT", "FLUSH")
        for _, client in await clients.each():
            await command(client, "ACL", "SETUSER", "admin", "-script|load")
        try:
            found = await links.evaluate(calls)
            assert {str(each).partition(" ")[0] for each in found} == {"NOPERM"}
            assert "script|load" in str(found[0])
        finally:
            for _, client in await clients.each():
                await command(client, "ACL", "SETUSER", "admin", "+script|load")
        running_links.cancel()


async def test_a_cluster_without_client_tracking_is_not_read(
    cluster: RedisCluster, caplog: pytest.LogCaptureFixture
) -> None:
    user = f"relay:{'x' * 8}"
    for number in range(3):
        words = ("on", ">" + "x" * 8, "~*", "&*", "+@all", "-client|tracking")
        cluster.call(number, "ACL", "SETUSER", "relay", *words)
    denied = RedisSettings(url=cluster.url.replace("://", f"://{user}@"))
    for settings, stream, cause in (
        (denied, StreamSettings(), "the user needs +client|tracking"),
        (cluster.settings(), StreamSettings(tracking="off"), "[stream] tracking is off: set it"),
    ):
        caplog.clear()
        async with shard_clients(settings) as clients, asyncio.TaskGroup() as tasks:
            readers = ShardReaders(
                shards=clients.shards,
                keys=keys_of(settings),
                control=ControlReader(keys_of(settings), lambda _: None, lambda: None),
                primaries=Primaries(),
                make=partial(stream_reader, clients, keys_of(settings), stream),
            )
            reading = tasks.create_task(readers.run())
            await until(lambda: cause in readers.problem(), 20)  # noqa: B023
            assert not readers.ready()
            await until(lambda: any(cause in line for line in caplog.messages), 20)  # noqa: B023
            reading.cancel()


async def test_slots_without_a_server_are_named(cluster: RedisCluster) -> None:
    settings, other = cluster.settings(), Channel("other")
    keys = keys_of(settings)
    slot = slot_of(keys.stream(NEWS))
    assert slot != slot_of(keys.stream(other))
    owner = await asyncio.to_thread(cluster.owner_of, keys.stream(NEWS))
    async with shard_clients(settings) as clients, asyncio.TaskGroup() as tasks:
        readers = ShardReaders(
            shards=clients.shards,
            keys=keys,
            control=ControlReader(keys, lambda _: None, lambda: None),
            primaries=Primaries(),
            make=partial(stream_reader, clients, keys, StreamSettings()),
        )
        reading = tasks.create_task(readers.run())
        await readers.wait_ready()
        await asyncio.to_thread(cluster.uncover, slot)
        try:
            named = f"slot {slot} has no server"
            async with asyncio.timeout(30):
                while not readers.problem([NEWS]).startswith(named):
                    await asyncio.sleep(0.02)
            assert readers.problem().endswith(": 1")
            assert not readers.is_connected([NEWS])
            assert readers.problem([other]) == ""
            assert readers.is_connected([other])
        finally:
            cluster.call(owner, "CLUSTER", "ADDSLOTS", slot)
        async with asyncio.timeout(30):
            while readers.problem([NEWS]):
                await asyncio.sleep(0.02)
        reading.cancel()


async def test_a_slot_without_a_server_is_unavailable_until_it_has_one(
    cluster: RedisCluster,
) -> None:
    settings, key = cluster.settings(), b"{a slot without a server}"
    owner = await asyncio.to_thread(cluster.owner_of, key)

    async def in_a_pipeline(client: RedisClient) -> None:
        async with pipelined(client) as pipeline:
            pipeline.execute_command("GET", key)
            await pipeline.execute()

    async def in_a_transaction(client: RedisClient) -> None:
        async with transaction(client) as pipeline:
            pipeline.execute_command("GET", key)
            await pipeline.execute()

    async with shard_clients(settings) as clients:
        client = clients.for_key(key)
        await command(client, "SET", key, "1")
        await asyncio.to_thread(cluster.uncover, slot_of(key))
        try:
            ways: list[Callable[[], Awaitable[object]]] = [
                partial(command, client, "GET", key),
                partial(in_a_pipeline, client),
                partial(in_a_transaction, client),
                partial(command_if_equal, client, key, b"1", "SET", key, "1"),
            ]
            for way in ways:
                with pytest.raises(RedisUnavailable, match="no server|not served"):
                    await way()
        finally:
            cluster.call(owner, "CLUSTER", "ADDSLOTS", slot_of(key))
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(RedisUnavailable):
                    assert await command(client, "GET", key) == b"1"
                    break
                await asyncio.sleep(0.05)


async def test_a_pipeline_to_a_server_that_is_away_fails(cluster: RedisCluster) -> None:
    key = b"{a server that is away}"
    owner = cluster.servers[await asyncio.to_thread(cluster.owner_of, key)]

    async def write(client: RedisClient) -> list[object]:
        async with pipelined(client) as pipeline:
            pipeline.execute_command("SET", key, "1")
            # Errors of commands are returned.
            pipeline.execute_command("XLEN", key)
            return await pipeline.execute(raise_on_error=False)

    async with shard_clients(cluster.settings()) as clients:
        await command(clients.for_key(key), "SET", key, "0")
        owner.kill()
        try:
            with pytest.raises(RedisUnavailable):
                await write(clients.for_key(key))
        finally:
            await asyncio.to_thread(owner.start)
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(RedisUnavailable):
                    done, refused = await write(clients.for_key(key))
                    break
                await asyncio.sleep(0.05)
        assert done
        assert isinstance(refused, ResponseError)


async def test_a_transaction_does_not_wait_for_the_slots_to_be_read(
    cluster: RedisCluster,
) -> None:
    settings = cluster.settings(command_timeout_s=2, connect_timeout_s=2)
    names = [b"{%d}" % number for number in range(100)]
    key = next(name for name in names if cluster.owner_of(name) == 2)
    others = [next(name for name in names if cluster.owner_of(name) == each) for each in (0, 1)]

    async def fail(client: RedisClient) -> None:
        with contextlib.suppress(RedisUnavailable):
            await command(client, "GET", others[0])

    async with shard_clients(settings) as clients, asyncio.TaskGroup() as tasks:
        client = clients.for_key(key)
        await command(client, "SET", key, "1")
        # The server that is left does not notice that it is in the minority.
        timeout = cluster.call(2, "CONFIG", "GET", "cluster-node-timeout")[b"cluster-node-timeout"]
        cluster.call(2, "CONFIG", "SET", "cluster-node-timeout", 60_000)
        for number in (0, 1):
            cluster.servers[number].freeze()
        try:
            failing = tasks.create_task(fail(client))
            async with transaction(client) as pipeline:
                await pipeline.watch(key)
                # redis-py reads the slots again after the error, from a server that is frozen.
                async with asyncio.timeout(20):
                    while not cast(Any, client)._initialize:
                        await asyncio.sleep(0.01)
                assert await command(pipeline, "GET", key) == b"1"
                pipeline.multi()  # type: ignore[no-untyped-call]
                pipeline.execute_command("SET", key, "2")
                await pipeline.execute()
        finally:
            for number in (0, 1):
                cluster.servers[number].thaw()
            cluster.call(2, "CONFIG", "SET", "cluster-node-timeout", timeout)
        await failing
        assert await command(client, "GET", key) == b"2"


async def test_a_slot_on_its_way_to_a_new_server_is_served(tmp_path: Path) -> None:
    key, loop = b"{moved to a new server}", asyncio.get_running_loop()
    with running_cluster(RedisCluster(tmp_path, primaries=1)) as cluster:
        async with shard_clients(cluster.settings()) as clients:
            client = clients.for_key(key)
            await command(client, "SET", key, "1")
            added = await asyncio.to_thread(cluster.add)
            found: dict[str, object] = {}

            def read(step: str) -> None:
                reading = command(client, "GET", key)
                found[step] = asyncio.run_coroutine_threadsafe(reading, loop).result(30)

            await asyncio.to_thread(cluster.move, key, added, read)
            assert found["keys moved"] == b"1"
            assert set(found.values()) == {b"1"}


async def test_servers_without_slots_are_unavailable_until_they_have_them(tmp_path: Path) -> None:
    options = "--cluster-enabled", "yes", "--cluster-port", str(free_port())
    server = Server(tmp_path, acl=False, options=options)
    with running(server):
        async with shard_clients(RedisSettings(url=RedisCluster.url_of(server))) as clients:
            with pytest.raises(RedisUnavailable, match="no server of the Redis Cluster has a slot"):
                await command(clients.home, "GET", "x")
            with server.client() as admin:
                admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)
                await until(
                    lambda: "cluster_state:ok" in str(admin.execute_command("CLUSTER", "INFO"))
                )
            assert await command(clients.home, "SET", "x", "1")


async def test_a_frozen_server_does_not_hold_up_histories_of_the_others(tmp_path: Path) -> None:
    servers = [Server(tmp_path / name, acl=False) for name in ("one", "two")]
    urls = ",".join(each.url() for each in servers)
    settings = RedisSettings(url=urls, command_timeout_s=15)
    keys = keys_of(settings)
    with running(*servers):
        async with shard_clients(settings) as clients, asyncio.TaskGroup() as tasks:
            links = ShardLinks(clients.shards, settings)
            running_links = tasks.create_task(links.run())
            await links.wait_open()
            histories = History(
                links=links,
                keys=keys,
                decode=partial(entry.decode, max_bytes=1 << 20),
                spawn=tasks.create_task,
                max_entry_bytes=1 << 20,
            )
            of: dict[str, list[Channel]] = {}
            for channel in [Channel(f"c{number}") for number in range(100)]:
                shard = clients.shards.shard_of(keys.stream(channel))
                of.setdefault(shard.name, []).append(channel)
                await command(
                    clients.for_key(keys.stream(channel)),
                    "XADD",
                    keys.stream(channel),
                    "*",
                    "data",
                    "1",
                )
            frozen, other = servers
            (near, far) = (
                next(names for name, names in of.items() if name.endswith(f":{each.port}"))
                for each in (other, frozen)
            )
            frozen.freeze()
            try:
                waiting = [histories.read(channel, 1) for channel in far[:20]]
                assert len((await histories.read(near[0], 1)).events) == 1
                assert not any(each.done() for each in waiting)
            finally:
                frozen.thaw()
            assert [len((await each).events) for each in waiting] == [1] * 20
            running_links.cancel()


async def test_commands_wait_for_the_connection_to_a_promoted_replica(tmp_path: Path) -> None:
    with running_cluster(RedisCluster(tmp_path / "cluster", primaries=1, replicas=1)) as small:
        shards = ClusterMap(small.settings())
        await shards.refresh()
        old, key = shards.home, b"counter:{site}"
        async with asyncio.TaskGroup() as tasks:
            links = ShardLinks(shards, small.settings())
            running_links = tasks.create_task(links.run())
            await links.wait_open()
            sent = 0
            await asyncio.to_thread(small.call, 1, "CLUSTER", "FAILOVER")
            while shards.home is old or sent < 100:
                # Each command of the old primary is refused with MOVED.
                sent += 1
                assert await links.call("SET", key, sent) == b"OK"
                _, done, _ = await links.transaction(key, lambda _: [("GET", key)])
                assert done == [b"%d" % sent]
            running_links.cancel()
