"""State and functions that all Seafile clients of this worker share."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

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


class SeafileService:
    """Settings, tokens, expiry timer and stored positions of the protocol."""

    def __init__(self, context: DoorContext, settings: SeafileSettings) -> None:
        self.context = context
        self.expiries = Expiries(asyncio.get_running_loop)
        self._numbers = itertools.count()
        self.reload(settings)

    def reload(self, settings: SeafileSettings) -> None:
        """Use new settings for new requests."""
        self.settings = settings
        self.tokens = SeafTokens(
            settings.key.get_secret_value(), settings.notification_token.get_secret_value()
        )

    def next_id(self) -> str:
        """Return a name for a connection that is unique on all workers."""
        return f"{self.context.bus.instance}:{next(self._numbers)}"

    def count_rejection(self, code: Reason) -> None:
        """Count a rejected client or request in the metrics."""
        self.context.metrics.rejected("seafile", code)

    def frame(self, event: Event) -> bytes:
        """Return the frame that the event has in live delivery."""
        return frame(SEAFILE, event)

    async def newest(self, channel: Channel) -> Snapshot | None:
        """Return the newest events of a library, or None if Redis is unreachable."""
        try:
            return await self.context.history(channel, self.settings.missed_events)
        except RelayError as exc:
            _log.debug("Could not read the newest events of %s: %s", channel, exc)
            return None

    async def stored_positions(self, name: str) -> missed.Stored:
        """Return the positions stored under this name. Empty if Redis is unreachable."""
        try:
            return await self._stored(name)
        except RelayError:
            return {}

    async def _stored(self, name: str) -> missed.Stored:
        stored: missed.Stored = {}
        async for part in in_slices(missed.read(await self.context.store.get(name))):
            stored |= part
        return stored

    async def store_positions(
        self, name: str, seen: Mapping[str, missed.UncertainPosition], certain_at: float | None
    ) -> None:
        """Store a connection's positions, and keep those of other connections under this name.

        Events that were sent after `certain_at` (`time.monotonic`) may not have arrived. None means
        that all have arrived.
        """
        store = self.context.store
        try:
            latest = None
            if certain_at is not None:
                # Entry IDs contain the time of Redis, which may differ from this host's.
                latest = EntryID(max(math.floor(self.context.clock.at_ms(certain_at)), 0), 0)
            stored = await self._stored(name)
            async for repo_id, (position, floor) in in_slices(seen.items()):
                if latest is not None:
                    position = position._replace(at=max(floor, min(position.at, latest)))
                missed.put(stored, repo_id, position)
            lines = [line async for line in in_slices(missed.write(stored))]
            await store.put(name, b"".join(lines), self.settings.missed_s or 1)
        except RelayError as exc:
            _log.info("Positions of a Seafile client not stored: %s", exc)
