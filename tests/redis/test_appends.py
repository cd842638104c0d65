"""control.py, dead_letters.py and revoke.py on real servers, each with its user's rights."""

from __future__ import annotations

import asyncio
import base64
import json
from itertools import chain
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from relay.config.settings import RedisSettings
from relay.core.model import Broken, Channel, EntryID, Grant, Revocation
from relay.stream.connection.connect import CommandRefused
from relay.stream.format import entry
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import ShardClients, shard_clients
from relay.stream.write import control, dead_letters
from relay.stream.write.revoke import grant, revoke
from tests.support.cutter import cutting
from tests.support.valkey import Server, password_of

pytestmark = pytest.mark.redis
NEWS = Channel("news")
ID = EntryID(5, 1)


async def only_entry(admin: Redis, key: bytes) -> tuple[EntryID, list[bytes]]:
    raw = await admin.execute_command("XRANGE", key, "-", "+")  # type: ignore[no-untyped-call]
    (entries,) = [raw] if isinstance(raw, list) else [list(raw)]
    ((entry_id, fields),) = entries
    flat = (
        [part for pair in fields.items() for part in pair] if isinstance(fields, dict) else fields
    )
    return EntryID.parse(entry_id), list(flat)


async def letter(admin: Redis, keys: Keys) -> dict[str, str]:
    _, fields = await only_entry(admin, keys.dead_letters)
    texts = [field.decode() for field in fields]
    return dict(zip(texts[::2], texts[1::2], strict=True))


async def test_a_control_command_is_appended(
    clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    command = control.UnsubscribeUser(channel=NEWS, user="anna")
    entry_id = await control.publish(clients, keys, command)
    found_id, fields = await only_entry(admin, keys.control)
    assert found_id == entry_id
    assert control.decode(found_id, fields) == control.SentCommand(
        entry_id, command, {NEWS: EntryID(0, 0)}
    )


async def test_a_dead_letter_is_written_once(
    clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    broken = Broken(ID, "no data", ((b"text", b"hello"), (b"raw", b"\xff\x00")))
    async with asyncio.TaskGroup() as tasks:
        written = [
            tasks.create_task(dead_letters.write(clients, keys, NEWS, broken, node=f"node:{n}"))
            for n in range(5)
        ]
    assert sorted(task.result() for task in written) == [False] * 4 + [True]
    found = await letter(admin, keys)
    assert (found["stream"], found["id"], found["reason"]) == (
        "relay:stream:{news}",
        "5-1",
        "no data",
    )
    assert found["node"].startswith("node:")
    assert found["at"].endswith("+00:00")
    raw = base64.b64encode(b"\xff\x00").decode()
    assert json.loads(found["fields"]) == [["text", "hello"], ["raw", {"base64": raw}]]
    assert "truncated" not in found
    assert 86000 < await admin.ttl(keys.dead_letter_mark(NEWS, ID)) <= 86400


@pytest.mark.single_server("the client of one server")
async def test_a_dead_letter_is_written_although_a_reply_is_lost(
    server: Server, admin: Redis, keys: Keys
) -> None:
    broken = Broken(ID, "no data", ())
    mark = keys.dead_letter_mark(NEWS, ID)
    async with cutting(server.port) as cutter:
        url = f"redis://relay:{password_of('relay')}@127.0.0.1:{cutter.port}"
        async with shard_clients(RedisSettings(url=url)) as clients:
            assert await clients.home.ping()
            cutter.silence_replies()
            async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
                written = tasks.create_task(
                    dead_letters.write(clients, keys, NEWS, broken, node="node:1")
                )
                while not await admin.exists(mark):
                    await asyncio.sleep(0.01)
                cutter.cut(0)
            assert written.result()
            assert (await letter(admin, keys))["id"] == "5-1"
            assert not await dead_letters.write(clients, keys, NEWS, broken, node="node:1")


@pytest.mark.parametrize(
    "pairs",
    [
        ((b"data", "ä".encode() * 100_000), (b"x", b"y")),
        ((b"data", b"\xff" * 200_000),),
        (*[(b"n%d" % n, b"v" * 100) for n in range(2000)],),
        ((b"n" * 100_000, b"v"),),
    ],
)
async def test_a_large_one_is_cut_and_says_so(
    clients: ShardClients, admin: Redis, keys: Keys, pairs: tuple[tuple[bytes, bytes], ...]
) -> None:
    await dead_letters.write(clients, keys, NEWS, Broken(ID, "too large", pairs), node="n")
    found = await letter(admin, keys)
    assert found["truncated"] == "1"
    assert 50_000 < len(found["fields"].encode()) < 110_000
    json.loads(found["fields"])


async def test_a_revocation_is_hash_and_entry(server: Server, admin: Redis, keys: Keys) -> None:
    await admin.hset(keys.rights(NEWS), "anna", "rw")
    async with shard_clients(server.settings("maintenance")) as maintenance:
        entry_id = await revoke(maintenance, keys, NEWS, "anna")
    assert await admin.hgetall(keys.rights(NEWS)) == {b"anna": b"-"}
    found_id, fields = await only_entry(admin, keys.stream(NEWS))
    assert found_id == entry_id
    assert entry.decode(NEWS, found_id, fields, 1).body == Revocation(entry_id, "anna")


@pytest.mark.parametrize("before", [None, b"r", b"rw"])
async def test_a_grant_is_the_inverse_of_a_revocation(
    server: Server, admin: Redis, keys: Keys, before: bytes | None
) -> None:
    if before is not None:
        await admin.hset(keys.rights(NEWS), "anna", before)
    await admin.hset(keys.rights(NEWS), "ben", "-")
    rights = await admin.hgetall(keys.rights(NEWS))
    async with shard_clients(server.settings("maintenance")) as maintenance:
        assert await grant(maintenance, keys, NEWS, "anna") is None
        # The second revocation must not store the first one as the previous right.
        revoked = [await revoke(maintenance, keys, NEWS, "anna") for _ in range(2)]
        assert await admin.hget(keys.rights(NEWS), "anna") == b"-"
        granted = await grant(maintenance, keys, NEWS, "anna")
        assert granted is not None
        assert await grant(maintenance, keys, NEWS, "anna") is None
    assert await admin.hgetall(keys.rights(NEWS)) == rights
    assert not await admin.exists(keys.revoked(NEWS))
    found = cast(Any, await admin.xrange(keys.stream(NEWS)))
    bodies = [
        entry.decode(NEWS, EntryID.parse(each), [*chain(*fields.items())], 9).body
        for each, fields in found
    ]
    assert bodies == [*(Revocation(each, "anna") for each in revoked), Grant(granted, "anna")]
    (told,) = cast(Any, await admin.xrange(keys.control))
    assert told[1] == {b"command": b"drop-rights", b"channel": NEWS.encode(), b"user": b"anna"}


async def test_a_right_that_the_application_has_given_since_stays(
    server: Server, admin: Redis, keys: Keys
) -> None:
    async with shard_clients(server.settings("maintenance")) as maintenance:
        await admin.hset(keys.rights(NEWS), "anna", "r")
        await revoke(maintenance, keys, NEWS, "anna")
        await admin.hset(keys.rights(NEWS), "anna", "rw")
        assert await grant(maintenance, keys, NEWS, "anna") is None
        assert await admin.hget(keys.rights(NEWS), "anna") == b"rw"
        # The value before an earlier revocation is not restored.
        await admin.hdel(keys.rights(NEWS), "anna")
        await revoke(maintenance, keys, NEWS, "anna")
        await grant(maintenance, keys, NEWS, "anna")
    assert not await admin.exists(keys.rights(NEWS))


async def test_the_relay_itself_may_not_write_rights(
    clients: ShardClients, admin: Redis, keys: Keys
) -> None:
    with pytest.raises(CommandRefused):
        await revoke(clients, keys, NEWS, "anna")
    with pytest.raises(CommandRefused):
        await grant(clients, keys, NEWS, "anna")
    assert await admin.dbsize() == 0
