"""What no stream ID shows: after a failover, events may be gone that nobody had been sent yet.

Connected clients are closed then, and come back with the ID of their last message, whose entry is
still there. So it is remembered up to which ID a channel's clients cannot be promised that they
have missed nothing. Where no server was promoted, nothing is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.errors import RelayError
from relay.model import EntryID

if TYPE_CHECKING:
    from relay.frontdoor import DoorContext
    from relay.model import Channel
    from relay.reads import Snapshot

# Who comes back later than that is seldom within history.
_KEPT_S = 86400.0


class Doubts:
    """For all workers, by the site's store."""

    def __init__(self, context: DoorContext) -> None:
        self._context = context
        # What this worker has written, so that a thousand clients of a channel write it once.
        self._written: dict[Channel, EntryID] = {}

    def remember(self, channel: Channel, at: EntryID) -> None:
        """Whoever has seen nothing after `at` may have missed something."""
        if self._written.get(channel, at) > at or self._written.get(channel) == at:
            return
        self._written[channel] = at
        _ = self._context.spawn(self._write(channel, at), name=f"doubt {channel}")

    async def _write(self, channel: Channel, at: EntryID) -> None:
        try:
            await self._context.store.put(_name(channel), str(at).encode(), _KEPT_S)
        except RelayError:
            # The next client that is closed tries again.
            self._written.pop(channel, None)

    async def of(self, channel: Channel, snapshot: Snapshot) -> EntryID | None:
        """Up to where there is a doubt. Unavailable where Redis is away."""
        if not snapshot.server.previous.strip(b"0"):
            return None
        found = await self._context.store.get(_name(channel))
        return None if found is None else EntryID.parse(found)


def _name(channel: Channel) -> str:
    return f"centrifugo:doubt:{channel}"
