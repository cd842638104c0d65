"""Socket.IO emits on several servers: listeners that overlap append each emit once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
from typing_extensions import override

from producers import socketio_append
from producers import socketio_wire as wire
from producers.registry import ProducerContext
from producers.settings import EmitterSettings
from producers.socketio_append import EmitBatch
from producers.socketio_emitter import EmitterListener
from relay.config.settings import NamespaceSettings, PublishSettings, RedisSettings
from relay.core.errors import Unavailable
from relay.protocols.socketio.entry_format import Emit
from relay.protocols.socketio.settings import SocketIoSettings
from relay.stream.shards.links import ShardLinks
from relay.stream.shards.making import keys_of, shard_map
from relay.stream.shards.shard import Shard
from relay.stream.write.confirmations import UnconfirmedLog
from tests.support.clients import until, within
from tests.support.valkey import Server, running

pytestmark = pytest.mark.redis


class _Links(ShardLinks):
    """Calls `before_move` before the position is moved."""

    before_move: Callable[[], Awaitable[object]] | None = None

    @override
    async def evaluate(self, calls: Sequence[Any], shard: Shard | None = None) -> list[object]:
        if len(calls[0][1]) == 1 and (call := self.before_move):
            self.before_move = None
            await call()
        return await super().evaluate(calls, shard)


@asynccontextmanager
async def _links(settings: RedisSettings) -> AsyncIterator[_Links]:
    links = _Links(shard_map(settings), settings)
    running_links = asyncio.get_running_loop().create_task(links.run())
    try:
        await within(10, links.wait_open())
        yield links
    finally:
        running_links.cancel()


def _emit(number: int) -> Emit:
    packet = {"type": 2, "data": ["tick", number], "nsp": "/axr"}
    message = msgpack.packb(["emitter", packet, {"rooms": ["allusers"]}])
    found = wire.parse_broadcast(message, "/axr")
    assert isinstance(found, Emit)
    return found


async def test_a_shorter_and_a_longer_batch_from_the_same_position(tmp_path: Path) -> None:
    servers = [Server(tmp_path / name) for name in ("one", "two")]
    settings = RedisSettings(url=", ".join(server.url() for server in servers))
    keys = keys_of(settings)
    mark = keys.source_position("emits")

    def batch(first: int, last: int) -> EmitBatch:
        made = EmitBatch(keys, lambda _: NamespaceSettings(), 1000, "n", UnconfirmedLog("emits"))
        for number in range(first, last + 1):
            made.add(_emit(number), b"%d" % number)
        return made

    with running(*servers):
        async with _links(settings) as one, _links(settings) as other:
            # The other listener has more messages. The first one moves the position when the other
            # has appended all of its own, so that the other must begin again.
            async def overtake() -> None:
                assert await batch(1, 2).apply(one, mark, b"", b"2") == 0

            other.before_move = overtake
            assert await batch(1, 5).apply(other, mark, b"", b"5") is None
            assert await batch(3, 5).apply(other, mark, b"2", b"5") == 0
            stream = b"relay:stream:{axr:allusers}"
            entries: Any = await one.call("XRANGE", stream, "-", "+")
            # Each entry that Redis refuses becomes a dead letter.
            await one.call("SET", stream, "something else")
            assert await batch(6, 7).apply(one, mark, b"5", b"7") == 2
            letters: Any = await one.call("XRANGE", keys.dead_letters, "-", "+")
    numbers = [json.loads(dict(zip(f[::2], f[1::2], strict=True))[b"data"]) for _, f in entries]
    assert numbers == [1, 2, 3, 4, 5]
    shown = [dict(zip(f[::2], f[1::2], strict=True)) for _, f in letters]
    assert [each[b"reason"].split()[0] for each in shown] == [b"WRONGTYPE"] * 2
    assert [json.loads(each[b"fields"]) for each in shown] == [[["data", "6"]], [["data", "7"]]]


async def test_equal_emits_after_the_position_was_lost(tmp_path: Path) -> None:
    servers = [Server(tmp_path / name) for name in ("one", "two")]
    settings = RedisSettings(url=", ".join(server.url() for server in servers))
    context = ProducerContext(
        keys=keys_of(settings),
        shards=shard_map(settings),
        redis=settings,
        publish=PublishSettings(),
        instance="one",
        namespace_of=lambda _: NamespaceSettings(),
        max_entry_bytes=1000,
        count=lambda *_: None,
        protocols={"protocol:socketio": SocketIoSettings(namespace="/axr")},
        tracer=None,
    )
    stream = b"relay:stream:{axr:allusers}"
    packet = {"type": 2, "data": ["tick"], "nsp": "/axr"}
    message = msgpack.packb(["emitter", packet, {"rooms": ["allusers"]}])

    def has(entries: int) -> bool:
        return sum(each.client().xlen(stream) for each in servers) == entries

    with running(*servers):
        emitters = servers[0].client()
        source = RedisSettings(url=servers[0].url())
        for total in (3, 6):
            listener = EmitterListener(context, EmitterSettings(), source)
            task = asyncio.get_running_loop().create_task(listener.run())
            await until(lambda: emitters.pubsub_numpat() == 1)
            for _ in range(3):
                emitters.publish("socket.io#/axr#", message)
            await until(partial(has, total), limit_s=20)
            task.cancel()
            await asyncio.wait([task])
            await until(lambda: emitters.pubsub_numpat() == 0)
            for each in servers:
                each.client().delete(context.keys.source_position("socketio_emitter"))


async def test_scripts_are_removed_again_and_again(tmp_path: Path) -> None:
    """Also between the load of a script and its use, and loaded by another client in between."""
    servers = [Server(tmp_path / name) for name in ("one", "two")]
    settings = RedisSettings(url=", ".join(server.url() for server in servers))
    keys = keys_of(settings)
    stream = b"relay:stream:{axr:allusers}"
    mark = keys.source_position("emits")
    ended = threading.Event()

    def remove(server: Server) -> None:
        client = server.client()
        while not ended.is_set():
            client.script_flush()

    def load(server: Server) -> None:
        client = server.client()
        while not ended.is_set():
            for script in (socketio_append._ALL_ONCE, socketio_append._MOVE):
                client.script_load(script.text)

    with running(*servers):
        async with asyncio.TaskGroup() as tasks:
            for server in servers:
                tasks.create_task(asyncio.to_thread(remove, server))
                tasks.create_task(asyncio.to_thread(load, server))
            try:
                async with _links(settings) as links:
                    old = b""
                    for first in range(0, 300, 15):
                        new = b"%d" % (first + 15)
                        while True:
                            batch = EmitBatch(
                                keys,
                                lambda _: NamespaceSettings(),
                                1000,
                                "n",
                                UnconfirmedLog("emits"),
                            )
                            for number in range(first, first + 15):
                                batch.add(_emit(number), b"%d" % number)
                            with contextlib.suppress(Unavailable):
                                assert await batch.apply(links, mark, old, new) == 0
                                break
                        old = new
                    entries: Any = await links.call("XRANGE", stream, "-", "+")
            finally:
                ended.set()
        assert sum(each.client().exists(keys.dead_letters) for each in servers) == 0
    numbers = [json.loads(dict(zip(f[::2], f[1::2], strict=True))[b"data"]) for _, f in entries]
    assert numbers == list(range(300))
