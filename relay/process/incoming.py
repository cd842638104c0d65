"""Write entries that the hub cannot deliver to the dead-letter stream, and decode ephemeral events.

The reader passes readable entries directly to the hub (`relay.hub.feed.Feed.on_records`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from relay.core.errors import RelayError
from relay.stream.format import ephemeral
from relay.stream.write import dead_letters

if TYPE_CHECKING:
    from relay.core.metrics import Metrics
    from relay.core.model import Broken, Channel, Event
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients

_log = logging.getLogger(__name__)

DEAD_LETTERS_WAITING = 1000


class Incoming:
    """Decodes ephemeral events and stores entries that cannot be decoded."""

    def __init__(self, *, metrics: Metrics, max_entry_bytes: int) -> None:
        self._metrics = metrics
        self._max_entry_bytes = max_entry_bytes
        self.dead_letters: asyncio.Queue[tuple[Channel, Broken]] = asyncio.Queue(
            DEAD_LETTERS_WAITING
        )

    def decode_ephemeral(self, channel: Channel, payload: bytes) -> Event | None:
        """Decode an ephemeral event. Return None if it is malformed."""
        event = ephemeral.decode(channel, payload, self._max_entry_bytes)
        if isinstance(event, str):
            _log.warning("Dropped a malformed ephemeral event on %s: %s", channel, event)
            return None
        return event

    def add_dead_letter(self, channel: Channel, broken: Broken) -> None:
        """Queue an entry that cannot be decoded for the dead-letter stream."""
        try:
            self.dead_letters.put_nowait((channel, broken))
        except asyncio.QueueFull:
            # The entry itself stays in its stream.
            _log.warning(
                "Could not decode entry %s of %s: %s. No dead letter was written, because too many"
                " are waiting to be written",
                broken.id,
                channel,
                broken.reason,
            )

    async def write_dead_letters(self, clients: ShardClients, keys: Keys, node: str) -> None:
        """Write queued entries to the dead-letter stream. Runs until cancelled."""
        while True:
            channel, broken = await self.dead_letters.get()
            try:
                if await dead_letters.write(clients, keys, channel, broken, node=node):
                    self._metrics.dead_letters.inc()
                    _log.info(
                        "Entry %s of %s cannot be delivered: %s. It was saved as a dead letter; see"
                        " `relay dead-letters list`",
                        broken.id,
                        channel,
                        broken.reason,
                    )
            except RelayError as exc:
                _log.warning("Could not write dead letter %s of %s: %s", broken.id, channel, exc)
