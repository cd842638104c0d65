"""Confirmations of the queue and of emits on several servers: only what was really confirmed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgpack
import pytest

from producers import socketio_wire as wire
from producers.socketio_append import EmitBatch
from relay.config.settings import NamespaceSettings, RedisSettings
from relay.core.durability import Durability
from relay.core.model import Channel
from relay.protocols.socketio.entry_format import Emit
from relay.stream.shards.links import ShardLinks
from relay.stream.shards.making import keys_of, shard_map
from relay.stream.write.confirmations import UnconfirmedLog
from relay.stream.write.queue import Operation
from relay.stream.write.queue_steps import QueuePlace, SteppedQueues
from tests.support.clients import within
from tests.support.redis_cluster import wait_for
from tests.support.valkey import Server, running

pytestmark = pytest.mark.redis
_WANTED = Durability.parse("replicated:1:300")


class _Site:
    """Two servers in a list. `replica` is a replica of `owner`, which has the stream `stream`."""

    def __init__(self, folder: Path, channel: str) -> None:
        self.servers = [Server(folder / name) for name in ("one", "two")]
        self.settings = RedisSettings(url=", ".join(each.url() for each in self.servers))
        self.keys = keys_of(self.settings)
        self.stream = self.keys.stream(Channel(channel))
        self.owner = self.owner_of(self.stream)
        self.replica = Server(folder / "replica", replica_of=self.owner)

    def owner_of(self, key: bytes) -> Server:
        shards = shard_map(self.settings)
        return self.servers[list(shards.shards).index(shards.shard_of(key))]

    def stream_elsewhere(self) -> bytes:
        streams = (self.keys.stream(Channel(f"other{number}")) for number in range(100))
        return next(each for each in streams if self.owner_of(each) is not self.owner)

    @contextmanager
    def started(self) -> Iterator[None]:
        with running(*self.servers), running(self.replica):
            with self.owner.client() as admin:
                wait_for(lambda: bool(admin.set("synced", "1") and admin.wait(1, 1000)))
            yield


@asynccontextmanager
async def _links(settings: RedisSettings) -> AsyncIterator[ShardLinks]:
    links = ShardLinks(shard_map(settings), settings)
    task = asyncio.get_running_loop().create_task(links.run())
    try:
        await within(20, links.wait_open())
        yield links
    finally:
        task.cancel()


async def test_a_queue_reports_the_confirmations_of_its_own_connections(tmp_path: Path) -> None:
    site = _Site(tmp_path, "news")
    first, second = "centrifugo.api", "centrifugo.api.1"

    async def apply(queues: SteppedQueues, queue: str, stream: bytes) -> None:
        with site.owner_of(queue.encode()).client() as admin:
            admin.rpush(queue, "command")
        head = await queues.head(queue, 10)
        operation = Operation(stream, [b"data", b"1"], 0, 100, None, None, _WANTED)
        assert await queues.apply(queue, head, [operation], window_ms=1000) == 0

    async def missing(queues: SteppedQueues, queue: str) -> str:
        return (await queues.confirm(queue, [_WANTED], 1000))[_WANTED]

    with site.started():
        async with _links(site.settings) as links:
            places = [QueuePlace(name, name, None) for name in (first, second)]
            queues = SteppedQueues(links, site.keys, "worker", places)
            await apply(queues, first, site.stream)
            # Another queue of this worker writes to a server without replicas meanwhile.
            await apply(queues, second, site.stream_elsewhere())
            assert await missing(queues, first) == ""
            assert "0 of 1 replicas" in await missing(queues, second)

            site.replica.freeze()
            await apply(queues, first, site.stream)
            link = links.link_of(site.stream)
            before = link.connection
            with site.owner.client() as admin:
                admin.client_kill_filter(_type="normal", skipme=True)
            while link.connection in (None, before):
                await asyncio.sleep(0.01)
            # WAIT on the new connection would report all replicas at once.
            assert "did not confirm" in await missing(queues, first)
            site.replica.thaw()


async def test_emits_that_another_listener_has_appended_are_confirmed_as_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = _Site(tmp_path, "axr:allusers")
    mark = site.keys.source_position("emits")

    async def apply() -> list[str]:
        caplog.clear()
        rules = NamespaceSettings(durability="replicated:1:300")
        async with _links(site.settings) as links:
            made = EmitBatch(site.keys, lambda _: rules, 1000, "n", UnconfirmedLog("emits"))
            made.add(_emit(), b"1")
            await links.call("DEL", mark)
            assert await made.apply(links, mark, b"", b"1") == 0
        return [each.getMessage() for each in caplog.records if "less durable" in each.msg]

    with caplog.at_level(logging.WARNING), site.started():
        assert await apply() == []
        site.replica.freeze()
        assert len(await apply()) == 1
        site.replica.thaw()
        assert site.owner.client().xlen(site.stream) == 1


def _emit() -> Emit:
    packet = {"type": 2, "data": ["tick", 1], "nsp": "/axr"}
    message = msgpack.packb(["emitter", packet, {"rooms": ["allusers"]}])
    found = wire.parse_broadcast(message, "/axr")
    assert isinstance(found, Emit)
    return found
