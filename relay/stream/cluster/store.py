"""Small values of doors with a time limit: who holds a session, where somebody was last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from relay.stream.connection.reconnecting import ReconnectingConnection
    from relay.stream.format.keys import Keys


class ClusterStore:
    """See `relay.doorkit.contract.Store`."""

    def __init__(self, link: ReconnectingConnection, keys: Keys) -> None:
        self._link = link
        self._keys = keys

    async def claim(self, name: str, value: bytes, ttl_s: float) -> bytes | None:
        """None where it is ours now, else what was there."""
        ms = _ms(ttl_s)
        found = await self._link.call("SET", self._keys.store(name), value, "NX", "GET", "PX", ms)
        return cast("bytes | None", found)

    async def put(self, name: str, value: bytes, ttl_s: float) -> None:
        """Write it, whatever was there."""
        await self._link.call("SET", self._keys.store(name), value, "PX", _ms(ttl_s))

    async def put_many(self, values: Mapping[str, bytes], ttl_s: float) -> None:
        """All of them in one pipeline."""
        await self._link.call_all(
            [
                ("SET", self._keys.store(name), value, "PX", _ms(ttl_s))
                for name, value in values.items()
            ]
        )

    async def get(self, name: str) -> bytes | None:
        """What is there."""
        return cast("bytes | None", await self._link.call("GET", self._keys.store(name)))

    async def get_many(self, names: Sequence[str]) -> list[bytes | None]:
        """What is there, in the order of the names, in one pipeline."""
        # Not MGET: on Redis Cluster these keys are in different slots.
        found = await self._link.call_all([("GET", self._keys.store(name)) for name in names])
        return cast("list[bytes | None]", found)

    async def delete(self, name: str) -> None:
        """Before its time is over."""
        await self._link.call("DEL", self._keys.store(name))

    async def time_ms(self) -> int:
        """Return the clock of Redis, which entry IDs are made of, in milliseconds."""
        seconds, micros = cast("tuple[bytes, bytes]", await self._link.call("TIME"))
        return int(seconds) * 1000 + int(micros) // 1000


def _ms(ttl_s: float) -> int:
    return max(1, round(ttl_s * 1000))
