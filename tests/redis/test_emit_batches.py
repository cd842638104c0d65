"""Socket.IO emits on several servers: listeners that overlap append each emit once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
from typing_extensions import override

from producers import socketio_wire as wire
from producers.socketio_append import EmitBatch
from relay.config.settings import NamespaceSettings, RedisSettings
from relay.protocols.socketio.entry_format import Emit
from relay.stream.shards.links import ShardLinks
from relay.stream.shards.making import keys_of, shard_map
from relay.stream.shards.shard import Shard
from relay.stream.write.confirmations import UnconfirmedLog
from tests.support.clients import within
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
    numbers = [json.loads(dict(zip(f[::2], f[1::2], strict=True))[b"data"]) for _, f in entries]
    assert numbers == [1, 2, 3, 4, 5]
