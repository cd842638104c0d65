"""Connection state recovery of Socket.IO 4.6 and later, for every protocol that uses Socket.IO.

A session is saved in Redis before its client learns the `pid`, and saved again while the client is
connected. A worker that is killed therefore leaves it behind, and any other worker can resume it.
The saved session says where it began in each stream. How far the client has read since then is in
the `offset` that the client sends when it reconnects.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import orjson

from relay.core.errors import BadRequest, ClientError, Unavailable
from relay.core.slices import next_slice
from relay.hub import cursor

if TYPE_CHECKING:
    from relay.core.model import Channel, Position
    from relay.doorkit.contract import DoorContext

_log = logging.getLogger(__name__)

_VERSION = 1
# Sessions that are saved in one pipeline.
_SAVED_TOGETHER = 100
_MAX_PID_CHARS = 64

State = TypeVar("State")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSession(Generic[State]):
    """The data that another worker needs to resume a session.

    `worker` is the bus address of the worker that has the session. `state` belongs to the protocol
    and is encoded as JSON. `start` is a cursor of the positions where the session began.
    """

    sid: str
    user: str
    worker: str
    state: State
    start: str

    def encode(self) -> bytes:
        """Encode as JSON."""
        values = [_VERSION, self.sid, self.user, self.worker, self.state, self.start]
        # orjson leaves named tuples, such as entry IDs, to `default`.
        return orjson.dumps(values, default=str)

    def positions(
        self, auth: Mapping[str, Any], channels: Sequence[Channel]
    ) -> dict[Channel, Position] | None:
        """Return where to resume in each channel, or None if one of the positions is unknown.

        Args:
            auth: What the client sent with CONNECT; its `offset` is the last cursor it received.
            channels: The channels that the session follows.
        """
        offset = auth.get("offset")
        if offset is not None and not isinstance(offset, str):
            return None
        try:
            found = cursor.decode(self.start, channels)
            if offset is not None:
                found |= cursor.decode(offset, channels)
        except BadRequest:
            return None
        return found if len(found) == len(channels) else None


class SessionOwner(Protocol[State]):
    """The connection that has a session."""

    pid: str

    def saved_session(self) -> SavedSession[State] | None:
        """Return what to save of the session now, None if it has ended."""

    def close_superseded(self) -> None:
        """Close the connection: its client has resumed the session on another one."""


class RecoverableSessions(Generic[State]):
    """The saved sessions of one protocol, in the store under `<protocol>:session:<pid>`.

    If Redis is unreachable, clients connect without a `pid` and start anew when they reconnect.
    """

    def __init__(
        self,
        context: DoorContext,
        protocol: str,
        recovery_s: float,
        read_state: Callable[[Any], State],
    ) -> None:
        """Start saving.

        Args:
            context: Supplies the store, the bus and the task that saves sessions.
            protocol: Prefix of the names in the store and on the bus.
            recovery_s: How long a session can be resumed after its connection is lost; 0 if never.
            read_state: Decodes `SavedSession.state`; may raise ValueError or BadRequest.
        """
        self.recovery_s = recovery_s
        self._store = context.store
        self._bus = context.bus
        self._spawn = context.spawn
        self._protocol = protocol
        self._taken_topic = f"{protocol}:taken"
        self._read_state = read_state
        self._save_again_s = max(1.0, min(60.0, recovery_s / 2))
        # A session that a killed worker saved last is kept for at least `recovery_s`.
        self._ttl_s = recovery_s + 2 * self._save_again_s
        self._owners: dict[str, SessionOwner[State]] = {}
        self._changed: set[str] = set()
        self._work = asyncio.Event()
        self._bus.listen(self._taken_topic, self._on_taken)
        if recovery_s:
            context.clock.on_jump.append(self._save_all)
            _ = context.spawn(self._run(), name=f"{protocol} sessions")

    # ---- resuming ---------------------------------------------------------------------------

    async def find(
        self, auth: Mapping[str, Any], user: str
    ) -> tuple[str, SavedSession[State]] | None:
        """Return `pid` and saved session that a client asks for, or None if it has to start anew.

        A session is returned to the user whose it is only: the `pid` alone grants nothing.
        """
        pid = auth.get("pid")
        if not self.recovery_s or not isinstance(pid, str) or not 0 < len(pid) <= _MAX_PID_CHARS:
            return None
        try:
            data = await self._store.get(self._name(pid))
            saved = None if data is None else self._decode(data)
        except (Unavailable, ClientError, ValueError, TypeError, AttributeError) as exc:
            _log.warning(
                "Could not read a saved %s session (%s); the client starts a new one",
                self._protocol,
                exc,
            )
            return None
        return None if saved is None or saved.user != user else (pid, saved)

    def take_over(self, pid: str, saved: SavedSession[State]) -> None:
        """Close the connection that still has this session, on whichever worker it is.

        Such a connection is half open, since its client has reconnected.
        """
        if saved.worker == self._bus.address:
            self._supersede(pid)
            return
        # If the message is lost, the worker closes the connection after its heartbeat timeout.
        self._bus.send(saved.worker, self._taken_topic, pid.encode())

    def _on_taken(self, _address: str, payload: bytes) -> None:
        self._supersede(payload.decode(errors="replace"))

    def _supersede(self, pid: str) -> None:
        owner = self._owners.get(pid)
        if owner is not None:
            self._drop(pid)
            owner.close_superseded()

    # ---- saving -----------------------------------------------------------------------------

    async def save_first(self, pid: str, saved: SavedSession[State]) -> bool:
        """Save a session before its client learns the `pid`; return whether that succeeded."""
        if not self.recovery_s:
            return False
        try:
            await self._store.put(self._name(pid), saved.encode(), self._ttl_s)
        except Unavailable as exc:
            _log.warning(
                "Could not save a %s session (%s); the client cannot resume it", self._protocol, exc
            )
            return False
        return True

    def joined(self, owner: SessionOwner[State]) -> None:
        """Save the owner's session again and again from now on."""
        if owner.pid:
            self._owners[owner.pid] = owner

    def changed(self, owner: SessionOwner[State]) -> None:
        """Save the owner's session soon, because its state has changed."""
        if self._owners.get(owner.pid) is owner:
            self._changed.add(owner.pid)
            self._work.set()

    def left(self, owner: SessionOwner[State]) -> None:
        """Stop saving the session of a connection that was lost. It can be resumed for a while."""
        if self._owners.get(owner.pid) is owner:
            self._drop(owner.pid)

    def forget(self, pid: str) -> None:
        """Delete a session that must not be resumed."""
        self._drop(pid)
        _ = self._spawn(self._delete(pid), name=f"{self._protocol} session")

    async def _delete(self, pid: str) -> None:
        try:
            await self._store.delete(self._name(pid))
        except Unavailable as exc:
            _log.warning(
                "Could not delete a saved %s session (%s); it expires in %d s",
                self._protocol,
                exc,
                self._ttl_s,
            )

    def _drop(self, pid: str) -> None:
        self._owners.pop(pid, None)
        self._changed.discard(pid)

    def _save_all(self, _jump_s: float) -> None:
        # The saved sessions may have expired when the clock of Redis was set forward.
        self._changed.update(self._owners)
        self._work.set()

    async def _run(self) -> None:
        """Save changed sessions at once, and all of them periodically."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._save_again_s
        while True:
            try:
                async with asyncio.timeout_at(due):
                    await self._work.wait()
            except TimeoutError:
                due = loop.time() + self._save_again_s
                self._changed.update(self._owners)
            self._work.clear()
            await self._save_changed()

    async def _save_changed(self) -> None:
        pids = list(self._changed)
        self._changed.clear()
        for start in range(0, len(pids), _SAVED_TOGETHER):
            # Some connections may be lost while other sessions are being saved.
            await next_slice()
            values = {}
            for pid in pids[start : start + _SAVED_TOGETHER]:
                owner = self._owners.get(pid)
                if owner is not None and (saved := owner.saved_session()) is not None:
                    values[self._name(pid)] = saved.encode()
            try:
                await self._store.put_many(values, self._ttl_s)
            except Unavailable as exc:
                _log.warning(
                    "Could not save %d %s sessions (%s); retrying in %d s",
                    len(pids),
                    self._protocol,
                    exc,
                    self._save_again_s,
                )
                return

    def _decode(self, data: bytes) -> SavedSession[State]:
        version, sid, user, worker, state, start = orjson.loads(data)
        if version != _VERSION:
            raise ValueError("saved by another version of relay")
        return SavedSession(
            sid=sid, user=user, worker=worker, state=self._read_state(state), start=start
        )

    def _name(self, pid: str) -> str:
        return f"{self._protocol}:session:{pid}"


def new_pid() -> str:
    """Return a random session ID that cannot be guessed."""
    return secrets.token_urlsafe(16)
