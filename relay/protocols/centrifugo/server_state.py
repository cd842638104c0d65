"""State of the Centrifugo protocol in one worker, shared by clients, API and administrators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from relay.protocols.centrifugo import codec
from relay.protocols.centrifugo.channels import ChannelNames
from relay.protocols.centrifugo.encoders import DOOR, CentrifugoEncoder
from relay.protocols.centrifugo.presence import ChannelPresence
from relay.protocols.centrifugo.publisher import ChannelPublisher
from relay.protocols.centrifugo.stats import Stats

if TYPE_CHECKING:
    import asyncio

    from relay.core.model import Channel
    from relay.doorkit.contract import DoorContext
    from relay.hub.session import Session
    from relay.protocols.centrifugo.presence import PresenceMember
    from relay.protocols.centrifugo.settings import CentrifugoSettings
    from relay.transports.socket.reaper import Abortable


class ServerState:
    """Settings, clock, counters, presence and publisher of one worker."""

    def __init__(
        self,
        context: DoorContext,
        settings: CentrifugoSettings,
        *,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle],
    ) -> None:
        """`clock` returns this host's time in seconds since the epoch, with which the times in
        tokens are compared; `call_later` is the event loop's method."""
        self.context = context
        self.clock = clock
        # Compared with the times in entry IDs.
        self.redis_time = context.clock.now
        self.call_later = call_later
        # These connections have no session in the hub, so shutdown has to abort them separately.
        self.unauthenticated: set[Abortable] = set()
        self._apply(settings)
        context.hub.on_not_subscribed[DOOR] = _push_unsubscribe
        self.stats = Stats()
        self.presence = ChannelPresence(
            context, lambda channel: self.names.rules(channel), self.stats
        )
        self.publisher = ChannelPublisher(
            context, lambda channel: self.names.rules(channel), self.redis_time, self.stats
        )

    def reload(self, settings: CentrifugoSettings) -> None:
        """Apply new settings to new and open connections."""
        before = self.names
        self._apply(settings)
        members = [
            cast("PresenceMember", session.client)
            for session in self.context.hub.sessions()
            if session.principal.door == DOOR
        ]
        adding = self.presence.add_existing(before, members)
        _ = self.context.spawn(adding, name="centrifugo presence")

    def _apply(self, settings: CentrifugoSettings) -> None:
        self.settings = settings
        self.names = ChannelNames(settings)
        self.secret = settings.secret.get_secret_value().encode()

    def may_publish_to(self, channel: str) -> bool:
        """Return True if the API may publish to the channel.

        If no namespace is configured, any channel that belongs to no other protocol is allowed:
        such a site is governed by the [namespace] settings.
        """
        return not self.settings.namespaces or self.names.rules(channel) is not None


def _push_unsubscribe(session: Session, channel: Channel) -> None:
    # v1 sends the push to all connections of the user, including those without a subscription.
    if isinstance(session.encoder, CentrifugoEncoder):
        session.reply(session.encoder.frame(codec.unsubscribe_push(channel)))
