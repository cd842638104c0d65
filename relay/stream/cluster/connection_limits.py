"""Limit the connections of each user across all workers and hosts.

Each worker stores the connections of its own users in a hash, which expires soon after the worker
has died. A new connection is added to the hash, and the hashes of the other workers are read in the
same transaction. If two connections arrive at two workers at the same time and one more is allowed,
exactly one is accepted. With more simultaneous connections, one that is counted and then rejected
may cause another to be rejected too, but the limit is never exceeded.

All waiting connections share one transaction at a time. Without a limit nothing is written. An idle
client causes no commands, a worker one command every RENEW_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from relay.core.errors import LimitExceeded, RelayError, Unavailable
from relay.stream.connection import connect
from relay.stream.connection.refusals import Refusals

if TYPE_CHECKING:
    from relay.stream.connection.connect import RedisClient
    from relay.stream.format.keys import Keys

RENEW_S = 2.0
# After a host has died, its clients may be rejected for this long, because they are still counted.
EXPIRY_S = 6

# Name of an area in `Refusals`.
COUNTS = "counts of connections"

_log = logging.getLogger(__name__)


class _Count(NamedTuple):
    """The connections of one user: in one protocol, or in all protocols if `door` is None."""

    user: str
    door: str | None

    @property
    def field(self) -> str:
        return self.user if self.door is None else f"{self.user}\x1f{self.door}"


class ConnectionLimiter:
    """The limiter of this worker. `limit` may be changed at any time; 0 means unlimited.

    A protocol may have a limit of its own, which counts only the connections of that protocol.
    """

    def __init__(
        self,
        *,
        client: RedisClient,
        keys: Keys,
        instance: str,
        limit: int,
        count: Callable[[str, str | None], int],
        users: Callable[[], Iterable[str]],
        dead: Callable[[str], bool],
        evict: Callable[[Mapping[tuple[str, str | None], int]], None] = lambda _: None,
        refusals: Refusals | None = None,
    ) -> None:
        """Create the limiter of one worker.

        Args:
            client: A client of the shared Redis.
            keys: The names of its keys.
            instance: The instance of this worker.
            limit: Maximum connections per user.
            count: Returns the local connections of a user, of one protocol or of all (None).
            users: Returns the users that are connected to this worker.
            dead: Returns True for a worker that is known to have died, before its hash expires.
            evict: Disconnects so many sessions of each user (and protocol, or None).
            refusals: Where refused commands are recorded.
        """
        self.limit = limit
        self._refusals = refusals or Refusals()
        self._door_limits: dict[str, int] = {}
        self._client = client
        self._keys = keys
        self._instance = instance
        self._own = keys.users(instance)
        self._count = count
        self._users = users
        self._dead = dead
        self._evict = evict
        # The hash has expired in a freeze, so other workers may have accepted more connections.
        self._has_expired = False
        # Requested connections, and those of them that were accepted but have no session yet.
        self._reserved: Counter[_Count] = Counter()
        self._accepted: Counter[_Count] = Counter()
        self._waiting: list[tuple[_Count, asyncio.Future[None]]] = []
        self._changed: set[str] = set()
        self._work = asyncio.Event()
        self._written = False

    @contextlib.asynccontextmanager
    async def slot(self, user: str, door: str | None = None, limit: int = 0) -> AsyncIterator[None]:
        """Reserve a connection slot; open the session within this context.

        Raises:
            LimitExceeded: The user has `limit` connections of the protocol `door`, or the maximum
                of all protocols if `door` is None.
            Unavailable: Redis is unreachable.
        """
        if door is not None:
            self._door_limits[door] = limit
        count = _Count(user, door)
        if not user or not self._limit_of(count):
            yield
            return
        # Local connections alone may reach the limit: repeated attempts then cause no commands.
        self._check(count, 0)
        self._reserved[count] += 1
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, accepted))
        self._work.set()
        try:
            await accepted
            try:
                yield
            finally:
                _decrement(self._accepted, count)
        finally:
            _decrement(self._reserved, count)
            self.changed(user)

    def changed(self, user: str) -> None:
        """Update the count after a session of the user has begun or ended."""
        if user and self._limited():
            self._changed.add(user)
            self._work.set()

    def on_wake(self, frozen_s: float) -> None:
        """Compare all users with their limits again if the hash may have expired in a freeze."""
        if frozen_s >= EXPIRY_S - RENEW_S:
            self._has_expired = True
            self._written = False
            self._work.set()

    async def run(self) -> None:
        """Exchange counts with Redis until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await self._work.wait()
            self._work.clear()
            waiting, self._waiting = self._waiting, []
            is_checking, self._has_expired = self._has_expired, False
            asked = {who for who, _ in waiting}
            if is_checking:
                asked |= {_Count(user, door) for user in self._users() for door in self._limited()}
            try:
                others = await self._exchange(asked)
            except (connect.CommandRefused, connect.RefusedForNow) as exc:
                # Redis is reachable but rejects writes. A limit per worker is better than rejecting
                # all clients.
                self._refusals.refused(
                    COUNTS, exc.reply, "connection limits apply to each worker separately"
                )
                self._written = False
                self._accept(waiting, {count: 0 for count, _ in waiting})
                await asyncio.sleep(0.2)
                continue
            except RelayError as exc:
                _log.debug("Could not count connections: %s", exc)
                self._has_expired |= is_checking
                for _, accepted in waiting:
                    if not accepted.done():
                        accepted.set_exception(
                            Unavailable("the connection limit cannot be checked now")
                        )
                self._written = False
                await asyncio.sleep(0.2)
                continue
            self._refusals.accepted(COUNTS)
            if is_checking:
                # They reconnect, and are admitted or rejected like new connections.
                self._evict(self._excess(others))
            self._accept(waiting, others)

    def _accept(
        self, waiting: list[tuple[_Count, asyncio.Future[None]]], others: dict[_Count, int]
    ) -> None:
        for count, accepted in waiting:
            if accepted.done():
                continue
            try:
                self._check(count, others[count])
            except LimitExceeded as exc:
                accepted.set_exception(exc)
            else:
                self._accepted[count] += 1
                accepted.set_result(None)

    def _excess(self, others: Mapping[_Count, int]) -> dict[tuple[str, str | None], int]:
        """Return how many local connections exceed each user's limit."""
        found: dict[tuple[str, str | None], int] = {}
        for who, elsewhere in others.items():
            own, limit = self._count(*who), self._limit_of(who)
            if who.user and limit and own and own + elsewhere > limit:
                found[who] = min(own, own + elsewhere - limit)
        return found

    async def leave(self) -> None:
        """Delete the counts of this worker, after its last client was disconnected at shutdown."""
        if self._written:
            await connect.command(self._client, "DEL", self._own)

    def _limit_of(self, count: _Count) -> int:
        return self.limit if count.door is None else self._door_limits.get(count.door, 0)

    def _limited(self) -> list[str | None]:
        """Return the protocols whose connections are counted. None means all together."""
        doors: list[str | None] = [door for door, limit in self._door_limits.items() if limit]
        return [None, *doors] if self.limit else doors

    def _check(self, count: _Count, elsewhere: int) -> None:
        limit = self._limit_of(count)
        if 0 < limit <= self._count(*count) + self._accepted[count] + elsewhere:
            raise LimitExceeded(f"more than {limit} connections of one user")

    async def _exchange(self, requested: set[_Count]) -> dict[_Count, int]:
        """Write local changes. Return the connections of these users on other workers."""
        users, self._changed = self._changed | {count.user for count in requested}, set()
        doors = self._limited()
        if not doors:
            self._written = False
            return dict.fromkeys(requested, 0)
        if not self._written:
            # At start, after a reload has set a limit, and after an outage.
            users |= {user for user in self._users() if user}
        changed = [_Count(user, door) for user in sorted(users) for door in doors]
        instances: list[str] = []
        if requested:
            members = await connect.command(self._client, "SMEMBERS", self._keys.nodes)
            names = sorted(member.decode() for member in members)
            instances = [name for name in names if name != self._instance and not self._dead(name)]
        counts = list(requested)
        async with connect.transaction(self._client) as transaction:
            for each in changed:
                number, field = self._count(*each) + self._reserved[each], each.field
                words = ("HSET", self._own, field, number) if number else ("HDEL", self._own, field)
                transaction.execute_command(*words)
            transaction.execute_command("EXPIRE", self._own, EXPIRY_S)
            for instance in instances:
                for each in counts:
                    transaction.execute_command("HGET", self._keys.users(instance), each.field)
            replies: list[Any] = await transaction.execute()
        exists, *found = replies[len(changed) :]
        # If there are users, the key is missing only after a flush or because it has expired.
        self._written = bool(exists) or not any(self._users())
        others = dict.fromkeys(counts, 0)
        for index, raw in enumerate(found):
            others[counts[index % len(counts)]] += int(raw or 0)
        return others


def _decrement(counter: Counter[_Count], count: _Count) -> None:
    counter[count] -= 1
    if not counter[count]:
        del counter[count]
