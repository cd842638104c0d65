"""Read the newest events of a channel together with the state of its stream.

Requests for a channel that arrive during a read share the next read. If many clients resume at the
same time, each channel is therefore read only once or twice.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from relay.core.errors import RedisUnavailable, RelayError, Unavailable
from relay.core.model import EntryID, Event
from relay.core.slices import in_slices
from relay.core.stream_interface import Snapshot
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import ReplyError
from relay.stream.connection.primary import Replication
from relay.stream.read.groups import create_marker, new_marker, parse_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.core.model import Channel
    from relay.stream.connection.pipeline_connection import RedisCommand
    from relay.stream.connection.reconnecting import ReconnectingConnection
    from relay.stream.format.keys import Keys
    from relay.stream.read.stream_commands import Decode

# Additional entries to read, because some are revocations or malformed.
_MORE = 16


class History:
    """Reads on a separate connection, so that long replies do not delay other commands."""

    def __init__(
        self,
        *,
        link: ReconnectingConnection,
        keys: Keys,
        decode: Decode,
        spawn: Callable[..., object],
    ) -> None:
        self._link = link
        self._keys = keys
        self._decode = decode
        self._spawn = spawn
        self._wanted: dict[Channel, list[tuple[int, asyncio.Future[Snapshot]]]] = {}
        self._reading: set[Channel] = set()

    def read(self, channel: Channel, count: int) -> asyncio.Future[Snapshot]:
        """Return the newest events: at least `count`, or all if there are fewer.

        Raises:
            Unavailable: Redis is unreachable, or the key is not a stream.
        """
        answer: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self._wanted.setdefault(channel, []).append((count, answer))
        if channel not in self._reading:
            self._reading.add(channel)
            self._spawn(self._serve(channel), name=f"history {channel}")
        return answer

    async def _serve(self, channel: Channel) -> None:
        try:
            # Let all requests of this event loop iteration share one read.
            await asyncio.sleep(0)
            while waiting := self._wanted.pop(channel, None):
                try:
                    snapshot = await self._read(channel, max(count for count, _ in waiting))
                except RelayError as exc:
                    for _, answer in waiting:
                        if not answer.done():
                            answer.set_exception(Unavailable(str(exc)))
                    continue
                for _, answer in waiting:
                    if not answer.done():
                        answer.set_result(snapshot)
        finally:
            self._reading.discard(channel)

    async def _read(self, channel: Channel, count: int) -> Snapshot:
        take = count + _MORE if count else 1
        while True:
            snapshot = await self._once(channel, take)
            enough = len(snapshot.events) >= count or snapshot.whole
            if enough:
                return snapshot
            take *= 4

    async def _once(self, channel: Channel, take: int) -> Snapshot:
        key, primary = self._keys.stream(channel), self._link.primary
        commands: list[RedisCommand] = [
            # The replication ID may change while the connection lasts.
            ("INFO", "replication"),
            ("MULTI",),
            # Gives an existing stream its incarnation, as an examination does.
            create_marker(key, new_marker(), primary.certificate, make=False),
            ("XINFO", "STREAM", key),
            ("XINFO", "GROUPS", key),
            ("XREVRANGE", key, "+", "-", "COUNT", take),
            ("EXEC",),
        ]
        info, *_, reply = await self._link.execute(commands)
        if isinstance(info, bytes):
            primary.observe(Replication.parse(info))
        if isinstance(reply, ReplyError):
            raise CommandRefused("EXEC", str(reply))
        if reply is None:
            raise RedisUnavailable("Redis discarded the transaction")
        stream, groups, found = cast("list[object]", reply)[-3:]
        if isinstance(found, ReplyError):
            raise CommandRefused("XREVRANGE", str(found))
        entries = cast("list[tuple[bytes, list[bytes]]]", found)
        records = [
            self._decode(channel, EntryID.parse(raw), fields)
            async for raw, fields in in_slices(entries)
        ]
        return Snapshot(
            state=parse_state(stream, groups, primary),
            records=records,
            events=[record.body for record in records if isinstance(record.body, Event)],
            whole=len(entries) < take,
        )
