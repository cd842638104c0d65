"""The job that removes the groups and keys of dead workers from Redis.

A worker that dies leaves its consumer groups in every stream that its clients followed. They use
memory and report a growing lag to operators.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from relay.stream.cluster.workers import HEARTBEAT_S, DeadWorkerDetector
from relay.stream.connection import connect
from relay.stream.connection.connect import RedisClient
from relay.stream.format.keys import Keys
from relay.stream.read import groups
from relay.stream.shards.clients import ShardClients
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.upkeep.unused import remove_unused

# Commands of one pipeline, for each of which redis-py needs 20 us, and its fewest keys.
_COMMANDS, _FEWEST_KEYS = 200, 20


class DeadWorkersJob:
    """Removes the groups of dead workers. `clear` is called to remove their other state."""

    def __init__(
        self,
        *,
        clients: ShardClients,
        keys: Keys,
        dead: Callable[[str], bool] = lambda _: False,
        patience_s: float = 2 * HEARTBEAT_S,
        clear: Callable[[str, ServerErrors], Awaitable[None]] | None = None,
    ) -> None:
        self._clients = clients
        self._keys = keys
        self._clear = clear
        self._detector = DeadWorkerDetector(
            client=clients.home, keys=keys, dead=dead, patience_s=patience_s
        )

    async def remove(self) -> list[str]:
        """Remove the state of dead workers. Return their instances.

        Raises:
            RelayError: A server cannot be reached or refuses commands. The state on all others is
                removed, and the next run finds the same workers again.
        """
        dead = await self._detector.check()
        if not dead:
            return []
        errors = ServerErrors()
        if self._clear is not None:
            for instance in dead:
                await self._clear(instance, errors)
        names = [groups.group_of(instance) for instance in dead]
        batch = max(_FEWEST_KEYS, _COMMANDS // len(names))
        for shard, client in await self._clients.each():
            with errors.collect(shard):
                async for found in connect.scan(client, self._keys.stream_pattern, batch):
                    streams = [key for key in found if self._keys.channel_of_stream(key)]
                    if streams:
                        await _destroy(client, streams, names)
                        await remove_unused(client, streams)
        errors.finish()
        await connect.command(self._clients.home, "SREM", self._keys.nodes, *dead)
        return dead


async def _destroy(client: RedisClient, streams: Sequence[bytes], names: Sequence[bytes]) -> None:
    async with connect.pipelined(client) as pipeline:
        for key in streams:
            for name in names:
                pipeline.execute_command("XGROUP", "DESTROY", key, name)
        # Errors for keys that were deleted or are not streams can be ignored.
        await pipeline.execute(raise_on_error=False)
