"""The live clients of one stream, by format: each format is encoded once for all of them."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.core.metrics import Metrics
    from relay.core.model import Channel, Event
    from relay.hub.encoding import Encoder
    from relay.hub.recovery import Notice
    from relay.hub.session import Subscription


class LiveClients:
    """Subscriptions whose cursor is the feed's position. None of them may be added or removed
    while `formats` is being iterated: full sockets are dealt with at the end of the turn."""

    def __init__(self, channel: Channel, metrics: Metrics) -> None:
        self._channel = channel
        self._metrics = metrics
        self._formats: dict[Encoder, dict[Subscription, None]] = {}

    def __iter__(self) -> Iterator[Subscription]:
        for subscriptions in self._formats.values():
            yield from subscriptions

    def __len__(self) -> int:
        return sum(map(len, self._formats.values()))

    def formats(self) -> ItemsView[Encoder, dict[Subscription, None]]:
        """Each format with those who get it."""
        return self._formats.items()

    def add(self, subscription: Subscription) -> None:
        """It has caught up."""
        subscription.live = True
        subscription.cursor = None
        self._formats.setdefault(subscription.session.encoder, {})[subscription] = None

    def remove(self, subscription: Subscription) -> None:
        """It is over, or its socket is full."""
        encoder = subscription.session.encoder
        subscriptions = self._formats[encoder]
        del subscriptions[subscription]
        subscription.live = False
        if not subscriptions:
            del self._formats[encoder]

    def tell(self, notice: Notice) -> None:
        """To all of them."""
        self._metrics.told(notice, len(self))
        for encoder, subscriptions in list(self._formats.items()):
            data = encoder.notice(self._channel, notice)
            # A copy: clients that are noticed may leave.
            for subscription in list(subscriptions):
                if data is None:
                    subscription.session.client.noticed(subscription, notice)
                else:
                    subscription.session.offer(data)

    def offer(self, event: Event) -> None:
        """An event that no position counts: the ephemeral kind."""
        for encoder, subscriptions in self._formats.items():
            if event.door not in (None, encoder.door):
                continue
            data = shared = encoder.event(event)
            for subscription in subscriptions:
                session = subscription.session
                if event.to is None or not event.to.isdisjoint(session.selectors):
                    if encoder.personal:
                        data = encoder.personal_event(event, None, subscription, shared)
                    if data:
                        session.offer(data)
