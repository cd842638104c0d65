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
from collections.abc import AsyncIterator, Callable, Iterable
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


class _Who(NamedTuple):
    """A user of one protocol, or of all protocols together if `door` is None."""

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
        # Requested connections, and those of them that were accepted but have no session yet.
        self._reserved: Counter[_Who] = Counter()
        self._given: Counter[_Who] = Counter()
        self._waiting: list[tuple[_Who, asyncio.Future[None]]] = []
        self._changed: set[str] = set()
        self._work = asyncio.Event()
        self._written = False

    @contextlib.asynccontextmanager
    async def seat(self, user: str, door: str | None = None, limit: int = 0) -> AsyncIterator[None]:
        """Reserve a connection; open the session within this context.

        Raises:
            LimitExceeded: The user has `limit` connections of the protocol `door`, or the maximum
                of all protocols if `door` is None.
            Unavailable: Redis is unreachable.
        """
        if door is not None:
            self._door_limits[door] = limit
        who = _Who(user, door)
        if not user or not self._limit_of(who):
            yield
            return
        # Local connections alone may reach the limit: repeated attempts then cause no commands.
        self._check(who, 0)
        self._reserved[who] += 1
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((who, answer))
        self._work.set()
        try:
            await answer
            try:
                yield
            finally:
                _take_one(self._given, who)
        finally:
            _take_one(self._reserved, who)
            self.changed(user)

    def changed(self, user: str) -> None:
        """Update the count after a session of the user has begun or ended."""
        if user and self._limited():
            self._changed.add(user)
            self._work.set()

    async def run(self) -> None:
        """Exchange counts with Redis until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await self._work.wait()
            self._work.clear()
            waiting, self._waiting = self._waiting, []
            try:
                others = await self._exchange({who for who, _ in waiting})
            except (connect.CommandRefused, connect.RefusedForNow) as exc:
                # Redis is reachable but refuses writes. A limit per worker is better than rejecting
                # all clients.
                self._refusals.refused(
                    COUNTS, exc.reply, "connection limits apply to each worker separately"
                )
                self._written = False
                self._admit(waiting, {who: 0 for who, _ in waiting})
                await asyncio.sleep(0.2)
                continue
            except RelayError as exc:
                _log.debug("Could not count connections: %s", exc)
                for _, answer in waiting:
                    if not answer.done():
                        answer.set_exception(
                            Unavailable("the connection limit cannot be checked now")
                        )
                self._written = False
                await asyncio.sleep(0.2)
                continue
            self._refusals.accepted(COUNTS)
            self._admit(waiting, others)

    def _admit(
        self, waiting: list[tuple[_Who, asyncio.Future[None]]], others: dict[_Who, int]
    ) -> None:
        for who, answer in waiting:
            if answer.done():
                continue
            try:
                self._check(who, others[who])
            except LimitExceeded as exc:
                answer.set_exception(exc)
            else:
                self._given[who] += 1
                answer.set_result(None)

    async def leave(self) -> None:
        """Delete the counts of this worker, after its last client was disconnected at shutdown."""
        if self._written:
            await connect.command(self._client, "DEL", self._own)

    def _limit_of(self, who: _Who) -> int:
        return self.limit if who.door is None else self._door_limits.get(who.door, 0)

    def _limited(self) -> list[str | None]:
        """Return the protocols whose connections are counted. None means all together."""
        doors: list[str | None] = [door for door, limit in self._door_limits.items() if limit]
        return [None, *doors] if self.limit else doors

    def _check(self, who: _Who, elsewhere: int) -> None:
        limit = self._limit_of(who)
        if 0 < limit <= self._count(*who) + self._given[who] + elsewhere:
            raise LimitExceeded(f"more than {limit} connections of one user")

    async def _exchange(self, asked: set[_Who]) -> dict[_Who, int]:
        """Write local changes. Return the connections of these users on other workers."""
        users, self._changed = self._changed | {who.user for who in asked}, set()
        doors = self._limited()
        if not doors:
            self._written = False
            return dict.fromkeys(asked, 0)
        if not self._written:
            # At start, after a reload has set a limit, and after an outage.
            users |= {user for user in self._users() if user}
        changed = [_Who(user, door) for user in sorted(users) for door in doors]
        instances: list[str] = []
        if asked:
            members = await connect.command(self._client, "SMEMBERS", self._keys.nodes)
            names = sorted(member.decode() for member in members)
            instances = [name for name in names if name != self._instance and not self._dead(name)]
        wanted = list(asked)
        async with self._client.pipeline(transaction=True) as transaction:
            for who in changed:
                count, field = self._count(*who) + self._reserved[who], who.field
                words = ("HSET", self._own, field, count) if count else ("HDEL", self._own, field)
                transaction.execute_command(*words)
            transaction.execute_command("EXPIRE", self._own, EXPIRY_S)
            for instance in instances:
                for who in wanted:
                    transaction.execute_command("HGET", self._keys.users(instance), who.field)
            with connect.translated():
                replies: list[Any] = await transaction.execute()
        there, *found = replies[len(changed) :]
        # The key may be missing without users. Otherwise it was flushed or expired in an outage.
        self._written = bool(there) or not any(self._users())
        others = dict.fromkeys(wanted, 0)
        for index, raw in enumerate(found):
            others[wanted[index % len(wanted)]] += int(raw or 0)
        return others


def _take_one(counter: Counter[_Who], who: _Who) -> None:
    counter[who] -= 1
    if not counter[who]:
        del counter[who]
