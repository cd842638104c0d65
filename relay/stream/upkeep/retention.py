"""Trim streams by count and age, as configured for their namespace.

Relay's own producers trim with each append; a plain XADD does not. One worker at a time runs this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from relay.config.settings import NamespaceSettings
from relay.core.model import Channel
from relay.stream.connection import connect
from relay.stream.connection.connect import RedisClient
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import ShardClients
from relay.stream.shards.server_errors import ServerErrors

# Keys of one pipeline, with up to two commands for each. redis-py needs 20 us per command.
_BATCH = 100
_MOST_MISNAMED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Trimmed:
    """The result of one run. `not_streams` is the number of matching keys that are not streams.

    `misnamed` are streams whose key is not that of a channel, for example because the braces are
    missing. Entries that are appended to them are not delivered.
    """

    streams: int
    entries: int
    not_streams: int
    misnamed: tuple[bytes, ...] = ()


async def trim(
    clients: ShardClients, keys: Keys, settings_of: Callable[[Channel], NamespaceSettings]
) -> Trimmed:
    """Trim every stream of all servers once.

    Raises:
        RelayError: A server cannot be reached or refuses commands. All others are trimmed.
    """
    parts = []
    errors = ServerErrors()
    for shard, client in await clients.each():
        with errors.collect(shard):
            parts.append(await _trim_server(client, keys, settings_of))
    errors.finish()
    return Trimmed(
        streams=sum(part.streams for part in parts),
        entries=sum(part.entries for part in parts),
        not_streams=sum(part.not_streams for part in parts),
        misnamed=tuple(key for part in parts for key in part.misnamed),
    )


async def _trim_server(
    client: RedisClient, keys: Keys, settings_of: Callable[[Channel], NamespaceSettings]
) -> Trimmed:
    streams = entries = not_streams = 0
    misnamed: list[bytes] = []
    # Entry IDs contain the time of Redis, which may differ from the time of this machine.
    now_ms = await connect.time_ms(client)
    async for found in connect.scan(client, keys.any_stream_pattern, _BATCH):
        strange = [key for key in found if keys.channel_of_stream(key) is None]
        if strange and len(misnamed) < _MOST_MISNAMED:
            misnamed += await streams_among(client, strange)
        trimmed: list[bytes] = []
        async with connect.pipelined(client) as pipeline:
            for key in found:
                if (channel := keys.channel_of_stream(key)) is None:
                    continue
                streams += 1
                for words in commands(key, settings_of(channel), now_ms):
                    trimmed.append(key)
                    pipeline.execute_command(*words)
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
        wrong_type = set()
        for key, reply in zip(trimmed, replies, strict=True):
            if not isinstance(reply, Exception):
                entries += reply
            elif str(reply).startswith("WRONGTYPE"):
                wrong_type.add(key)
            else:
                with connect.translated():
                    raise reply
        not_streams += len(wrong_type)
    return Trimmed(
        streams=streams - not_streams,
        entries=entries,
        not_streams=not_streams,
        misnamed=tuple(misnamed),
    )


async def streams_among(client: RedisClient, keys: Sequence[bytes]) -> list[bytes]:
    """Return those of the keys that are streams."""
    async with connect.pipelined(client) as pipeline:
        for key in keys:
            pipeline.execute_command("XLEN", key)
        lengths: list[Any] = await pipeline.execute(raise_on_error=False)
    return [key for key, length in zip(keys, lengths, strict=True) if isinstance(length, int)]


def describe_misnamed(keys: Keys, key: bytes, others: int = 0) -> str:
    """Return one line about a stream whose key is not that of a channel."""
    more = f" and {others} more" if others else ""
    text = (
        f"Stream {key.decode(errors='replace')}{more} belongs to no channel: its events are not"
        " delivered"
    )
    channel = keys.meant_by(key)
    if channel is None:
        return text
    return f"{text}. The key of channel {channel} is {keys.stream(channel).decode()}"


def commands(
    key: bytes, settings: NamespaceSettings, now_ms: int
) -> list[tuple[bytes | str | int, ...]]:
    """Return the XTRIM commands for this stream: none, by count, by age, or both."""
    trims: list[tuple[bytes | str | int, ...]] = []
    if settings.retention_count:
        trims.append(("XTRIM", key, "MAXLEN", "~", settings.retention_count))
    if settings.retention_age_s:
        # Trim exactly: `~` removes only whole nodes of 100 entries, so that the entries of a short
        # stream would never expire. Each trim causes a read by every worker that follows the
        # stream. The limit therefore advances in steps of a tenth of the age, at different times
        # for different streams.
        age_ms = settings.retention_age_s * 1000
        step = max(age_ms // 10, 1)
        offset = crc32(key) % step
        min_ms = (now_ms - age_ms + offset) // step * step - offset
        if min_ms > 0:
            trims.append(("XTRIM", key, "MINID", min_ms))
    return trims


async def trim_one(
    clients: ShardClients,
    keys: Keys,
    channel: Channel,
    *,
    max_entries: int | None,
    max_age_s: float | None,
) -> int | None:
    """Remove all entries except the newest `max_entries`, and those older than `max_age_s`.

    Return the number of removed entries, or None if the channel has no stream.
    """
    key = keys.stream(channel)
    client = clients.for_key(key)
    if not await connect.command(client, "EXISTS", key):
        return None
    removed = 0
    if max_entries is not None:
        removed += await connect.command(client, "XTRIM", key, "MAXLEN", max_entries)
    if max_age_s is not None:
        oldest_ms = max(0, await clients.time_ms(key) - int(max_age_s * 1000))
        removed += await connect.command(client, "XTRIM", key, "MINID", oldest_ms)
    return removed


async def delete(clients: ShardClients, keys: Keys, channel: Channel) -> bool:
    """Delete the stream of a channel. Return False if there is none.

    Its followers are notified as soon as the stream exists again.
    """
    key = keys.stream(channel)
    return bool(await connect.command(clients.for_key(key), "DEL", key))
