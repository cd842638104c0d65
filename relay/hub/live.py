"""The live clients of one stream, by format: each format is encoded once for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from relay.hub.session import SubscriptionMode

if TYPE_CHECKING:
    from relay.core.metrics import Metrics
    from relay.core.model import Channel, Event
    from relay.hub.recovery import Notice
    from relay.hub.session import Encoder, Subscription


class LiveClients:
    """Subscriptions whose cursor is the feed's position.

    Don't add or remove any while iterating over `by_encoder`: full sockets are handled at the end
    of the turn.
    """

    def __init__(self, channel: Channel, metrics: Metrics) -> None:
        self._channel = channel
        self._metrics = metrics
        self.by_encoder: dict[Encoder, dict[Subscription, None]] = {}
        self.count = 0

    def __iter__(self) -> Iterator[Subscription]:
        for subscriptions in self.by_encoder.values():
            yield from subscriptions

    def add(self, subscription: Subscription) -> None:
        """Add a subscription that has caught up."""
        subscription.mode = SubscriptionMode.LIVE
        subscription.cursor = None
        self.by_encoder.setdefault(subscription.session.encoder, {})[subscription] = None
        self.count += 1

    def remove(self, subscription: Subscription) -> None:
        """Remove a subscription that has ended or whose socket is full."""
        encoder = subscription.session.encoder
        subscriptions = self.by_encoder[encoder]
        del subscriptions[subscription]
        self.count -= 1
        subscription.mode = SubscriptionMode.BEHIND
        if not subscriptions:
            del self.by_encoder[encoder]

    def notify(self, notice: Notice) -> None:
        """Send a notice to all of them."""
        self._metrics.notified(notice, self.count)
        for encoder, subscriptions in list(self.by_encoder.items()):
            data = encoder.notice(self._channel, notice)
            # Iterate over a copy: `noticed` may close a subscription.
            for subscription in list(subscriptions):
                if data is None:
                    subscription.session.client.noticed(subscription, notice)
                else:
                    subscription.session.offer(data)

    def offer(self, event: Event) -> None:
        """Offer an ephemeral event. It does not change the position."""
        offered = 0
        for encoder, subscriptions in self.by_encoder.items():
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
                        offered += 1
        self._metrics.ephemeral(offered)
