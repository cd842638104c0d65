"""The newest events of a workspace, as one moment of its stream.

Whoever asks for the same channel while a read is under way shares the next one: a storm of resumes
costs one read a workspace.
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

# Revocations and entries that cannot be read stand between events.
_MORE = 16


class History:
    """Reads on a link of its own, so that long replies hold nothing else up."""

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
        """At least `count` of the newest events, if there are as many. Unavailable where Redis is
        away or the key is no stream."""
        answer: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self._wanted.setdefault(channel, []).append((count, answer))
        if channel not in self._reading:
            self._reading.add(channel)
            self._spawn(self._serve(channel), name=f"history {channel}")
        return answer

    async def _serve(self, channel: Channel) -> None:
        try:
            # So that all who ask in one turn are served by one read.
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
            raise RedisUnavailable("the transaction was not carried out")
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
