"""What all clients of the door share: settings, tokens, the timer of expiries, the store."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from relay.core.errors import RelayError
from relay.core.model import EntryID
from relay.core.reasons import Reason
from relay.core.slices import in_slices
from relay.hub.encoding import frame
from relay.protocols.seafile import missed
from relay.protocols.seafile.encoders import SEAFILE
from relay.protocols.seafile.expiries import Expiries
from relay.protocols.seafile.tokens import SeafTokens

if TYPE_CHECKING:
    from relay.core.model import Channel, Event
    from relay.core.stream_interface import Snapshot
    from relay.doorkit.contract import DoorContext
    from relay.protocols.seafile.settings import SeafileSettings

_log = logging.getLogger(__name__)


class Service:
    """One for the door."""

    def __init__(self, context: DoorContext, settings: SeafileSettings) -> None:
        self.context = context
        self.expiries = Expiries(asyncio.get_running_loop)
        self._numbers = itertools.count()
        self.reload(settings)

    def reload(self, settings: SeafileSettings) -> None:
        """For what is asked from now on."""
        self.settings = settings
        self.tokens = SeafTokens(
            settings.key.get_secret_value(), settings.notification_token.get_secret_value()
        )

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Start a task that ends with the relay."""
        return self.context.spawn(work, name=name)

    def next_id(self) -> str:
        """A name for a connection that no other has, on any worker."""
        return f"{self.context.bus.instance}:{next(self._numbers)}"

    def refused(self, code: Reason) -> None:
        """One more in the metrics."""
        self.context.metrics.refused.labels(code).inc()

    def call_soon(self, call: Callable[[], None]) -> None:
        """In the next turn of the loop."""
        asyncio.get_running_loop().call_soon(call)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        """As the loop's."""
        return asyncio.get_running_loop().call_later(delay_s, call)

    def frame(self, event: Event) -> bytes:
        """As it would have been delivered live."""
        return frame(SEAFILE, event)

    async def newest(self, channel: Channel) -> Snapshot | None:
        """The newest events of a library; None where they cannot be had now."""
        try:
            return await self.context.history(channel, self.settings.missed_events)
        except RelayError as exc:
            _log.warning("what clients missed of %s cannot be read: %s", channel, exc)
            return None

    async def recall(self, name: str) -> missed.Stored:
        """Return the stored places with this name; none while Redis is away."""
        try:
            return await self._stored(name)
        except RelayError:
            return {}

    async def _stored(self, name: str) -> missed.Stored:
        stored: missed.Stored = {}
        async for part in in_slices(missed.read(await self.context.store.get(name))):
            stored |= part
        return stored

    async def remember(
        self, name: str, seen: Mapping[str, missed.Seen], certain_at: float | None
    ) -> None:
        """Write a connection's places into the store, beside those of others with this memory.

        What was sent after `certain_at` (`time.monotonic`) may not have arrived; None if everything
        has.
        """
        store = self.context.store
        try:
            latest = None
            if certain_at is not None:
                # Entry IDs are made of the clock of Redis; this host's may differ from it.
                ms = await store.time_ms() - math.ceil((time.monotonic() - certain_at) * 1000)
                latest = EntryID(max(ms, 0), 0)
            stored = await self._stored(name)
            async for repo_id, (place, floor) in in_slices(seen.items()):
                if latest is not None:
                    place = place._replace(at=max(floor, min(place.at, latest)))
                missed.put(stored, repo_id, place)
            lines = [line async for line in in_slices(missed.write(stored))]
            await store.put(name, b"".join(lines), self.settings.missed_s or 1)
        except RelayError as exc:
            _log.info("Places of a Seafile client not stored: %s", exc)
