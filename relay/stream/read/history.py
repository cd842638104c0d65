"""Read the newest events of a channel together with the state of its stream.

Requests for a channel that arrive during a read, or within `WINDOW_S` after its begin, share the
next read. If many clients resume at the same time, each channel is therefore read a few times.

Redis has no limit in bytes for a range of a stream, and any entry may be larger than all others. A
history is therefore read in pages, each of few enough entries, and it ends with the page that
reaches `MAX_BYTES`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

from relay.core.errors import RelayError, StreamRefused, Unavailable
from relay.core.model import Event
from relay.core.slices import in_slices
from relay.core.stream_interface import Snapshot
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import ReplyError
from relay.stream.connection.primary import Replication
from relay.stream.read.groups import create_marker, new_marker
from relay.stream.read.join_window import WINDOW_S
from relay.stream.read.stream_commands import parse_id, parse_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.core.model import Channel, Record, StreamState
    from relay.stream.connection.pipeline_connection import RedisCommand
    from relay.stream.connection.primary import Primary
    from relay.stream.format.keys import Keys
    from relay.stream.read.stream_commands import Decode
    from relay.stream.shards.links import ShardLinks
    from relay.stream.shards.shard import Shard

# Additional entries to read, because some are revocations or malformed.
_MORE = 16
# Size of the entries after which no older ones are read.
MAX_BYTES = 16 << 20
# Entries in the first page. Each further page has twice as many, up to _PAGE_ENTRIES and to
# _PAGE_BYTES if every entry had the maximum size.
_FIRST_PAGE, _PAGE_ENTRIES, _PAGE_BYTES = 8, 64, 128 << 20
# Channels that are read at the same time, from all servers and at least from each of them.
_AT_ONCE, _LEAST_AT_ONCE = 16, 2


class History:
    """Reads on a separate connection, so that long replies do not delay other commands."""

    def __init__(
        self,
        *,
        links: ShardLinks,
        keys: Keys,
        decode: Decode,
        spawn: Callable[..., object],
        max_entry_bytes: int,
    ) -> None:
        self._links = links
        self._keys = keys
        self._decode = decode
        self._spawn = spawn
        self._requested: dict[Channel, list[tuple[int, asyncio.Future[Snapshot]]]] = {}
        self._reading: set[Channel] = set()
        self._most = max(1, min(_PAGE_ENTRIES, _PAGE_BYTES // max_entry_bytes))
        # By server, because one that does not answer must not hold up reads from the others.
        self._slots: WeakKeyDictionary[Shard, asyncio.Semaphore] = WeakKeyDictionary()

    def read(self, channel: Channel, count: int) -> asyncio.Future[Snapshot]:
        """Return the newest events: at least `count`, or all if there are fewer.

        There may be fewer events if they are larger than MAX_BYTES together.

        Raises:
            StreamRefused: Redis refuses to read the stream, or the key is not a stream.
            Unavailable: Redis is unreachable.
        """
        result: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self._requested.setdefault(channel, []).append((count, result))
        if channel not in self._reading:
            self._reading.add(channel)
            self._spawn(self._serve(channel), name=f"history {channel}")
        return result

    async def _serve(self, channel: Channel) -> None:
        loop = asyncio.get_running_loop()
        try:
            # Let all requests of this event loop iteration share one read.
            await asyncio.sleep(0)
            while waiting := self._requested.pop(channel, None):
                window_ends = loop.time() + WINDOW_S
                try:
                    snapshot = await self._read(channel, max(count for count, _ in waiting))
                except RelayError as exc:
                    error = StreamRefused if isinstance(exc, CommandRefused) else Unavailable
                    for _, result in waiting:
                        if not result.done():
                            result.set_exception(error(str(exc)))
                else:
                    for _, result in waiting:
                        if not result.done():
                            result.set_result(snapshot)
                await asyncio.sleep(window_ends - loop.time())
        finally:
            self._reading.discard(channel)

    async def _read(self, channel: Channel, count: int) -> Snapshot:
        async with self._slots_of(channel):
            while True:
                snapshot = await self._read_pages(channel, count)
                if snapshot is not None:
                    return snapshot

    def _slots_of(self, channel: Channel) -> asyncio.Semaphore:
        shards = self._links.shards
        shard = shards.shard_of(self._keys.stream(channel))
        slots = self._slots.get(shard)
        if slots is None:
            most = max(_LEAST_AT_ONCE, _AT_ONCE // len(shards.shards))
            slots = self._slots[shard] = asyncio.Semaphore(most)
        return slots

    async def _read_pages(self, channel: Channel, count: int) -> Snapshot | None:
        """Return the newest events, or None if the stream was replaced between two pages."""
        state: StreamState | None = None
        records: list[Record] = []
        events: list[Event] = []
        size = 0
        most = min(_FIRST_PAGE, self._most) if count else 1
        while True:
            # An ID in parentheses is not part of the range itself.
            newest = f"({records[-1].id}" if records else "+"
            now, entries = await self._page(channel, newest, most)
            if state is None:
                state = now
            elif now.incarnation != state.incarnation:
                return None
            else:
                # Entries that were removed since the first page are missing in this one.
                state = replace(state, first=now.first, max_deleted=now.max_deleted)
            async for raw, fields in in_slices(entries):
                record = self._decode(channel, parse_id(raw), fields)
                records.append(record)
                size += record.size
                if isinstance(record.body, Event):
                    events.append(record.body)
            whole = len(entries) < most
            if whole or len(events) >= count or size >= MAX_BYTES:
                return Snapshot(state=state, records=records, events=events, whole=whole)
            most = min(2 * most, count - len(events) + _MORE, self._most)

    async def _page(
        self, channel: Channel, newest: str, most: int
    ) -> tuple[StreamState, list[tuple[bytes, list[bytes]]]]:
        key = self._keys.stream(channel)

        def commands(primary: Primary) -> list[RedisCommand]:
            return [
                # If the stream exists, give it an incarnation, as an examination does.
                create_marker(key, new_marker(), primary.certificate, make=False),
                ("XINFO", "STREAM", key),
                ("XINFO", "GROUPS", key),
                ("XREVRANGE", key, newest, "-", "COUNT", most),
            ]

        # The replication ID may change while the connection lasts.
        (info,), reply, primary = await self._links.transaction(
            key, commands, [("INFO", "replication")]
        )
        if isinstance(info, bytes):
            primary.observe(Replication.parse(info))
        stream, groups, found = reply[-3:]
        if isinstance(found, ReplyError):
            raise CommandRefused("XREVRANGE", str(found))
        entries = cast("list[tuple[bytes, list[bytes]]]", found)
        return parse_state(stream, groups, primary), entries
