"""The reader of one server, with a hub and clients in memory."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
from redis.asyncio import Redis

from relay.config.settings import StreamSettings
from relay.core.errors import RedisUnavailable
from relay.core.metrics import Metrics
from relay.core.model import Channel, EntryID, Position, Principal
from relay.hub.hub import Hub
from relay.stream.connection.connect import command, discover, transaction
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.format import entry
from relay.stream.format.keys import Keys
from relay.stream.read.groups import MARKER_GROUP
from relay.stream.read.invalidations import Canary
from relay.stream.read.reader import StreamReader
from relay.stream.shards.clients import ShardClients
from relay.stream.upkeep.unused import UnusedStreams
from tests.support.hub import NEWS, Client, Outbox, Reads, Words, make_hub
from tests.support.valkey import Server

CLIENTS = 200


class Reading:
    """A hub whose streams are read by a `StreamReader`."""

    def __init__(self, clients: ShardClients, keys: Keys, instance: str = "one") -> None:
        self.keys = keys
        self.hub: Hub = make_hub(Reads())
        settings = StreamSettings()
        self.reader = StreamReader(
            keys=keys,
            instance=instance,
            shard=clients.shards.shard_of(keys.stream(NEWS)),
            settings=settings,
            metrics=Metrics(),
            decode=partial(entry.decode, max_bytes=settings.max_entry_bytes),
            on_turn=self.hub.flush,
            decode_ephemeral=lambda _channel, _payload: None,
            control=None,
            unused=UnusedStreams(clients, keys),
        )
        self.hub.reads = self.reader

    def join(self, start: Position | None, channel: Channel = NEWS) -> Outbox:
        outbox = Outbox()
        session = self.hub.open(Principal(user="ann"), Words(), Client())
        session.attach(outbox)
        self.hub.subscribe(session, channel, start)
        return outbox


async def until(true: Callable[[], object]) -> None:
    """Wait for the condition. The limit is that of the test."""
    while not true():  # there is no event to wait for
        await asyncio.sleep(0.001)


@asynccontextmanager
async def running(*workers: Reading) -> AsyncIterator[None]:
    """Run the readers."""
    async with asyncio.TaskGroup() as tasks:
        started = [tasks.create_task(each.reader.run()) for each in workers]
        for each in workers:
            await each.reader.wait_ready()
        try:
            yield
        finally:
            for task in started:
                task.cancel()


async def received(outbox: Outbox, text: bytes) -> None:
    await until(lambda: b"".join(outbox.writes) == text)


async def calls(admin: Redis, name: str) -> int:
    found = await admin.info("commandstats")
    count: int = found.get(f"cmdstat_{name}", {}).get("calls", 0)
    return count


async def append(admin: Redis, keys: Keys, *texts: str) -> list[EntryID]:
    key = keys.stream(NEWS)
    added = [await command(admin, "XADD", key, "*", "data", text) for text in texts]
    return [EntryID.parse(each) for each in added]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        pytest.param({"5-1": "c", "5-2": "d"}, "c d ", id="equal IDs"),
        pytest.param({"5-2": "d", "5-3": "e"}, "d e ", id="equal and greater IDs"),
        pytest.param({"1-1": "c"}, "c ", id="smaller IDs"),
        pytest.param({"6-1": "c"}, "c ", id="greater IDs"),
        # The clients have received these.
        pytest.param({"5-1": "a", "5-2": "b"}, "", id="the same entries"),
    ],
)
async def test_a_stream_that_is_replaced_at_once_is_noticed(
    clients: ShardClients, admin: Redis, keys: Keys, entries: dict[str, str], expected: str
) -> None:
    key, workers = keys.stream(NEWS), [Reading(clients, keys, name) for name in ("one", "two")]
    async with running(*workers):
        boxes = [worker.join(None) for worker in workers]
        feeds = [worker.hub.feed(NEWS) for worker in workers]
        await until(lambda: all(feed is not None and feed.live_count for feed in feeds))
        for entry_id, text in (("5-1", "a "), ("5-2", "a b ")):
            await command(admin, "XADD", key, entry_id, "data", text[-2])
            for outbox in boxes:
                await received(outbox, text.encode())
        async with transaction(admin) as replacing:
            words = [("DEL", key), *(("XADD", key, at, "data", entries[at]) for at in entries)]
            for each in words:
                replacing.execute_command(*each)
            await replacing.execute()
        for outbox in boxes:
            pattern = rf"a b (!news:(other_incarnation|position_ahead) )+{expected}".encode()
            await until(lambda: re.fullmatch(pattern, b"".join(outbox.writes)))  # noqa: B023


async def test_clients_that_return_one_after_another_share_the_reads(
    clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    first, *_ = await append(admin, keys, "0", "1", "2", "3")
    states, ranges = await calls(admin, "xinfo|stream"), await calls(admin, "xrange")
    worker, boxes = Reading(clients, keys), []
    async with running(worker):
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(CLIENTS):
            boxes.append(worker.join(Position(first)))
            # The next client arrives when Redis could have answered the read for this one.
            await command(admin, "PING")
        for outbox in boxes:
            await received(outbox, b"1 2 3 ")
        moments = 1 + (loop.time() - began) / 0.02
    states = await calls(admin, "xinfo|stream") - states
    ranges = await calls(admin, "xrange") - ranges
    # Each time one examination, which also reads the clients' own entry, and one page.
    assert states < 2 * moments + 10, f"{states} reads in {moments:.0f} moments"
    assert ranges < 2 * moments + 10, f"{ranges} reads in {moments:.0f} moments"


async def test_certificates_are_stored_after_a_script_flush(
    clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    worker, key = Reading(clients, keys), keys.stream(NEWS)

    async def marker() -> bytes:
        groups = await command(admin, "XINFO", "GROUPS", key)
        found: bytes
        (found,) = [each[b"last-delivered-id"] for each in groups if each[b"name"] == MARKER_GROUP]
        return found

    async with running(worker):
        await append(admin, keys, "0")
        worker.join(None)
        feed = worker.hub.feed(NEWS)
        assert feed is not None
        await until(lambda: feed.live_count)
        await command(admin, "SCRIPT FLUSH")
        # A marker of another server, as after a failover.
        await command(admin, "XGROUP", "SETID", key, MARKER_GROUP, "7-1")
        worker.join(None)
        async with asyncio.timeout(15):
            while await marker() == b"7-1":
                await asyncio.sleep(0.01)


@pytest.mark.single_server("the connection to one server")
async def test_a_connection_without_invalidations_is_noticed(server: Server, keys: Keys) -> None:
    """Something between relay and Redis has turned tracking off."""
    settings = server.settings()
    canary = Canary(keys=keys, instance="one", period_s=0.05)
    endpoint = await discover(settings)
    tracking = await PipelineConnection.open(endpoint, settings=settings)
    writer = await PipelineConnection.open(endpoint, settings=settings)
    try:
        assert await canary.start(tracking)
        await tracking.call("CLIENT", "TRACKING", "OFF")
        async with asyncio.timeout(20):
            with pytest.raises(RedisUnavailable, match="no invalidation arrived"):
                await canary.verify(tracking, writer)
    finally:
        tracking.close()
        writer.close()
