"""The shard map of one server, or of several independent servers by rendezvous hashing.

Each server gets a score for each hash tag, and the server with the highest score has the key. The
result depends only on the servers' names and the tag: not on their order in the list, the host or
the process. If a server is added to N, only 1/(N+1) of the keys change their server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from relay.stream.connection.connect import describe, discover, server_name
from relay.stream.shards.shard import SITE_TAG, Shard, tag_of

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.connection.connect import RedisEndpoint

_MASK = (1 << 64) - 1


class ServerShard:
    """A server, or a primary behind Sentinel."""

    uses_sharded_pubsub = False

    def __init__(self, settings: RedisSettings, tag: str = "") -> None:
        self.settings = settings
        # Identifies the server on all hosts, whatever the user and the password are.
        self.id = server_name(settings)
        self.name = describe(settings)
        # Distinguishes databases of one server, because invalidations have no database.
        self.tag = tag
        self.seed = _hash(self.id.encode())
        # A check that was not possible at the start, because the server could not be reached.
        self.before_use: Callable[[RedisEndpoint], Awaitable[None]] | None = None

    async def locate(self) -> RedisEndpoint:
        """See `Shard`. Asks the Sentinels again each time.

        Raises:
            StartError: Other workers use this server with another list of servers.
        """
        endpoint = await discover(self.settings)
        if self.before_use is not None:
            await self.before_use(endpoint)
            self.before_use = None
        return endpoint


class HashMap:
    """One shard for each server of the list."""

    def __init__(self, servers: Sequence[RedisSettings]) -> None:
        several = len(servers) > 1
        self._shards = [
            ServerShard(server, str(number) if several else "")
            for number, server in enumerate(servers, 1)
        ]
        self._only = None if several else self._shards[0]
        self._chosen = lru_cache(65536)(self._choose)

    @property
    def shards(self) -> Sequence[ServerShard]:
        """See `ShardMap`."""
        return self._shards

    @property
    def home(self) -> Shard:
        """See `ShardMap`."""
        return self.shard_of(SITE_TAG)

    @property
    def slots(self) -> Sequence[Shard | None]:
        """See `ShardMap`."""
        return ()

    def shard_of(self, key: bytes) -> Shard:
        """See `ShardMap`."""
        return self._only or self._chosen(tag_of(key))

    def names(self) -> str:
        """Return the names that decide where keys are, sorted to compare lists of servers."""
        return ", ".join(sorted(shard.id for shard in self._shards))

    async def refresh(self) -> None:
        """Do nothing: the list of servers is fixed."""

    def _choose(self, tag: bytes) -> ServerShard:
        name = _hash(tag)
        return max(self._shards, key=lambda shard: _mix(name ^ shard.seed))


def _hash(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")


def _mix(value: int) -> int:
    # The finalizer of splitmix64: every bit of the input changes half of the bits.
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
