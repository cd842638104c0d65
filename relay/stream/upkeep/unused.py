"""Removal of streams that exist only because clients followed them.

The relay creates a stream when the first client with a right to read it subscribes, since its
marker group lets the relay detect a later DEL. If nothing was ever appended and no worker follows
it any more, the stream is removed: by the worker whose last client left, after a short time in
which that client may come back, and by a job for what other workers left behind.
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

if TYPE_CHECKING:
    from relay.core.model import Channel
    from relay.stream.connection.connect import RedisClient
    from relay.stream.format.keys import Keys

# A client that reconnects within this time finds the same stream, so that it is not told that its
# events may be gone. Its worker keeps at most MAX_KEPT such streams: one user cannot fill Redis by
# following many names.
KEEP_S = 30.0
MAX_KEPT = 500
_BATCH = 200

# KEYS stream; ARGV a command, then the names of groups that do not count. Runs the command on the
# stream if nothing was ever appended to it and it has no other groups, and returns its reply; else
# returns 0.
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

    def __init__(self, client: RedisClient, keys: Keys, *, keep_s: float = KEEP_S) -> None:
        self._client = client
        self._keys = keys
        self._keep_s = keep_s
        # In the order of their times.
        self._kept: dict[Channel, float] = {}
        self._due: deque[Channel] = deque()
        self._work = asyncio.Event()

    def released(self, channel: Channel) -> None:
        """Remove the channel's stream soon. It stays if a worker follows it by then."""
        self._kept.pop(channel, None)
        self._kept[channel] = asyncio.get_running_loop().time() + self._keep_s
        if len(self._kept) > MAX_KEPT:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self._due.append(oldest)
        if self._due or len(self._kept) == 1:
            self._work.set()

    async def run(self) -> None:
        """Remove streams as their time comes. Runs until cancelled."""
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
            await remove_unused(self._client, streams)


class UnusedStreamsJob:
    """Removes unused streams of the whole site that two runs in a row have found."""

    def __init__(self, client: RedisClient, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._seen: set[bytes] = set()

    async def run(self) -> int:
        """Look once. Return how many streams were removed."""
        seen: set[bytes] = set()
        removed = 0
        async for found in connect.scan(self._client, self._keys.stream_pattern, _BATCH):
            empty = await self._empty([key for key in found if self._keys.channel_of_stream(key)])
            removed += await remove_unused(
                self._client, [key for key in empty if key in self._seen]
            )
            seen |= await _unused(self._client, [key for key in empty if key not in self._seen])
        self._seen = seen
        return removed

    async def _empty(self, streams: Sequence[bytes]) -> list[bytes]:
        if not streams:
            return []
        async with self._client.pipeline(transaction=False) as pipeline:
            for key in streams:
                pipeline.execute_command("XLEN", key)
            with connect.translated():
                lengths: list[Any] = await pipeline.execute(raise_on_error=False)
        return [key for key, length in zip(streams, lengths, strict=True) if length == 0]


async def remove_unused(client: RedisClient, streams: Sequence[bytes]) -> int:
    """Delete those of the streams that are unused: no entry was ever appended, and the marker is
    their only group. An entry that is appended meanwhile is never lost."""
    return sum(await _each(client, streams, "DEL"))


async def _unused(client: RedisClient, streams: Sequence[bytes]) -> set[bytes]:
    found = await _each(client, streams, "EXISTS")
    return {key for key, unused in zip(streams, found, strict=True) if unused}


async def _each(client: RedisClient, streams: Iterable[bytes], command: str) -> list[int]:
    """Run `command` on each of the streams if it is unused. Return 1 or 0 for each."""
    keys = list(streams)
    if not keys:
        return []
    async with client.pipeline(transaction=False) as pipeline:
        pipeline.execute_command("SCRIPT", "LOAD", REMOVE_UNUSED.text)
        for key in keys:
            pipeline.execute_command("EVALSHA", REMOVE_UNUSED.sha, 1, key, command, *OWN_GROUPS)
        with connect.translated():
            loaded, *replies = await pipeline.execute(raise_on_error=False)
            if isinstance(loaded, Exception):
                raise loaded
    # A key that is no stream answers with an error, and is not the relay's to remove.
    return [reply if isinstance(reply, int) else 0 for reply in replies]
