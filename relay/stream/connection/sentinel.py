"""Redis Sentinel: ask for the primary, and close connections to a primary that was replaced.

The Sentinels of a site agree about a failover within seconds, not at once, and one of them may be
on the host that has failed. All are therefore asked at the same time, and the answer about the
latest failover counts (the highest `config-epoch`).

A frozen primary keeps its connections open. `report_primary` closes them as soon as a Sentinel has
announced another primary, see `relay.stream.connection.failovers`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any, Protocol, cast
from weakref import WeakSet

from redis.asyncio import Redis, Sentinel
from redis.asyncio.sentinel import MasterNotFoundError, SentinelConnectionPool
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from typing_extensions import override

from relay.stream.connection.cancellation import end_all

# After the first usable answer, wait this long for the answers of other Sentinels.
_OTHERS_S = 0.1


class ConcurrentSentinels(Sentinel):
    """redis-py's client of the Sentinels of one site."""

    @override
    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Return host and port of the primary.

        Raises:
            MasterNotFoundError: No Sentinel knows a usable primary. The text contains the causes.
        """
        found: list[tuple[int, str, int]] = []
        causes: list[str] = []
        create = asyncio.get_running_loop().create_task
        names = {create(_masters(each)): _name(each) for each in self.sentinels}
        asking = set(names)
        limit: float | None = None
        try:
            while asking:
                done, asking = await asyncio.wait(
                    asking, timeout=limit, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                for each in done:
                    try:
                        known = await each
                    except (RedisError, OSError) as exc:
                        causes.append(f"{names[each]} {_cause(exc)}")
                        continue
                    state = known.get(service_name)
                    if state and self.check_master_state(state, service_name):
                        found.append((int(state["config-epoch"]), state["ip"], int(state["port"])))
                        limit = _OTHERS_S
                    elif state:
                        causes.append(f"{names[each]} reports it as down")
                    else:
                        other = f", only {', '.join(sorted(known))}" if known else ""
                        causes.append(f"{names[each]} does not know it{other}")
        finally:
            for each in asking:
                each.add_done_callback(_ignore)
            # The caller closes the clients next. A task that still runs would connect again.
            await end_all(asking)
        if not found:
            # Sorted, so that a repeated log line is the same.
            text = "; ".join(sorted(causes))
            raise MasterNotFoundError(f"Sentinel has no usable primary {service_name} ({text})")
        _, host, port = max(found)
        return host, port


def _name(sentinel: Redis) -> str:
    address = sentinel.connection_pool.connection_kwargs
    host = f"[{address['host']}]" if ":" in address["host"] else address["host"]
    return f"{host}:{address['port']}"


def _cause(exc: Exception) -> str:
    if isinstance(exc, (AuthenticationError, NoPermissionError)):
        return "rejects the login: check [redis] sentinel_user and sentinel_password"
    if isinstance(exc, ResponseError):
        return "is not a Sentinel, or rejects SENTINEL MASTERS"
    return f"cannot be reached ({type(exc).__name__})"


def _ignore(asked: asyncio.Task[dict[str, Any]]) -> None:
    if not asked.cancelled():
        asked.exception()


async def _masters(sentinel: Redis) -> dict[str, Any]:
    return cast("dict[str, Any]", await sentinel.sentinel_masters())


class PrimaryFollower(Protocol):
    """A connection to a primary that Sentinels watch."""

    def primary_is(self, host: str, port: int) -> None:
        """Close the connection if it is to another server."""


# Open connections and redis-py clients, by `Sentinels.site`.
_followers: defaultdict[str, WeakSet[PrimaryFollower]] = defaultdict(WeakSet)
_clients: defaultdict[str, WeakSet[Redis]] = defaultdict(WeakSet)


def follow(site: str, follower: PrimaryFollower) -> None:
    """Report the next primary to this connection, as long as it exists."""
    _followers[site].add(follower)


def follow_with_client(site: str, client: Redis) -> None:
    """Close this client's connections when there is another primary."""
    _clients[site].add(client)


async def report_primary(site: str, host: str, port: int) -> None:
    """Close all connections to other servers than this primary."""
    for follower in list(_followers[site]):
        follower.primary_is(host, port)
    for client in list(_clients[site]):
        pool = cast(SentinelConnectionPool, client.connection_pool)
        if pool.master_address not in (None, (host, port)):
            await pool.disconnect(inuse_connections=True)
