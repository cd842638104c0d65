"""Store the list of servers on each of them, so that workers with different lists are noticed.

The server of a channel depends on the list. Workers and producers with different lists would write
and read different streams of one channel, and their clients would receive nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from relay.core.errors import ConfigError, RedisUnavailable, StartError
from relay.stream.connection.connect import (
    CommandRefused,
    command,
    discover,
    with_short_timeouts,
)
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.format.keys import Keys
from relay.stream.shards.hash_map import HashMap, ServerShard

if TYPE_CHECKING:
    from relay.stream.connection.connect import RedisEndpoint
    from relay.stream.shards.clients import ShardClients
    from relay.stream.shards.shard import ShardMap

_Step = Callable[[PipelineConnection, ServerShard], Awaitable[object]]

# Keys that are examined for streams on a wrong server, in steps of this many.
_SCAN, _SCANS = 1000, 10


async def check_list(clients: ShardClients, keys: Keys) -> None:
    """Store the list on all servers that have none.

    A server that cannot be reached now is checked before the first connection for its streams.

    Raises:
        StartError: A server is used with another list, by workers without one, or has two names.
    """
    if isinstance(clients.shards, HashMap):
        await _Check(clients.shards, keys).run()


async def compare_list(clients: ShardClients, keys: Keys) -> None:
    """Compare the list with those that are stored on its servers, and store nothing.

    Servers that cannot be reached are ignored.

    Raises:
        StartError: The site uses another list, or a server has two names.
    """
    if isinstance(clients.shards, HashMap):
        await _Check(clients.shards, keys).compare()


def check_same_servers(clients: ShardClients, others: ShardClients, setting: str) -> None:
    """Raise ConfigError if the URL in another setting would find keys on other servers.

    A single server may have several names.
    """
    own, other = (_list_of(each.shards) for each in (clients, others))
    if own != other:
        raise ConfigError(
            f"{setting}: must name the same servers as [redis] url, for keys to be found:"
            f" {own or 'one server'} instead of {other or 'one server'}"
        )


def _list_of(shards: ShardMap) -> str:
    if not isinstance(shards, HashMap):
        return "a Redis Cluster"
    return shards.names() if len(shards.shards) > 1 else ""


async def store_list(
    clients: ShardClients, keys: Keys, removed: Sequence[ShardClients] = ()
) -> None:
    """Store the list on all servers, in place of any other. No worker may be running.

    Servers of `removed` that are not in the list keep none, so that they can be used elsewhere.

    Raises:
        RelayError: A server cannot be reached or refuses the command.
    """
    if isinstance(clients.shards, HashMap):
        for each in removed:
            for _, client in await each.each():
                await command(client, "DEL", keys.servers)
        # Last, because a removed name may be another name of one of these servers.
        for _, client in await clients.each():
            await command(client, "SET", keys.servers, clients.shards.names())


def refuse_same(databases: Mapping[str, tuple[str, int]]) -> None:
    """Raise StartError if two names are of the same database: process (run_id) and number."""
    names: dict[tuple[str, int], str] = {}
    for name, database in databases.items():
        if (first := names.setdefault(database, name)) != name:
            raise StartError(
                f"[redis] url: {first} and {name} are the same server; name each server once"
            )


class _Check:
    """Compares the list with what its servers have stored, and stores it there."""

    def __init__(self, shards: HashMap, keys: Keys) -> None:
        self._shards = shards
        self._keys = keys
        self._own = shards.names()
        self._databases: dict[str, tuple[str, int]] = {}

    async def run(self) -> None:
        """Check all servers. StartError as of `check_list`."""
        # A single server has no list: its address may be another one for each host.
        if len(self._shards.shards) == 1:
            await self.compare()
            return
        # Compare all of them before the list is stored on any.
        for step in (self._compare, self._check_server):
            await self._each(step, self._check_server)

    async def compare(self) -> None:
        """Compare the list. StartError as of `compare_list`."""
        await self._each(self._compare, self._compare)

    async def _each(self, step: _Step, later: _Step) -> None:
        """Carry out one step on each server, or another one once the server can be reached."""
        for shard in sorted(self._shards.shards, key=lambda shard: shard.name):
            if shard.before_use is None:
                try:
                    endpoint = await discover(shard.settings)
                    await self._examine(step, shard, endpoint)
                except RedisUnavailable:
                    shard.before_use = partial(self._examine, later, shard)

    async def _examine(self, step: _Step, shard: ServerShard, endpoint: RedisEndpoint) -> None:
        """Carry out one step on one server. Errors as of `_compare`.

        Others are waiting for it: appends, and the end of their tasks.
        """
        connection = await PipelineConnection.open(
            endpoint, settings=with_short_timeouts(shard.settings), name="relay-list"
        )
        try:
            if connection.run_id:
                self._databases[shard.name] = connection.run_id.decode(), endpoint.db
                refuse_same(self._databases)
            await step(connection, shard)
        finally:
            connection.close()

    async def _check_server(self, connection: PipelineConnection, shard: ServerShard) -> None:
        """Compare the list on one server, or store it there. Errors as of `_compare`."""
        is_stored = await self._compare(connection, shard)
        await self._refuse_single(connection)
        if is_stored:
            return
        await self._refuse_misplaced(connection, shard)
        with contextlib.suppress(CommandRefused):
            await connection.call("SET", self._keys.servers, self._own, "NX")
        # Another worker may have stored its list just now.
        await self._compare(connection, shard)

    async def _compare(self, connection: PipelineConnection, _: ServerShard) -> bool:
        """Compare the list on one server. Return whether there is one.

        Raises:
            StartError: It is another one.
            RedisUnavailable: The server cannot be reached.
        """
        try:
            found = cast("bytes | None", await connection.call("GET", self._keys.servers))
        except CommandRefused:
            return False
        if found is None:
            return False
        stored = found.decode(errors="replace")
        is_single = len(self._shards.shards) == 1 and ", " not in stored
        if stored != self._own and not is_single:
            raise StartError(
                "[redis] url: this site uses another list of servers."
                f" Here: {self._own}. Stored in Redis: {stored}."
                " Use the same list everywhere, or stop all workers and run relay reshard"
            )
        return True

    async def _refuse_single(self, connection: PipelineConnection) -> None:
        alone = Keys(self._keys.prefix.decode())
        try:
            found = cast("Iterable[bytes]", await connection.call("SMEMBERS", alone.nodes))
            names = [name.decode(errors="replace") for name in found]
            living = [name for name in names if await connection.call("EXISTS", alone.node(name))]
        except CommandRefused:
            return
        if living:
            raise StartError(
                f"[redis] url: worker {living[0]} uses one of the servers alone. Here: {self._own}."
                " Stop it, and run relay reshard to distribute its streams"
            )

    async def _refuse_misplaced(self, connection: PipelineConnection, shard: ServerShard) -> None:
        """Raise StartError if streams were written with another list, which is stored nowhere.

        Examines a part of the keys: with another list, many streams are on a wrong server.
        """
        cursor: object = 0
        for _ in range(_SCANS):
            words = (b"MATCH", self._keys.stream_pattern, b"COUNT", _SCAN)
            try:
                reply = await connection.call("SCAN", cast("int | bytes", cursor), *words)
            except CommandRefused:
                return
            cursor, found = cast("tuple[bytes, list[bytes]]", reply)
            for key in found:
                if self._shards.shard_of(key) is not shard:
                    raise StartError(
                        f"[redis] url: {key.decode(errors='replace')} on {shard.name} belongs to"
                        f" another server of the list. Here: {self._own}. Run relay reshard to"
                        " distribute the streams, or use the list with which it was written"
                    )
            if cursor == b"0":
                return
