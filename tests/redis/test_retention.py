"""relay/stream/upkeep/retention.py on real servers, with relay's rights."""

from __future__ import annotations

import time

import pytest
from redis.asyncio import Redis

from relay.config.settings import NamespaceSettings
from relay.core.errors import RedisUnavailable
from relay.core.model import Channel, namespace_of
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import ShardClients, shard_clients
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.upkeep import overview, retention
from tests.support.valkey import Server

pytestmark = pytest.mark.redis
SETTINGS = {
    "few": NamespaceSettings(retention_count=200, retention_age_s=0),
    "young": NamespaceSettings(retention_count=0, retention_age_s=3600),
    "": NamespaceSettings(retention_count=0, retention_age_s=0),
}


def settings_of(channel: Channel) -> NamespaceSettings:
    return SETTINGS[namespace_of(channel)]


async def test_each_stream_by_its_namespace(
    clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    now_ms = int(time.time() * 1000)
    few, young, other = (keys.stream(Channel(name)) for name in ("few:a", "young:a", "other"))
    pipeline = admin.pipeline(transaction=False)
    for n in range(1000):
        _ = pipeline.xadd(few, {"data": "1"}, id=f"{n + 1}-0")
        _ = pipeline.xadd(other, {"data": "1"}, id=f"{n + 1}-0")
    for age_s in (5000, 4000, 3500, 0):
        _ = pipeline.xadd(young, {"data": "1"}, id=f"{now_ms - age_s * 1000}-0")
    await pipeline.execute()
    done = await retention.trim(clients, keys, settings_of)
    assert (done.streams, done.not_streams) == (3, 0)
    assert 200 <= await admin.xlen(few) < 300 + 1
    # Few enough for one node of the stream, of which an approximate trim would remove nothing.
    assert await admin.xlen(young) == 2
    assert await admin.xlen(other) == 1000
    assert done.entries == 2004 - sum([await admin.xlen(key) for key in (few, young, other)])


async def test_what_is_no_stream_is_counted_and_left(
    clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    both = NamespaceSettings(retention_count=5, retention_age_s=5)
    await admin.set(keys.stream(Channel("few:a")), "x")
    await admin.set("relay:stream:{a b}", "x")
    await admin.set("relay:stream", "x")
    await admin.xadd("other:stream:{a}", {"data": "1"}, id="1-0")
    done = await retention.trim(clients, keys, lambda _: both)
    assert done == retention.Trimmed(streams=0, entries=0, not_streams=1)
    assert await admin.dbsize() == 4


async def test_many_streams_take_many_batches(
    clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    pipeline = admin.pipeline(transaction=False)
    for n in range(1500):
        _ = pipeline.xadd(keys.stream(Channel(f"young:{n}")), {"data": "1"}, id="1-0")
    await pipeline.execute()
    done = await retention.trim(clients, keys, settings_of)
    assert done.entries == 1500
    assert done.streams >= 1500


async def test_redis_gone_is_said(server: Server, keys: Keys) -> None:
    stopped = Server(server.folder / "stopped")
    async with shard_clients(stopped.settings()) as clients:
        with pytest.raises(RedisUnavailable):
            await retention.trim(clients, keys, settings_of)


async def test_streams_that_belong_to_no_channel_are_found(
    clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    for key in ("relay:stream:news", "relay:stream:{a b}", "relay:stream:{news}"):
        await admin.xadd(key, {"data": "1"})
    await admin.set("relay:stream:text", "x")
    done = await retention.trim(clients, keys, lambda _: SETTINGS[""])
    assert sorted(done.misnamed) == [b"relay:stream:news", b"relay:stream:{a b}"]
    assert done.streams == 1
    said = "belongs to no channel: its events are not delivered. The key of channel"
    news = f"Stream relay:stream:news {said} news is relay:stream:{{news}}"
    blank = f"Stream relay:stream:{{a b}} {said} a b is relay:stream:{{a%20b}}"
    for pattern, expected in (("*", [news, blank]), ("ne*", [news]), ("a*", [blank]), ("x", [])):
        found = [line async for line in overview.misnamed(clients, keys, pattern, ServerErrors())]
        assert sorted(found) == expected
