"""Maps SockJS sessions to the workers that own them.

SockJS clients choose the session ID themselves, so it cannot contain the worker. A session is
registered in Redis when it opens. Each worker refreshes all its registrations in one pipeline. If a
worker has died, another worker takes over its registration when the client's next request arrives.
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

_TTL_S = 600.0
_REFRESH_S = 200.0
_TAKE_OVER_S = 60.0
# Size of the cache of other workers' sessions. The least recently used one is evicted.
_KNOWN = 20_000


class ClaimStore(Protocol):
    """The part of the shared store that the registry uses (`relay.doorkit.contract.Store`)."""

    async def claim(self, name: str, value: bytes, ttl_s: float) -> bytes | None:
        """Write the value if the name is free and return None, else return the stored value."""

    async def put(self, name: str, value: bytes, ttl_s: float) -> None:
        """Write the value."""

    async def put_many(self, values: Mapping[str, bytes], ttl_s: float) -> None:
        """Write all values in one pipeline."""

    async def get(self, name: str) -> bytes | None:
        """Return the stored value, or None."""

    async def delete(self, name: str) -> None:
        """Delete the value."""


class TaskSpawner(Protocol):
    """Starts tasks (`relay.doorkit.contract.Spawn`)."""

    def __call__(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> object:
        """Start a task."""


class SessionRegistry:
    """Owners by session ID.

    Methods raise Unavailable if Redis is needed and cannot be reached.
    """

    def __init__(self, *, door: str, instance: str, store: ClaimStore, spawn: TaskSpawner) -> None:
        self._door = door
        self._instance = instance
        self._store = store
        self._spawn = spawn
        self._held: set[str] = set()
        self._known: OrderedDict[str, str] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    async def claim(self, session_id: str) -> str:
        """Register a session for this worker if it has no owner, and return its owner."""
        known = self._recall(session_id)
        if known is not None:
            return known
        value = self._instance.encode()
        found = await self._store.claim(self._name(session_id), value, _TTL_S)
        if found is None or found == value:
            self._hold(session_id)
            return self._instance
        return self._remember(session_id, found)

    async def take_over(self, session_id: str, dead: str) -> str:
        """Register a session whose owner has died for this worker. It starts from the beginning.

        Return the new owner, which is another worker if that one was faster.
        """
        self.forget(session_id)
        name, value = self._name(session_id), self._instance.encode()
        # Only one worker can follow an owner.
        found = await self._store.claim(f"{name}.{dead}", value, _TAKE_OVER_S)
        if found is not None and found != value:
            return self._remember(session_id, found)
        await self._store.put(name, value, _TTL_S)
        self._hold(session_id)
        return self._instance

    async def owner(self, session_id: str) -> str | None:
        """Return the worker that owns the session, or None."""
        known = self._recall(session_id)
        if known is not None:
            return known
        found = await self._store.get(self._name(session_id))
        if found is None or found == self._instance.encode():
            # The session of this worker has already been removed.
            return None
        return self._remember(session_id, found)

    def forget(self, session_id: str) -> None:
        """Remove a wrong owner from the cache."""
        self._known.pop(session_id, None)

    def release(self, session_id: str) -> None:
        """Delete the registration of a removed session."""
        self._held.discard(session_id)
        self._spawn(self._delete(session_id), name="sockjs-release")
        if not self._held and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def on_clock_jump(self, _jump_s: float) -> None:
        """Register the sessions again: the clock of Redis was set forward."""
        if self._held:
            self._spawn(self._refresh(), name="sockjs-refresh")

    # ---- inner workings -------------------------------------------------------------------------

    def _name(self, session_id: str) -> str:
        # Store a digest, because the session ID is enough to send messages for the session.
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
            await self._store.put_many(names, _TTL_S)
        except RelayError as exc:
            # Two more attempts follow before the registrations expire.
            _log.warning(
                "Could not refresh the registrations of %d SockJS sessions (%s); retrying in %d s",
                len(names),
                exc,
                _REFRESH_S,
            )

    async def _delete(self, session_id: str) -> None:
        name = self._name(session_id)
        try:
            # After a freeze, another worker may have taken over the session.
            if await self._store.get(name) == self._instance.encode():
                await self._store.delete(name)
        except RelayError as exc:
            _log.debug(
                "Could not delete a SockJS session's registration (%s); it expires within %d s",
                exc,
                _TTL_S,
            )
