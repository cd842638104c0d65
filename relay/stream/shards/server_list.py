"""Store the list of servers on each of them, so that workers with different lists are noticed.

The server of a channel depends on the list. Workers and producers with different lists would write
and read different streams of one channel, and their clients would receive nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, cast

from relay.core.errors import RedisUnavailable, StartError
from relay.stream.connection.connect import (
    CommandRefused,
    command,
    discover,
    with_short_timeouts,
)
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.format.keys import Keys
from relay.stream.shards.hash_map import HashMap

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.connection.connect import RedisEndpoint
    from relay.stream.shards.clients import ShardClients

_Step = Callable[[PipelineConnection, Keys, str], Awaitable[None]]


async def check_list(clients: ShardClients, keys: Keys) -> None:
    """Store the list on all servers that have none.

    A server that cannot be reached now is checked before the first connection for its streams.

    Raises:
        StartError: A server is used with another list, or by workers without one.
    """
    shards = clients.shards
    if not isinstance(shards, HashMap):
        return
    own = shards.names()
    # A single server has no list: its address may be another one for each host.
    steps = (_compare,) if len(shards.shards) == 1 else (_compare, _check_server)
    # Compare all of them before the list is stored on any.
    for step in steps:
        for shard in sorted(shards.shards, key=lambda shard: shard.name):
            if shard.before_use is None:
                try:
                    endpoint = await discover(shard.settings)
                    await _examine(step, shard.settings, keys, own, endpoint)
                except RedisUnavailable:
                    shard.before_use = partial(_examine, steps[-1], shard.settings, keys, own)


async def store_list(clients: ShardClients, keys: Keys) -> None:
    """Store the list on all servers, in place of any other. No worker may be running.

    Raises:
        RelayError: A server cannot be reached or refuses the command.
    """
    if isinstance(clients.shards, HashMap):
        for _, client in await clients.each():
            await command(client, "SET", keys.servers, clients.shards.names())


async def _examine(
    step: _Step, settings: RedisSettings, keys: Keys, own: str, endpoint: RedisEndpoint
) -> None:
    """Carry out one step on one server. Errors as of `_compare`.

    Others are waiting for it: appends, and the end of their tasks.
    """
    connection = await PipelineConnection.open(
        endpoint, settings=with_short_timeouts(settings), name="relay-list"
    )
    try:
        await step(connection, keys, own)
    finally:
        connection.close()


async def _check_server(connection: PipelineConnection, keys: Keys, own: str) -> None:
    """Compare the list on one server, or store it there. Errors as of `_compare`."""
    await _compare(connection, keys, own)
    await _refuse_single(connection, keys, own)
    with contextlib.suppress(CommandRefused):
        await connection.call("SET", keys.servers, own, "NX")
    # Another worker may have stored its list just now.
    await _compare(connection, keys, own)


async def _compare(connection: PipelineConnection, keys: Keys, own: str) -> None:
    """Compare the list on one server, if there is one.

    Raises:
        StartError: It is another one.
        RedisUnavailable: The server cannot be reached.
    """
    try:
        found = cast("bytes | None", await connection.call("GET", keys.servers))
    except CommandRefused:
        return
    stored = own if found is None else found.decode(errors="replace")
    if stored != own:
        raise StartError(
            "[redis] url: this site uses another list of servers."
            f" Here: {own}. Stored in Redis: {stored}."
            " Use the same list everywhere, or stop all workers and run relay reshard"
        )


async def _refuse_single(connection: PipelineConnection, keys: Keys, own: str) -> None:
    alone = Keys(keys.prefix.decode())
    try:
        found = cast("Iterable[bytes]", await connection.call("SMEMBERS", alone.nodes))
        names = [name.decode(errors="replace") for name in found]
        living = [name for name in names if await connection.call("EXISTS", alone.node(name))]
    except CommandRefused:
        return
    if living:
        raise StartError(
            f"[redis] url: worker {living[0]} uses one of the servers alone. Here: {own}."
            " Stop it, and run relay reshard to distribute its streams"
        )
