"""Members of groups, from Seafile's ccnet database or a Redis set.

If the members are unavailable, the group's events are delivered to no client. Seafile's server
delivers them to every client then.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import aiomysql
from pymysql.err import MySQLError

from relay.core.coalescing import RequestCoalescer
from relay.core.errors import RelayError

if TYPE_CHECKING:
    from relay.protocols.seafile.settings import SeafileSettings

_log = logging.getLogger(__name__)

# Seafile's server waits at most one second for the response to an event.
_LIMIT_S = 0.6
# Cache a failure briefly, so that an unreachable database is not queried for each event.
_FAILURE_S = 1.0
_KEPT = 10_000
# From Seafile's event.go. `GroupUser` is a table of the ccnet database.
_QUERY = "SELECT user_name FROM GroupUser WHERE group_id = %s"

Source = Callable[[int], Awaitable[frozenset[str]]]


class Failed(Exception):
    """The members are unavailable. The text is for the log."""


class GroupMembers:
    """Cached members of groups. Concurrent lookups of one group share a query."""

    def __init__(
        self, source: Source, cache_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._source = source
        self._cache_s = cache_s
        self._now = now
        self._known: OrderedDict[int, tuple[float, frozenset[str] | None]] = OrderedDict()
        self._lookups: RequestCoalescer[int, frozenset[str] | None] = RequestCoalescer()

    async def members(self, group: int) -> frozenset[str] | None:
        """Return user names, or None if the member list is unavailable. Takes at most 0.6 s."""
        known = self._known.get(group)
        if known is not None and self._now() < known[0]:
            return known[1]
        return await self._lookups.run(group, self._look_up)

    async def _look_up(self, group: int) -> frozenset[str] | None:
        members: frozenset[str] | None = None
        try:
            async with asyncio.timeout(_LIMIT_S):
                members = await self._source(group)
        except (Failed, TimeoutError) as exc:
            reason = str(exc) or f"no answer within {_LIMIT_S} s"
            _log.warning(
                "Could not read the members of Seafile group %d: %s; its events are not delivered",
                group,
                reason,
            )
        hold = _FAILURE_S if members is None else self._cache_s
        self._known[group] = (self._now() + hold, members)
        self._known.move_to_end(group)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return members


def source_of(
    settings: SeafileSettings, redis_members: Callable[[str], Awaitable[frozenset[str]]]
) -> Source:
    """Return the source that the settings select."""

    async def from_redis(group: int) -> frozenset[str]:
        try:
            members = await redis_members(f"seafile:{group}")
        except RelayError as exc:
            raise Failed(str(exc)) from exc
        if not members:
            # Redis has no empty sets, so this group was never stored.
            raise Failed(
                f"the Redis set <prefix>group:seafile:{group} is missing; add its members with"
                " SADD, or set [protocol:seafile] groups = database"
            )
        return members

    async def from_database(group: int) -> frozenset[str]:
        return await _query(settings, group)

    return from_database if settings.groups == "database" else from_redis


async def _query(settings: SeafileSettings, group: int) -> frozenset[str]:
    # Open a connection for each query: the cache makes queries rare, and a new connection is never
    # stale.
    try:
        connection = await aiomysql.connect(
            host=settings.db_host,
            port=settings.db_port,
            unix_socket=settings.db_socket or None,
            user=settings.db_user,
            password=settings.db_password.get_secret_value(),
            db=settings.db_name,
            charset="utf8mb4",
            ssl=_tls() if settings.db_tls else None,
            autocommit=True,
        )
        try:
            async with connection.cursor() as cursor:
                await cursor.execute(_QUERY, (group,))
                rows = await cursor.fetchall()
        finally:
            connection.close()
    except (MySQLError, OSError, EOFError, RuntimeError) as exc:
        raise Failed(f"{type(exc).__name__}: {exc}") from exc
    return frozenset(str(row[0]) for row in rows)


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
