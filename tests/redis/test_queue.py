"""The command queue on real servers: commands are executed once and in order, despite obstacles."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from producers.api_queue import ApiQueueConsumer
from producers.settings import QueueSettings
from relay.config.settings import NamespaceSettings, PublishSettings
from relay.core.model import Channel, EntryID
from relay.stream.connection.connect import command, discover
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.format.keys import Keys
from relay.stream.shards.making import shard_map
from relay.stream.write import control
from relay.stream.write.queue import CommandQueues, Operation
from tests.support.topologies import TOPOLOGY
from tests.support.valkey import Flavour, Server, running

pytestmark = pytest.mark.redis
QUEUE = "centrifugo.api"
NEWS = Channel("news")


class Taken:
    """Waits until this number of items has been processed."""

    def __init__(self) -> None:
        self.items = self.broken = 0
        self._changed = asyncio.Event()

    def __call__(self, items: int, broken: int) -> None:
        self.items += items
        self.broken += broken
        self._changed.set()

    async def until(self, items: int) -> None:
        while self.items < items:
            self._changed.clear()
            await self._changed.wait()


@contextlib.asynccontextmanager
async def taking(
    server: Server, keys: Keys, *taken: Taken, shards: int = 0, batch: int = 256, **rules: int
) -> AsyncIterator[None]:
    producers = [
        ApiQueueConsumer(
            shards=shard_map(server.settings()),
            keys=keys,
            redis=server.settings(),
            settings=QueueSettings(enabled=True, shards=shards, batch=batch),
            publish=PublishSettings(),
            instance=f"worker:{number}",
            namespace_of=lambda _: NamespaceSettings(**rules),
            max_entry_bytes=10_000,
            on_applied=each,
        )
        for number, each in enumerate(taken)
    ]
    async with asyncio.TaskGroup() as tasks:
        running_ = [tasks.create_task(producer.run()) for producer in producers]
        try:
            yield
        finally:
            for task in running_:
                task.cancel()


def publish(data: str, channel: str = "news", **more: object) -> str:
    rest = "".join(f',"{name}":{json.dumps(value)}' for name, value in more.items())
    params = f'{{"channel":"{channel}","data":{data}{rest}}}'
    return f'{{"method":"publish","params":{params}}}'


async def entries(admin: Redis, key: bytes) -> list[dict[bytes, bytes]]:
    found: Any = await admin.xrange(key)
    return [fields for _, fields in found]


async def data_of(admin: Redis, keys: Keys, channel: str = "news") -> list[bytes]:
    return [fields[b"data"] for fields in await entries(admin, keys.stream(Channel(channel)))]


async def reasons(admin: Redis, keys: Keys) -> list[tuple[str, str]]:
    return [
        (letter[b"reason"].decode(), json.loads(letter[b"fields"])[0][1])
        for letter in await entries(admin, keys.dead_letters)
    ]


async def test_commands_are_applied_as_they_were_sent(
    server: Server, admin: Redis, keys: Keys
) -> None:
    taken = Taken()
    odd = ["[]", "12345678901234567890", "1.0", '{ "b" : "\\u00e9" }', '"\\/"', '"é"']
    async with taking(server, keys, taken):
        await admin.rpush(QUEUE, *[publish(data) for data in odd])
        await taken.until(len(odd))
        await admin.rpush(
            QUEUE,
            '{"method":"broadcast","params":{"channels":["a","b"],"data":{"x": 1},"client":"c"}}',
            f'{{"data":[{publish("1", "old")},{publish("2", "old")}]}}',
            publish("7", uid="u", client="c", type="chat", to=["Anna Li", "group:kitchen"]),
            '{"method":"broadcast","params":{"channels":["b"],"data":2,"type":"t","to":"bob"}}',
        )
        await taken.until(len(odd) + 4)
    assert await data_of(admin, keys) == [*[each.encode() for each in odd], b"7"]
    assert await data_of(admin, keys, "a") == [b'{"x": 1}']
    assert await entries(admin, keys.stream(Channel("b"))) == [
        {b"data": b'{"x": 1}', b"client": b"c"},
        {b"data": b"2", b"type": b"t", b"to": b"user:bob"},
    ]
    assert await data_of(admin, keys, "old") == [b"1", b"2"]
    assert (await entries(admin, keys.stream(NEWS)))[-1] == {
        b"data": b"7",
        b"uid": b"u",
        b"client": b"c",
        b"type": b"chat",
        b"to": b'["group:kitchen","user:Anna Li"]',
    }
    assert not await admin.exists(keys.dead_letters, QUEUE)


async def test_broken_ones_are_dead_letters_and_the_next_ones_flow(
    server: Server, admin: Redis, keys: Keys
) -> None:
    taken = Taken()
    await admin.set(keys.stream(Channel("text")), "no stream")
    broken = {
        "nonsense": "not JSON",
        "[]": "not an object",
        '{"method":"sing"}': "unknown method 'sing'",
        '{"method":"disconnect","params":{"user":""}}': "user is missing",
        '{"method":"unsubscribe","params":{"user":"u","channel":"axr:r"}}': "namespace not found",
        '{"method":"publish"}': "no params",
        publish("1", "seafile:r"): "namespace not found",
        publish(
            "1", "x" * 256
        ): "channel must have 1 to 255 characters of valid UTF-8; this one has 256",
        publish(f'"{"x" * 10_000}"'): "too large: 10007 bytes",
        publish("1", uid="u" * 300): "uid must have at most 255 bytes",
        publish("1", type="relay:gap"): "reserved type",
        publish("1", to=[]): "to has no recipients",
        '{"method":"broadcast","params":{"channels":["c","axr:r"],"data":1}}': (
            "namespace not found"
        ),
    }
    items = [text for each in broken for text in (each, publish("1"))]
    async with taking(server, keys, taken):
        await admin.rpush(QUEUE, *items, publish("1", "text"), publish("2"))
        await taken.until(len(items) + 2)
    found = await reasons(admin, keys)
    assert found[:-1] == [(reason, item) for item, reason in broken.items()]
    reason, item = found[-1]
    assert "WRONGTYPE" in reason
    assert item == publish("1", "text")
    assert await data_of(admin, keys) == [b"1"] * len(broken) + [b"2"]
    assert taken.broken == len(broken) + 1
    assert not await admin.exists(keys.stream(Channel("c")))


async def test_what_concerns_clients_goes_to_all_workers_and_questions_to_nobody(
    server: Server, admin: Redis, keys: Keys
) -> None:
    taken = Taken()
    questions = ("presence", "history", "channels", "stats", "node")
    items = [
        '{"method":"unsubscribe","params":{"user":"anna","channel":"news"}}',
        '{"method":"unsubscribe","params":{"user":"anna"}}',
        '{"method":"disconnect","params":{"user":"bob"}}',
        *(f'{{"method":"{each}","params":{{"channel":"news"}}}}' for each in questions),
    ]
    async with taking(server, keys, taken):
        await admin.rpush(QUEUE, *items)
        await taken.until(len(items))
    found = [control.decode(EntryID(1, 1), [*fields]) for fields in await raw(admin, keys.control)]
    assert [sent.command for sent in found if sent] == [
        control.UnsubscribeUser(user="anna", channel=NEWS, door="centrifugo"),
        control.UnsubscribeUser(user="anna", door="centrifugo"),
        control.DisconnectUser(user="bob", door="centrifugo"),
    ]
    assert not await admin.exists(keys.dead_letters, QUEUE)


async def raw(admin: Redis, key: bytes) -> list[list[bytes]]:
    found = await entries(admin, key)
    return [[part for pair in fields.items() for part in pair] for fields in found]


async def test_a_uid_is_appended_once(server: Server, admin: Redis, keys: Keys) -> None:
    taken = Taken()
    async with taking(server, keys, taken, batch=2):
        await admin.rpush(QUEUE, *[publish(str(n), uid="u") for n in range(5)])
        await taken.until(5)
    assert await data_of(admin, keys) == [b"0"]


async def test_several_workers_share_the_shards_without_doing_anything_twice(
    server: Server, admin: Redis, keys: Keys
) -> None:
    first, second = Taken(), Taken()
    async with taking(server, keys, first, second, shards=4, batch=7):
        for start in range(0, 500, 50):
            for shard in range(4):
                items = [publish(str(n), f"c{shard}") for n in range(start, start + 50)]
                await admin.rpush(f"{QUEUE}.{shard}", *items)
        streams = [keys.stream(Channel(f"c{shard}")) for shard in range(4)]
        while sum([await admin.xlen(stream) for stream in streams]) < 2000:
            await asyncio.sleep(0.02)
    for shard in range(4):
        assert await data_of(admin, keys, f"c{shard}") == [b"%d" % n for n in range(500)]


@pytest.mark.single_server("CommandQueues, which is for one server")
async def test_nothing_is_done_where_the_head_is_not_what_was_read(
    server: Server, admin: Redis, keys: Keys
) -> None:
    connection = await PipelineConnection.open(
        await discover(server.settings()), settings=server.settings()
    )
    queues = CommandQueues(connection, keys, "w")
    await queues.prepare()
    entry = [Operation(keys.stream(NEWS), [b"data", b"1"], 0)]
    # The items are equal, so only the count shows that they are others.
    await admin.rpush(QUEUE, *["same"] * 6)
    head = await queues.head(QUEUE, 2)
    assert await queues.apply(QUEUE, head, entry, window_ms=0) == 0
    assert await queues.apply(QUEUE, head, entry, window_ms=0) is None
    # Another program removed one without incrementing the count.
    await admin.rpush(QUEUE, "other")
    head = await queues.head(QUEUE, 2)
    await admin.lpush(QUEUE, "new")
    assert await queues.apply(QUEUE, head, entry, window_ms=0) is None
    await admin.delete(QUEUE)
    assert await queues.apply(QUEUE, head, entry, window_ms=0) is None
    assert await admin.xlen(keys.stream(NEWS)) == 1
    connection.close()


async def test_a_full_server_loses_nothing(server: Server, admin: Redis, keys: Keys) -> None:
    taken = Taken()
    async with taking(server, keys, taken):
        await admin.rpush(QUEUE, publish("1"))
        await taken.until(1)
        # In the same slot as the queue.
        await admin.rpush(f"{{{QUEUE}}}", *[publish(str(n)) for n in range(2, 6)])
        await admin.config_set("maxmemory", "1mb")
        try:
            await admin.rename(f"{{{QUEUE}}}", QUEUE)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await taken.until(2)
            assert await admin.llen(QUEUE) == 4
        finally:
            await admin.config_set("maxmemory", "0")
        await taken.until(5)
    assert await data_of(admin, keys) == [b"1", b"2", b"3", b"4", b"5"]
    assert not await admin.exists(keys.dead_letters)


@pytest.mark.parametrize(
    "trouble",
    [
        lambda admin: command(admin, "SCRIPT", "FLUSH"),
        lambda admin: command(admin, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"),
        lambda admin: command(admin, "FLUSHALL"),
    ],
    ids=["scripts", "connections", "everything"],
)
async def test_the_queue_goes_on_after_trouble(
    server: Server, admin: Redis, keys: Keys, trouble: Callable[[Redis], object]
) -> None:
    taken = Taken()
    async with taking(server, keys, taken):
        await admin.rpush(QUEUE, publish("1"))
        await taken.until(1)
        await trouble(admin)  # type: ignore[misc]
        await admin.rpush(QUEUE, publish("2"))
        await taken.until(2)
    assert (await data_of(admin, keys))[-1] == b"2"


async def test_a_restart_of_the_server_is_survived(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    taken = Taken()
    server = Server(tmp_path, flavour)
    with running(server):
        async with taking(server, keys, taken):
            with server.client() as admin:
                admin.rpush(QUEUE, publish("1"))
            await taken.until(1)
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
            with server.client() as admin:
                admin.rpush(QUEUE, publish("2"))
            await taken.until(2)
            with server.client() as admin:
                assert admin.xlen(keys.stream(NEWS)) == 2


# In the form that scripts/matrix.py counts: unlike `single_server`, this concerns Sentinel, too.
@pytest.mark.skipif(
    TOPOLOGY in os.environ, reason="single server: replicas and Sentinels send commands, too"
)
async def test_an_idle_queue_asks_only_for_its_lease(
    server: Server, admin: Redis, keys: Keys
) -> None:
    taken = Taken()
    async with taking(server, keys, taken, shards=4):
        await admin.rpush(QUEUE, publish("1"))
        await taken.until(1)
        await command(admin, "CONFIG", "RESETSTAT")
        await asyncio.sleep(1.2)
        stats = await admin.info("commandstats")
    assert {name for name in stats if name != "cmdstat_info"} <= {
        "cmdstat_config|resetstat",
        "cmdstat_evalsha",
        "cmdstat_get",
        "cmdstat_set",
        "cmdstat_time",
        "cmdstat_zadd",
        "cmdstat_zcard",
        "cmdstat_zremrangebyscore",
        "cmdstat_expire",
        # The last check, after the queue's own LTRIM caused an invalidation.
        "cmdstat_lrange",
    }
    assert stats["cmdstat_evalsha"]["calls"] <= 4
