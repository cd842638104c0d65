"""Shard maps of real servers: a Redis Cluster whose slots move, and several servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from producers.outgoing import PublishFailed
from producers.publisher import AsyncPublisher
from relay.config.settings import NamespaceSettings, PublishSettings, RedisSettings
from relay.core.durability import Durability
from relay.core.errors import NotDurable, RedisUnavailable, StartError
from relay.core.model import Channel, EntryID
from relay.stream.connection.connect import command
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.shards.clients import shard_clients
from relay.stream.shards.cluster_map import ClusterMap
from relay.stream.shards.making import keys_of
from relay.stream.shards.server_list import check_list
from relay.stream.shards.shard import is_misplaced
from relay.stream.upkeep.retention import trim
from relay.stream.write.appender import Appender
from tests.support.clients import until
from tests.support.redis_cluster import RedisCluster, running_cluster
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
        small.servers[1].thaw()


async def test_a_server_that_is_away_does_not_stop_the_retention_of_others(
    server: Server,
) -> None:
    settings = RedisSettings(url=f"redis://127.0.0.1:{free_port()}, {server.url('admin')}")
    keys = keys_of(settings)
    stream = keys.stream(NEWS)
    async with shard_clients(settings) as clients:
        _, (_, client) = await clients.each()
        for _ in range(3):
            await command(client, "XADD", stream, "1-*", "data", "1")
        with pytest.raises(RedisUnavailable):
            await trim(clients, keys, lambda _: NamespaceSettings(retention_age_s=60))
        assert await command(client, "XLEN", stream) == 0


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
