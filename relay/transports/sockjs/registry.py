"""Which worker of the site has a session: SockJS's client chooses the ID, so it cannot say.

A session is entered when it begins, and the entry is kept alive by one pipeline for all sessions
of a worker. An entry whose worker has died is of no harm: who finds it takes it over.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

from relay.core.errors import RelayError

_log = logging.getLogger(__name__)

_KEPT_S = 600.0
_REFRESH_S = 200.0
# Sessions of other workers whose requests come here; the one that was asked for the longest ago is
# looked up again.
_KNOWN = 20_000


class ClaimStore(Protocol):
    """See `relay.doorkit.contract.Store`."""

    async def claim(self, name: str, value: bytes, ttl_s: float) -> bytes | None:
        """None where it is ours now, else what was there."""

    async def put(self, name: str, value: bytes, ttl_s: float) -> None:
        """Write it, whatever was there."""

    async def put_many(self, values: Mapping[str, bytes], ttl_s: float) -> None:
        """All of them in one pipeline."""

    async def get(self, name: str) -> bytes | None:
        """What is there."""

    async def delete(self, name: str) -> None:
        """Before its time is over."""


class TaskSpawner(Protocol):
    """See `relay.doorkit.contract.Spawn`."""

    def __call__(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> object:
        """Starts a task."""


class SessionRegistry:
    """Owners by session ID. Unavailable where Redis has to be asked and is away."""

    def __init__(self, *, door: str, instance: str, store: ClaimStore, spawn: TaskSpawner) -> None:
        self._door = door
        self._instance = instance
        self._store = store
        self._spawn = spawn
        self._held: set[str] = set()
        self._known: OrderedDict[str, str] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    async def claim(self, session_id: str) -> str:
        """Enter a session that is not known here, unless it is another worker's: its owner."""
        known = self._recall(session_id)
        if known is not None:
            return known
        value = self._instance.encode()
        found = await self._store.claim(self._name(session_id), value, _KEPT_S)
        if found is None or found == value:
            self._hold(session_id)
            return self._instance
        return self._remember(session_id, found)

    async def seize(self, session_id: str) -> None:
        """Its owner is no more: the session begins anew, here."""
        self.forget(session_id)
        await self._store.put(self._name(session_id), self._instance.encode(), _KEPT_S)
        self._hold(session_id)

    async def owner(self, session_id: str) -> str | None:
        """Who has the session, None where nobody has."""
        known = self._recall(session_id)
        if known is not None:
            return known
        found = await self._store.get(self._name(session_id))
        if found is None or found == self._instance.encode():
            # Ours it would be if it was still here.
            return None
        return self._remember(session_id, found)

    def forget(self, session_id: str) -> None:
        """What is remembered of it is wrong."""
        self._known.pop(session_id, None)

    def release(self, session_id: str) -> None:
        """The session is over."""
        self._held.discard(session_id)
        deleting = self._delete(session_id)
        try:
            self._spawn(deleting, name="sockjs-release")
        except RuntimeError:
            # The relay stops, and has ended its tasks: the entry is left to its time limit.
            deleting.close()
        if not self._held and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- inner workings -------------------------------------------------------------------------

    def _name(self, session_id: str) -> str:
        # Whoever knows a session's ID can speak for it: Redis need not.
        digest = hashlib.blake2b(session_id.encode(errors="replace"), digest_size=16)
        return f"{self._door}:sockjs:{digest.hexdigest()}"

    def _recall(self, session_id: str) -> str | None:
        found = self._known.get(session_id)
        if found is not None:
            self._known.move_to_end(session_id)
        return found

    def _remember(self, session_id: str, owner: bytes) -> str:
        name = owner.decode(errors="replace")
        self._known[session_id] = name
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return name

    def _hold(self, session_id: str) -> None:
        self._held.add(session_id)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_REFRESH_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._held:
            self._timer = asyncio.get_running_loop().call_later(_REFRESH_S, self._on_timer)
            self._spawn(self._refresh(), name="sockjs-refresh")

    async def _refresh(self) -> None:
        value = self._instance.encode()
        names = {self._name(session_id): value for session_id in self._held}
        try:
            await self._store.put_many(names, _KEPT_S)
        except RelayError as exc:
            # There are two more tries before the entries expire.
            _log.warning("the sessions of SockJS clients could not be kept in Redis: %s", exc)

    async def _delete(self, session_id: str) -> None:
        try:
            await self._store.delete(self._name(session_id))
        except RelayError as exc:
            _log.debug("an entry is left to its time limit: %s", exc)
