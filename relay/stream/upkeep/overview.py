"""List all streams with their length, age and the progress of each worker.

Keys are scanned in batches, so that Redis is not blocked. Changes during the scan may be missed.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from relay.core.model import Channel, EntryID, StreamState
from relay.stream.connection import connect
from relay.stream.connection.connect import RedisClient
from relay.stream.format.keys import Keys
from relay.stream.read import groups
from relay.stream.read.view import stream_state
from relay.stream.shards.clients import ShardClients
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.shards.shard import Shard
from relay.stream.upkeep.retention import describe_misnamed, streams_among

# XINFO STREAM returns the first and the last entry, and each may have a megabyte. A worker parses
# the replies about so many streams in one turn of its loop, which takes half a millisecond each.
_STREAMS = 20
_KEYS = 1000
# A page of channels begins with few keys per step, and reads more if none of them matches.
_KEYS_OF_PAGE, _KEYS_OF_STEP, _SCANS = 100, 500, 100
_SCAN_S = 1.0
_COUNTED = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Follower:
    """One consumer group. `worker` is None for groups of other programs.

    `behind` is the number of unread entries, a lower bound if `at_least` is True. `lag_ms` is the
    age of the first unread entry, 0 if there is none.
    """

    name: str
    worker: str | None
    last: EntryID
    behind: int
    at_least: bool
    lag_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOverview:
    """One stream. `age_ms` is the time since the last append, None if there was none.

    `server` is the address of the Redis server that has it.
    """

    channel: Channel
    server: str
    state: StreamState
    age_ms: int | None
    followers: tuple[Follower, ...]


async def walk(
    clients: ShardClients,
    keys: Keys,
    pattern: str,
    on_keys: Callable[[int], None],
    errors: ServerErrors,
) -> AsyncIterator[list[StreamOverview]]:
    """Yield the streams of the channels that match the glob `pattern`, each once, unordered.

    `on_keys` is called with the number of streams found so far. Servers that fail, or have failed
    before, are skipped, see `errors`.
    """
    seen: set[bytes] = set()
    for shard, client in await clients.each():
        if shard in errors:
            continue
        with errors.collect(shard):
            async for found in connect.scan(client, keys.streams_matching(pattern), _KEYS):
                # A key may come twice.
                fresh = [key for key in found if key not in seen and keys.channel_of_stream(key)]
                seen.update(fresh)
                for start in range(0, len(fresh), _STREAMS):
                    yield await _overview(client, keys, shard, fresh[start : start + _STREAMS])
                on_keys(len(seen))


async def page(
    clients: ShardClients, keys: Keys, pattern: str, cursor: str, count: int, errors: ServerErrors
) -> tuple[list[StreamOverview], str]:
    """Return some streams of the channels that match the glob `pattern`, and the next cursor.

    Both cursors are '' at the beginning and the end. The page has about `count` streams, or fewer
    if they are rare among the keys. Like SCAN, it may repeat a stream. A server that fails is
    skipped, see `errors`.
    """
    servers = await clients.each()
    position, number = divmod(int(cursor or 0), len(servers))
    shard, client = servers[number]
    streams: list[StreamOverview] = []
    with errors.collect(shard):
        position, batch = await _scanned(client, keys, pattern, position, count)
        for start in range(0, len(batch), _STREAMS):
            streams += await _overview(client, keys, shard, batch[start : start + _STREAMS])
    if not position or shard in errors:
        position, number = 0, (number + 1) % len(servers)
    following = position * len(servers) + number
    return streams, str(following) if following else ""


async def _scanned(
    client: RedisClient, keys: Keys, pattern: str, position: int, count: int
) -> tuple[int, list[bytes]]:
    """Return the next position of SCAN, and streams that it found. Stop after a moment."""
    found: dict[bytes, None] = {}
    step, end = _KEYS_OF_PAGE, time.monotonic() + _SCAN_S
    for _ in range(_SCANS):
        position, matching = await connect.scan_page(
            client, position, keys.streams_matching(pattern), step
        )
        fresh = [key for key in matching if keys.channel_of_stream(key)]
        found.update(dict.fromkeys(fresh))
        if not position or len(found) >= count or time.monotonic() >= end:
            break
        if not fresh:
            # The channels are rare.
            step = min(2 * step, _KEYS_OF_STEP)
    return position, list(found)


async def of_channels(
    clients: ShardClients, keys: Keys, channels: Sequence[Channel], errors: ServerErrors
) -> list[StreamOverview]:
    """Return the streams of these channels. A channel without a stream is omitted.

    Servers that fail are skipped, see `errors`.
    """
    found: list[StreamOverview] = []
    for shard, client, streams in await clients.split(map(keys.stream, channels)):
        with errors.collect(shard):
            found += await _overview(client, keys, shard, streams)
    return found


async def misnamed(
    clients: ShardClients, keys: Keys, pattern: str, errors: ServerErrors
) -> AsyncIterator[str]:
    """Yield a line about each stream whose key is not that of a channel, if the channel that was
    probably meant matches the glob `pattern`.

    Servers that fail, or have failed before, are skipped, see `errors`.
    """
    for shard, client in await clients.each():
        if shard in errors:
            continue
        with errors.collect(shard):
            async for found in connect.scan(client, keys.any_stream_pattern, _KEYS):
                strange = [
                    key
                    for key in found
                    if keys.channel_of_stream(key) is None
                    and fnmatchcase(keys.meant_by(key) or "", pattern)
                ]
                if strange:
                    for key in await streams_among(client, strange):
                        yield describe_misnamed(keys, key)


async def _overview(
    client: RedisClient, keys: Keys, shard: Shard, batch: Sequence[bytes]
) -> list[StreamOverview]:
    now_ms = await connect.time_ms(client)
    async with connect.pipelined(client) as pipeline:
        for key in batch:
            pipeline.execute_command("XINFO", "STREAM", key)
            pipeline.execute_command("XINFO", "GROUPS", key)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        streams = []
        for index, key in enumerate(batch):
            stream, found = replies[2 * index], replies[2 * index + 1]
            if any(str(each).startswith("WRONGTYPE") for each in (stream, found)):
                continue  # not a stream; the retention job counts such keys
            state = stream_state(stream, found)
            if state.exists and not isinstance(found, Exception):
                streams.append((key, state, found))
    followers = await _followers(client, streams, now_ms)
    overviews = []
    for key, state, _ in streams:
        channel = keys.channel_of_stream(key)
        if channel is not None:
            age_ms = max(0, now_ms - state.last.ms) if state.added else None
            overviews.append(
                StreamOverview(
                    channel=channel,
                    server=shard.name,
                    state=state,
                    age_ms=age_ms,
                    followers=tuple(followers.get(key, ())),
                )
            )
    return overviews


async def _followers(
    client: RedisClient, streams: Sequence[tuple[bytes, StreamState, Any]], now_ms: int
) -> dict[bytes, list[Follower]]:
    followers: dict[bytes, list[Follower]] = {}
    asked: list[tuple[bytes, str, str | None, EntryID, int | None]] = []
    async with connect.pipelined(client) as pipeline:
        for key, state, found in streams:
            for group in found:
                if group[b"name"] in groups.OWN_GROUPS:
                    continue
                name = group[b"name"].decode(errors="replace")
                worker = groups.instance_of(group[b"name"])
                last = EntryID.parse(group[b"last-delivered-id"])
                if last >= state.last:
                    follower = Follower(
                        name=name, worker=worker, last=last, behind=0, at_least=False, lag_ms=0
                    )
                    followers.setdefault(key, []).append(follower)
                    continue
                # The lag includes entries that were trimmed unread. If Redis cannot compute it, it
                # returns nil, and up to a page of entries is counted.
                lag = None if group[b"lag"] is None else min(group[b"lag"], state.length)
                count = _COUNTED if lag is None else 1
                pipeline.execute_command("XRANGE", key, f"({last}", "+", "COUNT", count)
                asked.append((key, name, worker, last, lag))
        replies: list[Any] = await pipeline.execute() if asked else []
    for (key, name, worker, last, lag), unread in zip(asked, replies, strict=True):
        behind = len(unread) if lag is None or not unread else max(lag, 1)
        first_ms = EntryID.parse(unread[0][0]).ms if unread else now_ms
        follower = Follower(
            name=name,
            worker=worker,
            last=last,
            behind=behind,
            at_least=lag is None and behind == _COUNTED,
            lag_ms=max(0, now_ms - first_ms),
        )
        followers.setdefault(key, []).append(follower)
    return followers


async def exists(clients: ShardClients, keys: Keys, channel: Channel) -> bool:
    """Return True if the channel has a stream."""
    key = keys.stream(channel)
    return bool(await connect.command(clients.for_key(key), "EXISTS", key))
