"""Services that protocols share across workers: message bus, key-value store, presence, channel
history and cluster-wide commands."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from relay.core.errors import RedisUnavailable, RelayError, Unavailable
from relay.stream.cluster.active import ActiveChannels
from relay.stream.cluster.bus import ClusterBus
from relay.stream.cluster.presence import ClusterPresence
from relay.stream.cluster.store import ClusterStore
from relay.stream.format import ephemeral
from relay.stream.read.history import History
from relay.stream.shards.links import ShardLinks
from relay.stream.shards.shard import SITE_TAG
from relay.stream.write import control

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.core.clock import RedisClock
    from relay.core.model import Channel, Event
    from relay.stream.connection.primary import Continued
    from relay.stream.format.keys import Keys
    from relay.stream.read.stream_commands import Decode
    from relay.stream.shards.shard import ShardMap


_log = logging.getLogger(__name__)


class ClusterServices:
    """Shared services on two connections to each Redis server. `run` must be running."""

    def __init__(
        self,
        *,
        shards: ShardMap,
        redis: RedisSettings,
        keys: Keys,
        instance: str,
        decode: Decode,
        spawn: Callable[..., object],
        max_entry_bytes: int,
        dead: Callable[[str], bool] = lambda _: False,
        continued: Continued = lambda _: (),
    ) -> None:
        """`dead` returns True for an instance that is known to have died."""
        self.bus = ClusterBus(shards=shards, redis=redis, keys=keys, instance=instance)
        self.store = ClusterStore(self.bus.links, keys)
        self._long = ShardLinks(shards, redis, continued=continued)
        self.history = History(
            links=self._long,
            keys=keys,
            decode=decode,
            spawn=spawn,
            max_entry_bytes=max_entry_bytes,
        )
        self.presence = ClusterPresence(
            links=self.bus.links,
            long=self._long,
            keys=keys,
            instance=instance,
            dead=dead,
            spawn=spawn,
        )
        self.active = ActiveChannels(self._long, keys)
        self._keys = keys

    async def run(self) -> None:
        """Keep both connections open. Runs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.bus.links.run(), name="bus")
            tasks.create_task(self._long.run(), name="history")

    async def wait_open(self) -> None:
        """Wait until both are connected."""
        await self.bus.links.wait_open()
        await self._long.wait_open()

    def publish_ephemeral(self, event: Event) -> None:
        """Publish an ephemeral event on all workers. ValueError if it cannot be ephemeral."""
        payload = ephemeral.encode(event)
        self.bus.links.publish(self._keys.ephemeral(event.channel), payload)

    async def disconnect(
        self, user: str, *, channel: Channel | None = None, door: str | None = None
    ) -> None:
        """Disconnect the user on all workers. `channel` is ignored."""
        del channel
        await self._send(control.DisconnectUser(user=user, door=door))

    async def unsubscribe(
        self, user: str, *, channel: Channel | None = None, door: str | None = None
    ) -> None:
        """Unsubscribe the user from `channel` on all workers, or from all channels."""
        await self._send(control.UnsubscribeUser(user=user, channel=channel, door=door))

    async def clear_presence(self, dead: str) -> None:
        """Remove the clients of a dead worker from presence."""
        try:
            await self.presence.clear(dead)
        except RelayError as exc:
            # A periodic job finds them too.
            _log.info("Could not remove the clients of worker %s from presence: %s", dead, exc)

    async def measure(self, clock: RedisClock) -> None:
        """Ask Redis for its time. Keep what is known of it if Redis is unreachable."""
        asked_at = time.monotonic()
        try:
            reply = await self.bus.links.link_of(SITE_TAG).call("TIME")
        except (RedisUnavailable, Unavailable):
            return
        seconds, micros = cast("list[bytes]", reply)
        clock.measured(int(seconds) * 1000 + int(micros) / 1000, asked_at)

    async def members(self, group: str) -> frozenset[str]:
        """Return the users of a group that the application stores in Redis."""
        found = await self.bus.links.call("SMEMBERS", self._keys.group(group))
        names = found if isinstance(found, list | set) else []
        return frozenset(name.decode(errors="replace") for name in names)

    async def _send(self, command: control.ControlCommand) -> None:
        links = self.bus.links
        found: Sequence[Sequence[bytes]] | None = None
        if (read := control.newest(self._keys, command)) is not None:
            found = cast("Sequence[Sequence[bytes]]", await links.call(*read))
        await links.call(*control.append(self._keys, command, found))
