"""The functions of operators' commands on real servers, with the rights of `maintenance`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from relay.config.settings import NamespaceSettings
from relay.core.errors import RelayError
from relay.core.model import ZERO_ID, Channel, EntryID, Event
from relay.stream.cluster import workers
from relay.stream.connection.connect import CommandRefused, RedisClient, command
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.format import entry
from relay.stream.format.keys import Keys
from relay.stream.read import view
from relay.stream.shards.clients import Connections, ShardClients, shard_clients
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.upkeep import dead_letter_list, overview, retention
from relay.stream.write.append import AppendCommands, Appended, send_one
from tests.support.valkey import Server

pytestmark = pytest.mark.redis
NEWS = Channel("news")
NAMESPACE = NamespaceSettings()


@pytest.fixture
async def hands(server: Server) -> AsyncIterator[ShardClients]:
    async with shard_clients(server.settings("maintenance")) as opened:
        yield opened


@pytest.fixture
async def hand(hands: ShardClients) -> RedisClient:
    """Return a client for the keys of the site."""
    await hands.shards.refresh()
    return hands.home


@pytest.fixture
async def connections(hands: ShardClients) -> AsyncIterator[Connections]:
    """Return connections with the rights of `maintenance`."""
    async with Connections(hands) as opened:
        yield opened


@pytest.fixture
async def connection(connections: Connections, keys: Keys) -> PipelineConnection:
    """Return the connection to the server of `NEWS`."""
    return await connections.to(keys.stream(NEWS))


async def publish(
    connection: PipelineConnection, keys: Keys, channel: Channel, data: str
) -> Appended:
    commands = AppendCommands(keys, lambda _: NAMESPACE, uid_window_s=60)
    fields = entry.encode(data.encode(), uid="u")
    return await send_one(connection, commands.build(channel, fields, "u"))


async def test_of_many_with_one_uid_one_appends(
    hands: ShardClients, connections: Connections, admin: Redis, keys: Keys
) -> None:
    async def once(number: int) -> Appended:
        async with Connections(hands) as own:
            connection = await own.to(keys.stream(NEWS))
            return await publish(connection, keys, NEWS, str(number))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(once(number), name=str(number)) for number in range(20)]
    done = [task.result() for task in tasks]
    assert len({each.id for each in done}) == 1
    assert sum(each.is_new for each in done) == 1
    assert await admin.xlen(keys.stream(NEWS)) == 1
    other = Channel("other")
    connection = await connections.to(keys.stream(other))
    assert (await publish(connection, keys, other, "1")).is_new


async def test_a_uid_is_not_taken_by_an_append_that_failed(
    connection: PipelineConnection, admin: Redis, keys: Keys
) -> None:
    await admin.set(keys.stream(NEWS), "no stream")
    with pytest.raises(CommandRefused, match="WRONGTYPE"):
        await publish(connection, keys, NEWS, "1")
    await admin.delete(keys.stream(NEWS))
    assert (await publish(connection, keys, NEWS, "1")).is_new


async def test_what_was_trimmed_unread_is_not_behind(
    hands: ShardClients, admin: Redis, keys: Keys
) -> None:
    key = keys.stream(NEWS)
    for number in range(1, 11):
        await command(admin, "XADD", key, f"{number}-0", "data", "1")
    await command(admin, "XGROUP", "CREATE", key, "relay:w:1", "5-0")
    await command(admin, "XGROUP", "CREATE", key, "relay:w:2", "10-0")
    await command(admin, "XTRIM", key, "MAXLEN", 2)
    await admin.set(keys.stream(Channel("foreign")), "x")
    counted: list[int] = []
    (batch,) = [
        each
        async for each in overview.walk(hands, keys, "*", counted.append, ServerErrors())
        if each
    ]
    (stream,) = batch
    behind = {each.worker: (each.behind, each.at_least) for each in stream.followers}
    assert behind == {"w:1": (2, False), "w:2": (0, False)}
    assert stream.state.length == 2
    assert counted[-1] == 2
    assert [
        each
        async for each in overview.walk(hands, keys, "n?", counted.append, ServerErrors())
        if each
    ] == []


async def test_a_deletion_within_makes_the_count_a_page(
    hands: ShardClients, admin: Redis, keys: Keys
) -> None:
    key = keys.stream(NEWS)
    for number in range(1, 151):
        await command(admin, "XADD", key, f"{number}-0", "data", "1")
    await command(admin, "XGROUP", "CREATE", key, "relay:w:1", "1-0")
    await command(admin, "XDEL", key, "120-0")
    ((stream,),) = [
        each
        async for each in overview.walk(hands, keys, "*", lambda _: None, ServerErrors())
        if each
    ]
    (follower,) = stream.followers
    assert (follower.behind, follower.at_least) == (100, True)


async def test_a_look_is_one_moment_of_a_stream_or_of_none(
    hands: ShardClients, admin: Redis, keys: Keys
) -> None:
    nothing = await view.read_view(hands, keys, NEWS, ZERO_ID, 1000)
    assert (nothing.state.exists, nothing.records, nothing.own) == (False, [], None)
    for number in (1, 2, 3):
        await command(admin, "XADD", keys.stream(NEWS), f"{number}-0", "data", str(number))
    seen = await view.read_view(hands, keys, NEWS, EntryID(1, 0), 1000, 1)
    assert seen.own is not None
    assert seen.own.id == EntryID(1, 0)
    (record,) = seen.records
    assert isinstance(record.body, Event)
    assert (record.body.data, seen.more, seen.state.length) == (b"2", True, 3)
    assert seen.state.incarnation is None
    foreign = keys.stream(Channel("foreign"))
    await admin.set(foreign, "x")
    with pytest.raises(CommandRefused, match="WRONGTYPE"):
        await view.read_view(hands, keys, Channel("foreign"), ZERO_ID, 1000)


async def test_letters_that_come_while_it_walks_wait_for_the_next_time(
    hand: RedisClient, admin: Redis, keys: Keys
) -> None:
    for number in range(1, 131):
        await command(admin, "XADD", keys.dead_letters, f"{number}-0", "reason", "r")
    ids: list[EntryID] = []
    async for page in dead_letter_list.pages(hand, keys):
        ids += [letter.id for letter in page]
        await command(admin, "XADD", keys.dead_letters, "*", "reason", "later")
    assert ids == [EntryID(number, 0) for number in range(1, 131)]
    assert await dead_letter_list.count(hand, keys) == 132


@pytest.mark.parametrize("fields", ["{}", "[[1]]", "no JSON", '[["data"]]', '[["data", 5]]'])
async def test_a_letter_with_nonsense_in_it_is_not_requeued(
    hand: RedisClient,
    hands: ShardClients,
    connection: PipelineConnection,
    admin: Redis,
    keys: Keys,
    fields: str,
) -> None:
    letter_id = await command(
        admin, "XADD", keys.dead_letters, "*", "stream", keys.stream(NEWS), "fields", fields
    )
    letter = await dead_letter_list.find(hand, keys, EntryID.parse(letter_id))
    with pytest.raises(RelayError, match="does not contain the fields"):
        await dead_letter_list.requeue(hands, connection, keys, letter, NAMESPACE)
    assert await dead_letter_list.count(hand, keys) == 1
    assert not await admin.exists(keys.stream(NEWS))


async def test_one_stream_is_trimmed_exactly(hands: ShardClients, admin: Redis, keys: Keys) -> None:
    for number in range(1, 6):
        await command(admin, "XADD", keys.stream(NEWS), f"{number}-0", "data", "1")
    await command(admin, "XADD", keys.stream(NEWS), "*", "data", "1")

    async def trim(max_entries: int | None, max_age_s: float | None) -> int | None:
        return await retention.trim_one(
            hands, keys, NEWS, max_entries=max_entries, max_age_s=max_age_s
        )

    assert await trim(4, None) == 2
    assert await trim(None, 3600) == 3
    assert await trim(None, None) == 0
    assert await trim(0, 0) == 1
    await admin.delete(keys.stream(NEWS))
    assert await trim(1, None) is None


async def test_a_heartbeat_says_how_busy_the_worker_is(
    client: Redis, admin: Redis, keys: Keys
) -> None:
    instance = workers.new_instance("one")
    load = workers.WorkerLoad(ready=False, connections=3, streams=2, lag_ms=7)
    worker = workers.describe_this_worker("one", instance, "1.2")
    beat = workers.WorkerHeartbeat(client=client, keys=keys, worker=worker, load=lambda: load)
    await beat.beat()
    # A worker of a newer version with more fields, and one that is dead.
    await admin.sadd(keys.nodes, "newer:1", "gone:1")
    newer = '{"instance":"newer:1","name":"n","host":"h","pid":1,"started":"x","version":"9","x":1}'
    await admin.set(keys.node("newer:1"), newer)
    living, silent = await workers.list_workers(client, keys)
    assert silent == ["gone:1"]
    said = {each.instance: each for each in living}
    mine = said[instance]
    assert (mine.ready, mine.connections, mine.streams, mine.lag_ms) == (False, 3, 2, 7)
    assert (said["newer:1"].version, said["newer:1"].ready) == ("9", None)
