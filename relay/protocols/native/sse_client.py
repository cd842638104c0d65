"""One server-sent-event connection in the hub's eyes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from relay.core.errors import ClientError, RelayError, Unauthorized
from relay.core.reasons import Reason
from relay.hub.recovery import Notice
from relay.protocols.native import codec

if TYPE_CHECKING:
    from relay.core.model import Channel
    from relay.hub.session import Outbox, Session, Subscription


class SubscriptionRejected(Exception):
    """A channel that this request may not have refuses the whole request."""

    def __init__(self, channel: Channel, error: RelayError) -> None:
        super().__init__(str(error))
        self.channel = channel
        self.error = error


class SseClient:
    """Waits until all channels are admitted; ends the stream when none is left."""

    __slots__ = ("_outbox", "_waiting", "admitted", "session")

    def __init__(self, channels: int, admitted: asyncio.Future[None]) -> None:
        self.admitted: asyncio.Future[None] | None = admitted
        self.session: Session | None = None
        self._waiting = channels
        self._outbox: Outbox | None = None

    def attached(self, outbox: Outbox) -> None:
        """The response has begun."""
        self._outbox = outbox
        self.admitted = None
        if self.session is not None and not self.session.subscriptions:
            self._end(b"")

    def subscribed(self, subscription: Subscription) -> None:
        """See `relay.hub.session.Client`."""
        del subscription
        self._waiting -= 1
        if not self._waiting and self.admitted is not None and not self.admitted.done():
            self.admitted.set_result(None)

    def refused(self, channel: Channel, error: RelayError) -> None:
        """See `relay.hub.session.Client`."""
        if self.admitted is not None and not self.admitted.done():
            self.admitted.set_exception(SubscriptionRejected(channel, error))

    def dropped(self, channel: Channel, notice: Notice) -> None:
        """See `relay.hub.session.Client`."""
        del channel
        # After the last of the expired ones comes `expired`, which has something to add.
        last = self.session is not None and not self.session.subscriptions
        if last and notice.reason != Reason.EXPIRED:
            self._end(b"")

    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        """Never called: the format has words for every notice."""

    def expired(self) -> None:
        """See `relay.hub.session.Client`."""
        self._end(codec.sse_error(Unauthorized("the token has expired")))

    def disconnect(self, reason: Reason) -> None:
        """See `relay.hub.session.Client`."""
        self._end(codec.sse_notice("closing", reason=reason))

    def _end(self, last: bytes) -> None:
        session = self.session
        if session is None:
            return
        if self.admitted is not None and not self.admitted.done():
            self.admitted.set_exception(ClientError("disconnected"))
        session.write_out()
        session.end()
        if self._outbox is not None:
            self._outbox.close(last)
