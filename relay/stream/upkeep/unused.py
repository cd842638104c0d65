"""Remove streams that exist only because clients followed them.

Relay creates a stream when the first client with a right to read it subscribes, because the marker
group is needed to detect a later DEL. If nothing was ever appended and no worker follows the stream
any more, it is removed: after a short time by the worker whose last client has left, or else by a
job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from relay.core.errors import RelayError
from relay.stream.connection import connect
from relay.stream.connection.scripts import Script
from relay.stream.read.groups import OWN_GROUPS
from relay.stream.shards.server_errors import ServerErrors

if TYPE_CHECKING:
    from relay.core.model import Channel
    from relay.stream.connection.connect import RedisClient
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients

# A client that reconnects within this time finds the same stream, so that it receives no reset
# notice. A worker keeps at most MAX_KEPT such streams, so that one user cannot fill Redis by
# following many channels.
KEEP_S = 30.0
MAX_KEPT = 500
_BATCH = 200

# KEYS: the stream. ARGV: a command, and the names of groups to ignore. If nothing was ever appended
# to the stream and it has no other groups, run the command on it and return the reply, else 0.
REMOVE_UNUSED = Script("""\
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('XLEN', KEYS[1]) > 0 then return 0 end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'entries-added' and info[i + 1] > 0 then return 0 end
  if info[i] == 'last-generated-id' and info[i + 1] ~= '0-0' then return 0 end
end
local markers = {}
for i = 2, #ARGV do markers[ARGV[i]] = true end
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  for i = 1, #group, 2 do
    if group[i] == 'name' and not markers[group[i + 1]] then return 0 end
  end
end
return redis.call(ARGV[1], KEYS[1])
""")


_log = logging.getLogger(__name__)


class UnusedStreams:
    """The streams whose last local client has left before anything was appended."""

    def __init__(self, clients: ShardClients, keys: Keys, *, keep_s: float = KEEP_S) -> None:
        self._clients = clients
        self._keys = keys
        self._keep_s = keep_s
        # Channels with the time of their removal, in this order.
        self._kept: dict[Channel, float] = {}
        self._due: deque[Channel] = deque()
        self._work = asyncio.Event()

    def released(self, channel: Channel) -> None:
        """Schedule the removal of the channel's stream. It is kept if a worker follows it then."""
        self._kept.pop(channel, None)
        self._kept[channel] = asyncio.get_running_loop().time() + self._keep_s
        if len(self._kept) > MAX_KEPT:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self._due.append(oldest)
        if self._due or len(self._kept) == 1:
            self._work.set()

    async def run(self) -> None:
        """Remove streams at their scheduled times. Runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            wait_s = next(iter(self._kept.values())) - loop.time() if self._kept else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._work.wait()
            self._work.clear()
            now = loop.time()
            while self._kept and next(iter(self._kept.values())) <= now:
                channel = next(iter(self._kept))
                del self._kept[channel]
                self._due.append(channel)
            try:
                await self._remove_due()
            except RelayError as exc:
                # The job removes them later.
                _log.debug("Could not remove unused streams: %s", exc)
                self._due.clear()

    async def _remove_due(self) -> None:
        while self._due:
            batch = [self._due.popleft() for _ in range(min(_BATCH, len(self._due)))]
            streams = [self._keys.stream(channel) for channel in batch]
            # The job removes those of servers that have an error.
            errors = ServerErrors()
            for shard, client, own in await self._clients.split(streams):
                with errors.collect(shard):
                    await remove_unused(client, own)
            if errors:
                _log.debug("Could not remove unused streams: %s", "; ".join(errors.lines()))


class UnusedStreamsJob:
    """Removes unused streams that were found in two consecutive runs, on all workers' behalf."""

    def __init__(self, clients: ShardClients, keys: Keys) -> None:
        self._clients = clients
        self._keys = keys
        self._seen: set[bytes] = set()

    async def run(self) -> int:
        """Run once. Return the number of removed streams.

        Raises:
            RelayError: A server cannot be reached or refuses commands. The unused streams of all
                others are removed.
        """
        seen: set[bytes] = set()
        removed = 0
        errors = ServerErrors()
        for shard, client in await self._clients.each():
            with errors.collect(shard):
                async for found in connect.scan(client, self._keys.stream_pattern, _BATCH):
                    empty = await _empty(
                        client, [key for key in found if self._keys.channel_of_stream(key)]
                    )
                    again = [key for key in empty if key in self._seen]
                    removed += await remove_unused(client, again)
                    seen |= await _unused(client, [key for key in empty if key not in self._seen])
        self._seen = seen
        errors.finish()
        return removed


async def _empty(client: RedisClient, streams: Sequence[bytes]) -> list[bytes]:
    if not streams:
        return []
    async with connect.pipelined(client) as pipeline:
        for key in streams:
            pipeline.execute_command("XLEN", key)
        lengths: list[Any] = await pipeline.execute(raise_on_error=False)
    return [key for key, length in zip(streams, lengths, strict=True) if length == 0]


async def remove_unused(client: RedisClient, streams: Sequence[bytes]) -> int:
    """Delete unused streams: no entry was ever appended, and the marker is the only group.

    The check and the deletion are atomic, so that no entry is lost.
    """
    return sum(await _each(client, streams, "DEL"))


async def _unused(client: RedisClient, streams: Sequence[bytes]) -> set[bytes]:
    found = await _each(client, streams, "EXISTS")
    return {key for key, unused in zip(streams, found, strict=True) if unused}


async def _each(client: RedisClient, streams: Iterable[bytes], command: str) -> list[int]:
    """Run `command` on each of the streams if it is unused. Return 1 or 0 for each."""
    keys = list(streams)
    if not keys:
        return []
    async with connect.pipelined(client) as pipeline:
        pipeline.execute_command("SCRIPT", "LOAD", REMOVE_UNUSED.text)
        for key in keys:
            pipeline.execute_command("EVALSHA", REMOVE_UNUSED.sha, 1, key, command, *OWN_GROUPS)
        loaded, *replies = await pipeline.execute(raise_on_error=False)
        if isinstance(loaded, Exception):
            raise loaded
    # The reply is an error if the key is not a stream. Then it is not removed.
    return [reply if isinstance(reply, int) else 0 for reply in replies]
