"""The interfaces of a shard map and of one shard, and the hash tags of keys."""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from relay.stream.connection.refusals import Effect, rule_of

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.connection.connect import RedisEndpoint

SLOTS = 16384
SITE_TAG = b"{site}"


class Shard(Protocol):
    """One server, or one primary of a Redis Cluster. `settings` has its timeouts."""

    @property
    def name(self) -> str:
        """The address for logs and errors, without the password."""

    @property
    def settings(self) -> RedisSettings:
        """Timeouts and TLS files for connections to this shard."""

    @property
    def uses_sharded_pubsub(self) -> bool:
        """True if pub/sub channels have slots, so that SSUBSCRIBE and SPUBLISH must be used."""

    @property
    def tag(self) -> str:
        """A hash tag, without braces, whose keys are in this shard. Empty if any key is."""

    async def locate(self) -> RedisEndpoint:
        """Return the endpoint for the next connection. RedisUnavailable if there is none now."""


class ShardMap(Protocol):
    """All shards, and the shard of each key."""

    @property
    def shards(self) -> Sequence[Shard]:
        """The shards that have keys now."""

    @property
    def home(self) -> Shard:
        """The shard of all keys that belong to no channel. Errors as of `shard_of`."""

    @property
    def slots(self) -> Sequence[Shard | None]:
        """The shard of each slot, None if it has none. Empty if keys do not move."""

    def shard_of(self, key: bytes) -> Shard:
        """Return the shard that has this key now.

        Raises:
            RedisUnavailable: No server of the Cluster has the key's slot, or the map was never
                read.
        """

    async def refresh(self) -> None:
        """Read the map again. RedisUnavailable if no server answers; the map is unchanged then."""


def tag_of(key: bytes) -> bytes:
    """Return the part of a key that Redis Cluster hashes: the text in the first braces, or all."""
    begin = key.find(b"{")
    end = key.find(b"}", begin + 1) if begin >= 0 else -1
    # Braces without text between them do not count.
    return key[begin + 1 : end] if end > begin + 1 else key


def slot_of(key: bytes) -> int:
    """Return the key's slot in a Redis Cluster."""
    return crc_hqx(tag_of(key), 0) % SLOTS


def is_misplaced(reply: str) -> bool:
    """Return True if an error reply means that the key is, or will soon be, in another shard."""
    return rule_of(reply).effect is Effect.MISPLACED
