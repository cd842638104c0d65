"""Connection state recovery of 4.x clients: what is kept of a session, and for how long.

A record is written before the client learns its `pid`, and renewed while it is connected, so that
nothing need be done at the end: a worker killed with -9 leaves it behind as well. It holds where
the session began in each stream; how far the client has come it says itself, with the cursor that
each event carries. Any worker can go on from the two.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from relay.core.errors import BadRequest, ClientError, Unavailable
from relay.core.model import Channel, EntryID
from relay.hub import cursor

if TYPE_CHECKING:
    from relay.core.model import Position
    from relay.doorkit.contract import Store

_log = logging.getLogger(__name__)

_PID_CHARS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One session. `rooms` are the client's rooms and where it joined them; `start` is a cursor of
    where it began; `instance` is the worker that has it."""

    sid: str
    uid: str
    instance: str
    rooms: Mapping[str, EntryID]
    start: str

    def encode(self) -> bytes:
        """As JSON."""
        rooms = {room: str(at) for room, at in self.rooms.items()}
        return orjson.dumps([1, self.sid, self.uid, self.instance, rooms, self.start])

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """ValueError where another version wrote it."""
        version, sid, uid, instance, rooms, start = orjson.loads(data)
        if version != 1:
            raise ValueError("another version's")
        joined = {room: EntryID.parse(at) for room, at in rooms.items()}
        return cls(sid=sid, uid=uid, instance=instance, rooms=joined, start=start)

    def positions(self, offset: str | None, channels: Sequence[Channel]) -> dict[Channel, Position]:
        """Where the client goes on; BadRequest where its offset is none of ours."""
        positions = cursor.decode(self.start, channels)
        if offset is not None:
            positions |= cursor.decode(offset, channels)
        return positions


class Sessions:
    """Records in Redis, under `socketio:session:<pid>`. Where Redis is away, clients connect
    without a pid and begin afresh when they come back."""

    def __init__(self, store: Store, recovery_s: float) -> None:
        self._store = store
        self.recovery_s = recovery_s
        self.renew_s = max(1.0, min(60.0, recovery_s / 2))

    @property
    def _ttl_s(self) -> float:
        # What a killed worker renewed last is there for `recovery_s` at least.
        return self.recovery_s + 2 * self.renew_s

    async def find(self, auth: Mapping[str, Any], uid: str) -> tuple[str, Record] | None:
        """The session that a client wants back, if it is this user's."""
        pid = auth.get("pid")
        if not self.recovery_s or not isinstance(pid, str) or not 0 < len(pid) <= _PID_CHARS:
            return None
        try:
            data = await self._store.get(_name(pid))
            record = None if data is None else Record.decode(data)
        except (Unavailable, ClientError, ValueError, TypeError, AttributeError) as exc:
            _log.warning("a session cannot be recovered: %s", exc)
            return None
        # The pid alone must not open anybody's rooms.
        return None if record is None or record.uid != uid else (pid, record)

    async def keep(self, pid: str, record: Record) -> bool:
        """Whether it could be written."""
        try:
            await self._store.put(_name(pid), record.encode(), self._ttl_s)
        except Unavailable as exc:
            _log.warning("a session is not kept: %s", exc)
            return False
        return True

    async def renew(self, records: Mapping[str, Record]) -> None:
        """Store records of connected clients in one pipeline."""
        batch = {_name(pid): record.encode() for pid, record in records.items()}
        try:
            await self._store.put_many(batch, self._ttl_s)
        except Unavailable as exc:
            _log.warning("Sessions of %d Socket.IO clients not stored: %s", len(batch), exc)

    async def forget(self, pid: str) -> None:
        """The client has left, or must begin afresh."""
        try:
            await self._store.delete(_name(pid))
        except Unavailable as exc:
            _log.warning("a session is not forgotten: %s", exc)


def new_pid() -> str:
    """Nobody can guess it."""
    return secrets.token_urlsafe(16)


def _name(pid: str) -> str:
    return f"socketio:session:{pid}"


def positions_of(
    record: Record, auth: Mapping[str, Any], channels: Sequence[Channel]
) -> dict[Channel, Position] | None:
    """Where to go on in each channel; None where that cannot be told."""
    offset = auth.get("offset")
    if offset is not None and not isinstance(offset, str):
        return None
    try:
        return record.positions(offset, channels)
    except BadRequest:
        return None
