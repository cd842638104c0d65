"""Lists of the channels that are followed on any worker, and of the workers.

Each worker subscribes to the ephemeral events of every channel that its clients follow. Redis ends
the subscriptions as soon as the worker's connection is closed, even if the worker was killed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from relay.core.model import Channel
    from relay.stream.format.keys import Keys
    from relay.stream.shards.links import ShardLinks


class ActiveChannels:
    """Implements `relay.doorkit.contract.Active` with pub/sub subscriptions in Redis."""

    def __init__(self, links: ShardLinks, keys: Keys) -> None:
        self._links = links
        self._keys = keys

    async def channels(self) -> list[Channel]:
        """Return the followed channels, in no particular order."""
        # A server lists the subscriptions to itself only.
        command = "SHARDCHANNELS" if self._links.is_sharded else "CHANNELS"
        names: set[bytes] = set()
        for link in self._links.each():
            found = await link.call("PUBSUB", command, self._keys.ephemeral_pattern)
            names.update(cast("list[bytes]", found))
        channels = map(self._keys.channel_of_ephemeral, names)
        return [channel for channel in channels if channel is not None]

    async def is_followed(self, channel: Channel) -> bool:
        """Return whether the channel is followed at this moment."""
        command = "SHARDNUMSUB" if self._links.is_sharded else "NUMSUB"
        reply = await self._links.call("PUBSUB", command, self._keys.ephemeral(channel))
        return bool(cast("list[object]", reply)[1])

    async def workers(self) -> list[str]:
        """Return the instances of all workers, including those that died a moment ago."""
        names = await self._links.call("SMEMBERS", self._keys.nodes)
        return sorted(name.decode(errors="replace") for name in cast("set[bytes]", names))
