"""A client of the hub that receives server-sent events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from relay.core.errors import ClientError, RelayError, Unauthorized, Unavailable
from relay.core.reasons import Reason
from relay.hub.recovery import Notice
from relay.hub.session import Client
from relay.protocols.native import encoders

if TYPE_CHECKING:
    from relay.core.model import Channel
    from relay.doorkit.first_subscriptions import FirstSubscriptions
    from relay.hub.session import Outbox, Session, Subscription
    from relay.protocols.native.settings import NativeSettings


class SubscriptionRejected(Exception):
    """The request is rejected, because one of its channels was."""

    def __init__(self, channel: Channel, error: RelayError) -> None:
        super().__init__(str(error))
        self.channel = channel
        self.error = error


class SseClient(Client):
    """Waits until all channels are subscribed. Ends the stream with the last subscription."""

    __slots__ = ("_first", "_outbox", "_settings", "session")

    def __init__(self, first: FirstSubscriptions, settings: NativeSettings) -> None:
        self._settings = settings
        self.session: Session | None = None
        # None once the response has begun.
        self._first: FirstSubscriptions | None = first
        self._outbox: Outbox | None = None

    def attached(self, outbox: Outbox) -> None:
        """Set the socket to close, once the response has begun."""
        self._outbox = outbox
        self._first = None
        if self.session is not None and not self.session.subscriptions:
            self._end(b"")

    @override
    def subscribed(self, subscription: Subscription) -> None:
        if self._first is not None:
            self._first.decide(subscription.feed.channel)

    @override
    def refused(self, channel: Channel, error: RelayError) -> None:
        if self._first is not None and self._first.is_waiting:
            self._first.fail(SubscriptionRejected(channel, error))
        elif isinstance(error, ClientError | Unavailable):
            # The subscription was deferred. The response to the client's next request is an error.
            self._end(encoders.sse_error(error, channel), error.code)

    @override
    def dropped(self, channel: Channel, notice: Notice) -> None:
        # After the last expired subscription `expired` is called, which sends an error.
        last = self.session is not None and not self.session.subscriptions
        if last and notice.reason != Reason.EXPIRED:
            self._end(b"", notice.reason)

    @override
    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        # Never called: the format has a block for every notice.
        pass

    @override
    def expired(self) -> None:
        self._end(encoders.sse_error(Unauthorized("the token has expired")), Reason.EXPIRED)

    @override
    def disconnect(self, reason: Reason) -> None:
        notice = encoders.sse_notice("closing", reason=reason)
        if reason == Reason.STOPPING:
            notice = encoders.retry(self._settings.next_retry_ms()) + notice
        self._end(notice, reason)

    def _end(self, last: bytes, reason: Reason | None = None) -> None:
        session = self.session
        if session is None:
            return
        if self._first is not None:
            self._first.fail(ClientError("disconnected"))
        session.write_out()
        session.end(reason)
        if self._outbox is not None:
            self._outbox.close(last)
