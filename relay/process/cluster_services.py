"""What the doors of all workers share: a bus, small values, the newest events, commands to all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from relay.stream.cluster.active import ActiveChannels
from relay.stream.cluster.bus import ClusterBus
from relay.stream.cluster.presence import ClusterPresence
from relay.stream.cluster.store import ClusterStore
from relay.stream.connection.reconnecting import ReconnectingConnection
from relay.stream.format import ephemeral
from relay.stream.read.history import History
from relay.stream.write import control

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.core.model import Channel, Event
    from relay.stream.format.keys import Keys
    from relay.stream.read.stream_commands import Decode


class Site:
    """Two connections of their own; `run` must be running."""

    def __init__(
        self,
        *,
        redis: RedisSettings,
        keys: Keys,
        instance: str,
        decode: Decode,
        spawn: Callable[..., object],
        dead: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """`dead` says of a worker that it is known to have died."""
        self.bus = ClusterBus(redis=redis, keys=keys, instance=instance)
        self.store = ClusterStore(self.bus.link, keys)
        self._long = ReconnectingConnection(redis)
        self.history = History(link=self._long, keys=keys, decode=decode, spawn=spawn)
        self.presence = ClusterPresence(
            link=self.bus.link,
            long=self._long,
            keys=keys,
            instance=instance,
            dead=dead,
            spawn=spawn,
        )
        self.active = ActiveChannels(self._long, keys)
        self._keys = keys

    async def run(self) -> None:
        """Until cancelled; survives everything that Redis does."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.bus.link.run(), name="bus")
            tasks.create_task(self._long.run(), name="history")
            tasks.create_task(self.presence.run(), name="presence")

    async def wait_open(self) -> None:
        """Until both are connected."""
        await self.bus.link.wait_open()
        await self._long.wait_open()

    def whisper(self, event: Event) -> None:
        """See `relay.doorkit.contract.DoorContext`."""
        payload = ephemeral.encode(event)
        self.bus.link.post(("PUBLISH", self._keys.ephemeral(event.channel), payload))

    async def disconnect(
        self, user: str, *, channel: Channel | None = None, door: str | None = None
    ) -> None:
        """See `relay.doorkit.contract.Command`; a channel means nothing here."""
        del channel
        await self._tell(control.DisconnectUser(user=user, door=door))

    async def unsubscribe(
        self, user: str, *, channel: Channel | None = None, door: str | None = None
    ) -> None:
        """See `relay.doorkit.contract.Command`; without a channel, from all."""
        await self._tell(control.UnsubscribeUser(user=user, channel=channel, door=door))

    async def members(self, group: str) -> frozenset[str]:
        """See `relay.doorkit.contract.DoorContext`."""
        found = await self.bus.link.call("SMEMBERS", self._keys.group(group))
        names = found if isinstance(found, list | set) else []
        return frozenset(name.decode(errors="replace") for name in names)

    async def _tell(self, command: control.ControlCommand) -> None:
        await self.bus.link.call(*control.append(self._keys, command))
