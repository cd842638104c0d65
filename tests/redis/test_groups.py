"""stream/read/groups.py on real servers: parsing, and the marker's life with its stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import cast

import pytest
from redis.asyncio import Redis

from relay.core.model import EntryID, Principal, StreamState
from relay.stream.connection import scripts
from relay.stream.connection.connect import CommandRefused, command, discover
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.connection.primary import Primary
from relay.stream.format.entry import digest
from relay.stream.read import groups, stream_commands
from tests.support.hub import NEWS, Reads, Words, join, make_hub
from tests.support.several import shard_at
from tests.support.valkey import Server

pytestmark = pytest.mark.redis
STREAM = b"relay:stream:{news}"


@pytest.fixture
async def connection(server: Server) -> AsyncIterator[PipelineConnection]:
    settings = server.settings()
    endpoint, own = await shard_at(settings, STREAM)
    opened = await PipelineConnection.open(endpoint, settings=own)
    await scripts.load(opened, groups.CERTIFY)
    yield opened
    opened.close()


async def state(connection: PipelineConnection, primary: Primary | None = None) -> StreamState:
    stream, found = await connection.execute(
        [("XINFO", "STREAM", STREAM), ("XINFO", "GROUPS", STREAM)]
    )
    return stream_commands.parse_state(stream, found, primary or known(1))


def known(*certificates: int) -> Primary:
    """A server without loss since these certificates; the last one is its own."""
    primary = Primary()
    primary._without_loss.update(certificates)
    primary.certificate = certificates[-1]
    return primary


async def test_a_stream_that_is_not_there(connection: PipelineConnection) -> None:
    nothing = await state(connection)
    assert not nothing.exists
    assert (nothing.first, nothing.last, nothing.incarnation) == (None, (0, 0), None)


@pytest.mark.parametrize("life", [1, 2**32 - 1, None])
async def test_the_marker_is_kept_to_the_last_bit(
    connection: PipelineConnection, life: int | None
) -> None:
    life, certificate = life or groups.new_marker(), 2**32 - 1
    assert await connection.call(*groups.create_marker(STREAM, life, certificate)) == b"OK"
    made = await state(connection, known(certificate))
    assert (made.exists, made.first, made.length, made.added) == (True, None, 0, 0)
    assert made.incarnation == life << 32 | certificate
    with pytest.raises(CommandRefused, match="BUSYGROUP"):
        await connection.call(*groups.create_marker(STREAM, 5, 1))
    # Entries have far lower IDs than most markers. They do not affect each other.
    await connection.execute(
        [("XADD", STREAM, "7-1", "data", "1"), ("XADD", STREAM, "7-2", "data", "2")]
    )
    assert await state(connection, known(certificate)) == StreamState(
        exists=True,
        first=EntryID(7, 1),
        last=EntryID(7, 2),
        length=2,
        added=2,
        max_deleted=EntryID(0, 0),
        incarnation=made.incarnation,
        marker=made.marker,
    )


async def test_a_certificate_is_replaced_if_entries_may_have_been_lost_since(
    connection: PipelineConnection,
) -> None:
    await connection.call(*groups.create_marker(STREAM, 5, 1))
    await connection.call("XADD", STREAM, "7-1", "data", "1")
    assert groups.certify_commands(STREAM, await state(connection), 1) == []
    for certificate, last in ((2, "8-1"), (3, "9-1")):
        await connection.call("XADD", STREAM, last, "data", "1")
        lost = await state(connection, known(certificate))
        expected = (5 << 32 | certificate, EntryID.parse(last))
        assert (lost.incarnation, lost.failover) == expected
        for command_ in groups.certify_commands(STREAM, lost, certificate):
            await connection.call(*command_)
        # Failover position and history do not change while entries are appended.
        await connection.call("XADD", STREAM, last.replace("-1", "-2"), "data", "1")
        again = await state(connection, known(certificate))
        assert (again.incarnation, again.failover) == expected
        assert groups.certify_commands(STREAM, again, certificate) == []


async def test_a_certificate_of_the_same_data_is_replaced_without_a_loss(
    connection: PipelineConnection,
) -> None:
    await connection.call(*groups.create_marker(STREAM, 5, 1))
    await connection.call("XADD", STREAM, "7-1", "data", "1")
    for command_ in groups.certify_commands(STREAM, await state(connection, known(1, 2)), 2):
        await connection.call(*command_)
    now = await state(connection, known(2))
    assert (now.incarnation, now.failover) == (5 << 32 | 1, None)


async def test_a_stream_that_was_created_again_meanwhile_keeps_its_marker(
    connection: PipelineConnection,
) -> None:
    await connection.call(*groups.create_marker(STREAM, 5, 1))
    late = groups.certify_commands(STREAM, await state(connection, known(2)), 2)
    assert late
    await connection.call("DEL", STREAM)
    await connection.call(*groups.create_marker(STREAM, 6, 2))
    for command_ in late:
        await connection.call(*command_)
    now = await state(connection, known(2))
    assert (now.incarnation, now.failover) == (6 << 32 | 2, None)


async def test_a_marker_of_an_earlier_version_names_no_history(
    connection: PipelineConnection,
) -> None:
    """A loss can be neither excluded nor detected, so bare stream IDs are not proof either."""
    await connection.call("XADD", STREAM, "7-1", "data", "1")
    await connection.call("XGROUP", "CREATE", STREAM, groups.MARKER_GROUP, f"{2**63 - 1}-0")
    old = await state(connection)
    assert (old.incarnation, old.failover) == ((2**32 - 1) << 32 | 1, EntryID(7, 1))


async def test_deletions_show(connection: PipelineConnection, admin: Redis) -> None:
    for n in range(1, 4):
        await connection.call("XADD", STREAM, f"{n}-0", "data", "1")
    await admin.xdel(STREAM, "2-0")
    await connection.call("XTRIM", STREAM, "MAXLEN", 1)
    now = await state(connection)
    assert (now.first, now.length, now.added, now.max_deleted) == ((3, 0), 1, 3, (2, 0))
    assert now.incarnation is None


@pytest.mark.parametrize("words", [("DEL", STREAM), ("FLUSHALL",)])
async def test_the_marker_dies_with_the_stream(
    connection: PipelineConnection, admin: Redis, words: tuple[bytes | str, ...]
) -> None:
    await connection.call(*groups.create_marker(STREAM, 5, 1))
    await command(admin, *words)
    assert not (await state(connection)).exists


async def test_every_worker_shows_with_its_position(connection: PipelineConnection) -> None:
    await connection.call("XADD", STREAM, "7-1", "data", "1")
    await connection.call("XGROUP", "CREATE", STREAM, groups.group_of("host:ab"), "0")
    group = groups.group_of("host:ab")
    await connection.call("XREADGROUP", "GROUP", group, "c", "NOACK", "STREAMS", STREAM, ">")
    found = stream_commands.parse_groups(await connection.call("XINFO", "GROUPS", STREAM))
    assert found == {b"relay:host:ab": (7, 1)}


async def test_a_read_that_keeps_the_group_writes_nothing(connection: PipelineConnection) -> None:
    """Not to the append-only file, and not to replicas. The group shows its last position."""

    async def written() -> int:
        text = cast(bytes, await connection.call("INFO", "persistence"))
        return int(text.partition(b"aof_current_size:")[2].split()[0])

    group = groups.group_of("host:ab").decode()
    await connection.call("XADD", STREAM, "7-1", "data", "1")
    await connection.call("XGROUP", "CREATE", STREAM, group, "0")
    hub = make_hub(Reads())
    join(hub, Principal(user="ann"), Words())
    stream = hub.feed(NEWS)
    assert stream is not None
    stream.key, stream.misaligned = STREAM, False

    async def read(*, keeps_group: bool) -> list[EntryID]:
        commands = stream_commands.read_commands(stream, group, "c", 10, keeps_group=keeps_group)
        replies = await connection.execute(commands)
        own = (stream.position, stream.digest) if keeps_group else None
        _, entries = stream_commands.parse_read(replies, Primary(), aligning=False, own=own)
        stream.position = stream_commands.parse_id(entries[-1][0])
        stream.digest = digest(entries[-1][1] or ())
        return [stream_commands.parse_id(each[0]) for each in entries]

    assert await read(keeps_group=False) == [(7, 1)]
    await connection.call("XADD", STREAM, "7-2", "data", "1")
    before = await written()
    assert await read(keeps_group=True) == [(7, 2)]
    assert await written() == before
    found = stream_commands.parse_groups(await connection.call("XINFO", "GROUPS", STREAM))
    assert found[group.encode()] == (7, 1)
    await connection.call("XADD", STREAM, "7-3", "data", "1")
    before = await written()
    assert await read(keeps_group=False) == [(7, 2), (7, 3)]
    assert await written() > before
    # A move that says how many entries were read keeps the lag that operators see.
    await connection.call("XGROUP", "SETID", STREAM, group, "7-2", "ENTRIESREAD", 2)
    (shown,) = cast(list[dict[bytes, object]], await connection.call("XINFO", "GROUPS", STREAM))
    assert shown[b"lag"] == 1
    for words in (
        ("XADD", STREAM, "7-3", "data", "2"),
        ("XADD", STREAM, "7-2", "data", "1"),
        ("XADD", STREAM, "8-1", "data", "1"),
    ):
        await connection.execute([("MULTI",), ("DEL", STREAM), words, ("EXEC",)])
        with pytest.raises(stream_commands.EntryMissing):
            await read(keeps_group=True)


async def test_a_key_of_another_type_is_refused(
    connection: PipelineConnection, admin: Redis
) -> None:
    await admin.set(STREAM, "x")
    with pytest.raises(CommandRefused, match="WRONGTYPE"):
        await state(connection)


async def test_markers_survive_a_restart_from_disk(tmp_path_factory: pytest.TempPathFactory,
                                                   server: Server) -> None:  # fmt: skip
    own = Server(
        tmp_path_factory.mktemp("own"), server.flavour, options=("--appendfsync", "always")
    )
    own.start()
    try:
        settings = own.settings()
        first = await PipelineConnection.open(await discover(settings), settings=settings)
        marker = groups.new_marker()
        await first.call(*groups.create_marker(STREAM, marker, 1))
        first.close()
        own.restart()
        second = await PipelineConnection.open(await discover(settings), settings=settings)
        assert (await state(second)).incarnation == marker << 32 | 1
        second.close()
    finally:
        own.kill()
