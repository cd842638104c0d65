"""Read a stream's state and entries, for operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from relay.core.model import ZERO_ID, Channel, EntryID, Record, StreamState
from relay.core.slices import in_slices
from relay.stream.connection import connect
from relay.stream.connection.connect import RedisClient
from relay.stream.connection.primary import Primary, Replication
from relay.stream.format import entry
from relay.stream.format.keys import Keys
from relay.stream.read.stream_commands import parse_state
from relay.stream.shards.clients import ShardClients

PAGE = 50
# A wait longer than the client's command timeout would be treated as a dead connection.
_BLOCK_SHARE = 0.5
_BLOCK_MS = 1000
_NEWEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A snapshot of a stream. `own` is the entry at the requested position, `records` are the first
    ones after it, and `more` is True if there may be others."""

    state: StreamState
    own: Record | None
    records: list[Record]
    more: bool


async def read_view(
    clients: ShardClients,
    keys: Keys,
    channel: Channel,
    after: EntryID,
    max_entry_bytes: int,
    count: int = PAGE,
) -> View:
    """Read a snapshot of the stream, with up to `count` entries after `after`.

    Raises:
        RedisUnavailable: The server cannot be reached, or the stream's slot is being moved.
    """
    key = keys.stream(channel)
    # INFO has no key, so the client of a Cluster cannot send it.
    ((_, client, _),) = await clients.split([key])
    async with connect.transaction(client) as transaction:
        transaction.execute_command("XINFO", "STREAM", key)
        transaction.execute_command("XINFO", "GROUPS", key)
        transaction.execute_command("XRANGE", key, str(after), str(after))
        transaction.execute_command("XRANGE", key, f"({after}", "+", "COUNT", count)
        transaction.execute_command("INFO", "replication")
        stream, found, own, entries, info = await transaction.execute(raise_on_error=False)
        for reply in (own, entries, info):
            if isinstance(reply, Exception):
                raise reply
        state = stream_state(stream, found, str(info["master_replid"]).encode())
    records = [_record(channel, each, max_entry_bytes) async for each in in_slices(entries)]
    return View(
        state=state,
        own=_record(channel, own[0], max_entry_bytes) if own else None,
        records=records,
        more=len(records) == count,
    )


async def read_newest(
    client: RedisClient,
    keys: Keys,
    channel: Channel,
    before: EntryID | None,
    max_entry_bytes: int,
    count: int,
) -> list[Record]:
    """Read up to `count` entries before `before`, or the newest ones, newest first.

    There are fewer if they are large. The list is empty only if there are no such entries.
    """
    records: list[Record] = []
    size, at = 0, f"({before}" if before else "+"
    # Redis has no limit in bytes, so the first entries show how many more can be read at once.
    most = 1
    while len(records) < count and size < _NEWEST_BYTES:
        words = (keys.stream(channel), at, "-", "COUNT", min(most, count - len(records)))
        found = await connect.command(client, "XREVRANGE", *words)
        records += [_record(channel, each, max_entry_bytes) async for each in in_slices(found)]
        if len(found) < most:
            break
        size += sum(len(part) for each in found for pair in each[1].items() for part in pair)
        at = f"({records[-1].id}"
        most = max(1, min(4 * most, (_NEWEST_BYTES - size) * len(records) // max(1, size)))
    return records


async def wait_for_entry(
    client: RedisClient, keys: Keys, channel: Channel, after: EntryID, limit_s: float
) -> None:
    """Wait until there is an entry after `after`, or for less than `limit_s`."""
    block_ms = max(1, min(_BLOCK_MS, int(limit_s * 1000 * _BLOCK_SHARE)))
    words = ("COUNT", 1, "BLOCK", block_ms, "STREAMS", keys.stream(channel), str(after))
    await connect.command(client, "XREAD", *words)


def stream_state(stream: object, found: object, replid: bytes = b"") -> StreamState:
    """Call `parse_state` with the replies of a redis-py pipeline. Raise errors in them."""
    if isinstance(stream, Exception) and "no such key" in str(stream):
        return StreamState(
            exists=False, first=None, last=ZERO_ID, length=0, added=0, max_deleted=ZERO_ID
        )
    for reply in (stream, found):
        if isinstance(reply, Exception):
            raise reply
    primary = Primary()
    primary.observe(Replication(b"master", replid, b""))
    return parse_state(stream, found, primary)


def _record(channel: Channel, raw: tuple[bytes, dict[bytes, bytes]], max_bytes: int) -> Record:
    entry_id, values = raw
    flat: list[Any] = [part for pair in values.items() for part in pair]
    return entry.decode(channel, EntryID.parse(entry_id), flat, max_bytes)
