"""What is kept of an npm client's session, so that any worker can go on after a cut.

A record is written before the client learns its `pid`, again whenever it moves, and renewed while
it is connected: a worker killed with -9 leaves it behind too. It says where the session began in
each stream; how far the client has come it says itself, with the cursor in each message.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from relay.core.errors import BadRequest, Unavailable
from relay.hub import cursor

if TYPE_CHECKING:
    from relay.core.model import Channel, Position
    from relay.doorkit.contract import Store

_log = logging.getLogger(__name__)

_BATCH = 1000
_PID_CHARS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One session. `start` is a cursor of where it began; `instance` is the worker that has it."""

    sid: str
    user: str
    instance: str
    repository: str | None
    start: str

    def encode(self) -> bytes:
        """As JSON."""
        return orjson.dumps([1, self.sid, self.user, self.instance, self.repository, self.start])

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """ValueError where another version wrote it."""
        version, sid, user, instance, repository, start = orjson.loads(data)
        if version != 1:
            raise ValueError("another version's")
        return cls(sid=sid, user=user, instance=instance, repository=repository, start=start)

    def positions(
        self, auth: Mapping[str, Any], channels: Sequence[Channel]
    ) -> dict[Channel, Position] | None:
        """Where the client goes on in all of them; None where that cannot be told."""
        offset = auth.get("offset")
        try:
            found = cursor.decode(self.start, channels)
            if isinstance(offset, str):
                found |= cursor.decode(offset, channels)
        except BadRequest:
            return None
        return found if len(found) == len(channels) else None


class Sessions:
    """Records in Redis, under `pydio:session:<pid>`. `run` must be running."""

    def __init__(self, store: Store, recovery_s: float) -> None:
        self._store = store
        self.recovery_s = recovery_s
        self._renew_s = max(1.0, min(60.0, recovery_s / 2))
        # What a killed worker renewed last is there for `recovery_s` at least.
        self._ttl_s = recovery_s + 2 * self._renew_s
        self._records: dict[str, Callable[[], Record]] = {}
        self._changed: set[str] = set()
        self._work = asyncio.Event()

    async def find(self, auth: Mapping[str, Any], user: str) -> tuple[str, Record] | None:
        """The session that a client wants back, if it is this user's."""
        pid = auth.get("pid")
        if not self.recovery_s or not isinstance(pid, str) or not 0 < len(pid) <= _PID_CHARS:
            return None
        try:
            data = await self._store.get(_name(pid))
            record = None if data is None else Record.decode(data)
        except (Unavailable, ValueError, TypeError) as exc:
            _log.warning("a session cannot be recovered: %s", exc)
            return None
        # The pid alone must not open anybody's workspace.
        return None if record is None or record.user != user else (pid, record)

    async def begin(self, pid: str, record: Callable[[], Record]) -> bool:
        """Whether the session can be recovered from now on."""
        if not self.recovery_s:
            return False
        try:
            await self._store.put(_name(pid), record().encode(), self._ttl_s)
        except Unavailable as exc:
            _log.warning("a session is not kept: %s", exc)
            return False
        self._records[pid] = record
        return True

    def changed(self, pid: str) -> None:
        """It has moved."""
        if pid in self._records:
            self._changed.add(pid)
            self._work.set()

    def leave(self, pid: str) -> None:
        """It is not connected here any more; the record stays for its time."""
        self._records.pop(pid, None)
        self._changed.discard(pid)

    async def forget(self, pid: str) -> None:
        """The client has left, or must begin afresh."""
        self.leave(pid)
        try:
            await self._store.delete(_name(pid))
        except Unavailable as exc:
            _log.warning("a session is not forgotten: %s", exc)

    async def run(self) -> None:
        """For ever: writes what has changed at once, and all now and then."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._renew_s
        while True:
            try:
                async with asyncio.timeout_at(due):
                    await self._work.wait()
            except TimeoutError:
                due = loop.time() + self._renew_s
                self._changed.update(self._records)
            self._work.clear()
            await self._write()

    async def _write(self) -> None:
        names = [pid for pid in self._changed if pid in self._records]
        self._changed.clear()
        for at in range(0, len(names), _BATCH):
            # Some may have left while the others were written.
            records = {pid: self._records.get(pid) for pid in names[at : at + _BATCH]}
            batch = {_name(pid): each().encode() for pid, each in records.items() if each}
            try:
                await self._store.put_many(batch, self._ttl_s)
            except Unavailable as exc:
                _log.warning("sessions are not renewed: %s", exc)
                return


def new_pid() -> str:
    """Nobody can guess it."""
    return secrets.token_urlsafe(16)


def _name(pid: str) -> str:
    return f"pydio:session:{pid}"
