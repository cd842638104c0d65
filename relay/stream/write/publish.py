"""Appends one event: with its namespace's limit, once per uid, confirmed by replicas.

The uid and the entry are written by one script, so that of two producers with the same uid exactly
one appends, and a lost answer can be asked for again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from relay.config.settings import NamespaceSettings
from relay.core.errors import RedisUnavailable
from relay.core.model import Channel, EntryID
from relay.stream.connection import connect
from relay.stream.format.keys import Keys

# How long replicas may take; below [redis] command_timeout_s, which would cut the answer off.
WAIT_MS = 1000

# XADD keeps its own words and an error of it ends the script before anything is written.
_ONCE = """\
local first = redis.call('GET', KEYS[1])
if first then return {first, 0} end
local id = redis.call('XADD', KEYS[2], unpack(ARGV, 2))
redis.call('SET', KEYS[1], id, 'PX', ARGV[1])
return {id, 1}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """The event's ID; `fresh` is False where it was there already, under the same uid."""

    id: EntryID
    fresh: bool


async def publish(
    client: Redis,
    keys: Keys,
    channel: Channel,
    fields: Sequence[bytes],
    *,
    namespace: NamespaceSettings,
    uid: str | None = None,
    window_s: float = 0,
) -> Appended:
    """Append these flat fields. Where `uid` was appended to the channel within `window_s`, nothing
    is written and the first ID comes back; with 0 it is appended again.

    RedisUnavailable where too few replicas confirmed it; the text has the ID, since it is there.
    """
    mark = None if uid is None or not window_s else keys.uid(channel, uid)
    return await append(
        client, keys, channel, fields, namespace=namespace, mark=mark, mark_s=window_s
    )


async def append(
    client: Redis,
    keys: Keys,
    channel: Channel,
    fields: Sequence[bytes],
    *,
    namespace: NamespaceSettings,
    mark: bytes | None,
    mark_s: float,
) -> Appended:
    """As `publish`, at most once while the key `mark` is there; it lives for `mark_s`."""
    key = keys.stream(channel)
    words: list[bytes | str | int] = []
    if namespace.retention_count:
        words += "MAXLEN", "~", namespace.retention_count
    words += "*", *fields
    async with client.pipeline(transaction=False) as pipeline:
        if mark is None:
            pipeline.execute_command("XADD", key, *words)
        else:
            pipeline.execute_command("EVAL", _ONCE, 2, mark, key, int(mark_s * 1000), *words)
        if namespace.wait_replicas:
            # On the same connection: WAIT speaks of the writes of its own connection only.
            pipeline.execute_command("WAIT", namespace.wait_replicas, WAIT_MS)
        with connect.translated():
            # Raised here: redis-py would put the whole script before Redis's words.
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
    done = Appended(
        id=EntryID.parse(replies[0] if mark is None else replies[0][0]),
        fresh=mark is None or replies[0][1] == 1,
    )
    if namespace.wait_replicas and replies[1] < namespace.wait_replicas:
        raise RedisUnavailable(
            f"appended as {done.id}, but {replies[1]} of {namespace.wait_replicas} replicas have"
            f" confirmed it within {WAIT_MS} ms"
        )
    return done
