"""What all clients of the door share: settings, tokens, the timer of expiries, the store."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from producers.seaf_tokens import SeafTokens
from relay.errors import RelayError
from relay.hub.encoding import frame
from relay.protocols.seafile import missed
from relay.protocols.seafile.encoders import SEAFILE
from relay.protocols.seafile.expiries import Expiries

if TYPE_CHECKING:
    from relay.frontdoor import DoorContext
    from relay.model import Channel, EntryID, Event
    from relay.protocols.seafile.settings import SeafileSettings
    from relay.reads import Snapshot

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

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """A task that nobody waits for."""
        _ = self.context.spawn(work, name=name)

    @property
    def unheard_s(self) -> float:
        """For so long a client may be gone until that is noticed."""
        return self.settings.ping_s + self.settings.pong_timeout_s

    def next_id(self) -> str:
        """A name for a connection that no other has, on any worker."""
        return f"{self.context.bus.instance}:{next(self._numbers)}"

    def refused(self, code: str) -> None:
        """One more in the metrics."""
        self.context.metrics.refused.labels(code).inc()

    def call_soon(self, call: Callable[[], None]) -> None:
        """In the next turn of the loop."""
        asyncio.get_running_loop().call_soon(call)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        """As the loop's."""
        asyncio.get_running_loop().call_later(delay_s, call)

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

    async def recall(self, name: str) -> bytes | None:
        """From the store; nothing while Redis is away."""
        try:
            return await self.context.store.get(name)
        except RelayError:
            return None

    def remember(self, name: str, places: Mapping[str, EntryID], connection: str) -> None:
        """Into the store, beside what other connections of the same memory have written."""
        self.spawn(self._remember(name, places, connection), name="seafile places")

    async def _remember(self, name: str, places: Mapping[str, EntryID], connection: str) -> None:
        store = self.context.store
        try:
            stored = missed.read(await store.get(name))
            value = missed.write(missed.merged(stored, places, connection))
            await store.put(name, value, self.settings.missed_s or 1)
        except RelayError as exc:
            _log.info("where a client was is not remembered: %s", exc)
