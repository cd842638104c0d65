"""Key-value store for protocols: small values with a time limit, such as the owner of a session.

If the connection is lost, a command is repeated once on the next connection. All commands may be
repeated: `claim` then finds its own value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from relay.stream.connection.pipeline_connection import RedisCommand
    from relay.stream.format.keys import Keys
    from relay.stream.shards.links import ShardLinks


class ClusterStore:
    """Implements `relay.doorkit.contract.Store` with Redis strings."""

    def __init__(self, links: ShardLinks, keys: Keys) -> None:
        self._links = links
        self._keys = keys

    async def claim(self, name: str, value: bytes, ttl_s: float) -> bytes | None:
        """Store the value if there is none. Return None on success, else the existing value."""
        ms = _ms(ttl_s)
        words = ("SET", self._keys.store(name), value, "NX", "GET", "PX", ms)
        (found,) = await self._call_all([words])
        return cast("bytes | None", found)

    async def put(self, name: str, value: bytes, ttl_s: float) -> None:
        """Store the value, replacing an existing one."""
        await self.put_many({name: value}, ttl_s)

    async def put_many(self, values: Mapping[str, bytes], ttl_s: float) -> None:
        """Store all values in one pipeline."""
        await self._call_all(
            [
                ("SET", self._keys.store(name), value, "PX", _ms(ttl_s))
                for name, value in values.items()
            ]
        )

    async def get(self, name: str) -> bytes | None:
        """Return the value, or None."""
        (found,) = await self.get_many([name])
        return found

    async def get_many(self, names: Sequence[str]) -> list[bytes | None]:
        """Return the values in the order of the names. Sends one pipeline."""
        # Not MGET: on Redis Cluster these keys are in different slots.
        found = await self._call_all([("GET", self._keys.store(name)) for name in names])
        return cast("list[bytes | None]", found)

    async def delete(self, name: str) -> None:
        """Delete the value."""
        await self._call_all([("DEL", self._keys.store(name))])

    async def _call_all(self, commands: Sequence[RedisCommand]) -> list[object]:
        return await self._links.call_all(commands, may_repeat=True)


def _ms(ttl_s: float) -> int:
    return max(1, round(ttl_s * 1000))
