"""How many connections a user has on all workers of all hosts, where their number is limited.

Each worker keeps a hash of its own users and counts, which expires soon after the worker has died.
A new connection is counted first and the others' counts are read in the same transaction: of two
that come at once at two workers, with one seat left, exactly one gets it. Of more than that, one
that is counted and then refused may cost another its place for that moment: never too many get in.
Everything that waits is served by one transaction at a time. Without a limit nothing is written;
an idle client costs nothing, a worker one command every RENEW_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any

from relay.errors import LimitExceeded, RedisUnavailable, Unavailable
from relay.stream import connect

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from relay.stream.keys import Keys

RENEW_S = 2.0
# As long as the clients of a host that died may be refused, since they seem to be there still.
EXPIRY_S = 6

_log = logging.getLogger(__name__)


class Seats:
    """This worker's part of the count; `limit` may be changed at any time, 0 is none."""

    def __init__(
        self,
        *,
        client: Redis,
        keys: Keys,
        instance: str,
        limit: int,
        count: Callable[[str], int],
        users: Callable[[], Iterable[str]],
        dead: Callable[[str], bool],
    ) -> None:
        """`count` and `users` tell of the clients here; `dead` says of another instance that it is
        known to have died, before its counts expire."""
        self.limit = limit
        self._client = client
        self._keys = keys
        self._instance = instance
        self._own = keys.users(instance)
        self._count = count
        self._users = users
        self._dead = dead
        # Seats asked for, and those of them that were given; a session then has them.
        self._reserved: Counter[str] = Counter()
        self._given: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._changed: set[str] = set()
        self._work = asyncio.Event()
        self._written = False

    @contextlib.asynccontextmanager
    async def seat(self, user: str) -> AsyncIterator[None]:
        """Open the session inside. LimitExceeded where the user has too many, Unavailable where
        Redis cannot be asked."""
        if not user or not self.limit:
            yield
            return
        # Those that are here suffice to refuse: a client that tries and tries costs Redis nothing.
        self._check(user, 0)
        self._reserved[user] += 1
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((user, answer))
        self._work.set()
        try:
            await answer
            try:
                yield
            finally:
                _take_one(self._given, user)
        finally:
            _take_one(self._reserved, user)
            self.changed(user)

    def changed(self, user: str) -> None:
        """A session of the user has begun or ended."""
        if user and self.limit:
            self._changed.add(user)
            self._work.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await self._work.wait()
            self._work.clear()
            waiting, self._waiting = self._waiting, []
            try:
                others = await self._exchange({user for user, _ in waiting})
            except RedisUnavailable as exc:
                _log.debug("connections are not counted: %s", exc)
                for _, answer in waiting:
                    if not answer.done():
                        answer.set_exception(Unavailable("connections cannot be counted now"))
                self._written = False
                await asyncio.sleep(0.2)
                continue
            for user, answer in waiting:
                if answer.done():
                    continue
                try:
                    self._check(user, others[user])
                except LimitExceeded as exc:
                    answer.set_exception(exc)
                else:
                    self._given[user] += 1
                    answer.set_result(None)

    async def leave(self) -> None:
        """At an orderly stop, after the last client: its users may go elsewhere at once."""
        if self._written:
            await connect.command(self._client, "DEL", self._own)

    def _check(self, user: str, elsewhere: int) -> None:
        if 0 < self.limit <= self._count(user) + self._given[user] + elsewhere:
            raise LimitExceeded(f"more than {self.limit} connections of one user")

    async def _exchange(self, asked: set[str]) -> dict[str, int]:
        """Write what changed here; how many connections those users have elsewhere."""
        changed, self._changed = self._changed | asked, set()
        if not self.limit:
            self._written = False
            return dict.fromkeys(asked, 0)
        if not self._written:
            # At first, after a reload that set a limit, and after an outage.
            changed |= {user for user in self._users() if user}
        instances: list[str] = []
        if asked:
            members = await connect.command(self._client, "SMEMBERS", self._keys.nodes)
            names = sorted(member.decode() for member in members)
            instances = [name for name in names if name != self._instance and not self._dead(name)]
        wanted = sorted(asked)
        async with self._client.pipeline(transaction=True) as transaction:
            for user in sorted(changed):
                count = self._count(user) + self._reserved[user]
                words = ("HSET", self._own, user, count) if count else ("HDEL", self._own, user)
                transaction.execute_command(*words)
            transaction.execute_command("EXPIRE", self._own, EXPIRY_S)
            for instance in instances:
                for user in wanted:
                    transaction.execute_command("HGET", self._keys.users(instance), user)
            with connect.translated():
                replies: list[Any] = await transaction.execute()
        there, *found = replies[len(changed) :]
        # No key is right where nobody is here; otherwise it was flushed, or expired in an outage.
        self._written = bool(there) or not any(self._users())
        others = dict.fromkeys(wanted, 0)
        for index, raw in enumerate(found):
            others[wanted[index % len(wanted)]] += int(raw or 0)
        return others


def _take_one(counter: Counter[str], user: str) -> None:
    counter[user] -= 1
    if not counter[user]:
        del counter[user]
