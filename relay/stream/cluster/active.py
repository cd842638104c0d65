"""Lists of the channels that are followed on any worker, and of the workers.

Each worker subscribes to the ephemeral events of every channel that its clients follow. Redis ends
the subscriptions as soon as the worker's connection is closed, even if the worker was killed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from relay.core.model import Channel
    from relay.stream.connection.reconnecting import ReconnectingConnection
    from relay.stream.format.keys import Keys


class ActiveChannels:
    """Implements `relay.doorkit.contract.Active` with pub/sub subscriptions in Redis."""

    def __init__(self, connection: ReconnectingConnection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys

    async def channels(self) -> list[Channel]:
        """Return the followed channels, in no particular order."""
        names = await self._connection.call("PUBSUB", "CHANNELS", self._keys.ephemeral_pattern)
        found = map(self._keys.channel_of_ephemeral, cast("list[bytes]", names))
        return [channel for channel in found if channel is not None]

    async def is_followed(self, channel: Channel) -> bool:
        """Return whether the channel is followed at this moment."""
        reply = await self._connection.call("PUBSUB", "NUMSUB", self._keys.ephemeral(channel))
        return bool(cast("list[object]", reply)[1])

    async def workers(self) -> list[str]:
        """Return the instances of all workers, including those that died a moment ago."""
        names = await self._connection.call("SMEMBERS", self._keys.nodes)
        return sorted(name.decode(errors="replace") for name in cast("set[bytes]", names))
