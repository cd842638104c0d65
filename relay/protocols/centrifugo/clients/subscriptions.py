"""The subscriptions of one connection.

A subscribe command is passed to the hub and is answered when the hub has placed the subscription.
With recovery, the end of the stream is read first. The subscription then starts at exactly that
position, so each event is sent once: in the recovered messages or after them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relay.core.errors import Forbidden, RelayError, StreamRefused, Unavailable
from relay.core.model import Channel, parse_channel
from relay.core.reasons import Reason
from relay.core.slices import in_slices
from relay.protocols.centrifugo import channels, codec, encoders, history
from relay.protocols.centrifugo.clients.interfaces import FatalError
from relay.stream.format.json_text import is_json

if TYPE_CHECKING:
    import asyncio

    from relay.core.stream_interface import Snapshot
    from relay.hub.session import Subscription
    from relay.protocols.centrifugo.clients.interfaces import CommandContext
    from relay.protocols.centrifugo.clients.reply_queue import ReplySlot
    from relay.protocols.centrifugo.server_state import ServerState
    from relay.protocols.centrifugo.settings import CentrifugoNamespace

# Interval between checks whether servers have become unreachable, or are read again.
_CHECK_S = (0.5, 1.5)
# If Redis has refused to read a stream, its server is found to be unreadable within so many checks,
# or the refusal concerns this stream only.
_CHECKS = 10


@dataclass(slots=True, eq=False)
class _PendingSubscription:
    """A subscribe command without a reply. `snapshot` is set if the client recovers."""

    slot: ReplySlot
    params: codec.SubscribeParams
    rules: CentrifugoNamespace | None
    snapshot: Snapshot | None = None


class Subscriptions:
    """Active and pending subscriptions of one connection."""

    __slots__ = (
        "_active",
        "_check",
        "_connection",
        "_infos",
        "_pending",
        "_server",
        "_unavailable",
        "_unread",
        "admitted",
    )

    def __init__(self, server: ServerState, connection: CommandContext) -> None:
        self._server = server
        self._connection = connection
        self._active: set[str] = set()
        self._pending: dict[str, _PendingSubscription] = {}
        self._infos: dict[str, str] = {}
        # Channels whose subscriptions were rejected because their server cannot be read, and those
        # that Redis refused to read, with the number of checks until the reason is known.
        self._unavailable: set[Channel] = set()
        self._unread: dict[Channel, int] = {}
        self._check: asyncio.TimerHandle | None = None
        # Channels that the Centrifugo rules allow. The principal's `grant` looks them up.
        self.admitted: set[Channel] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._active

    @property
    def pending_count(self) -> int:
        """The number of subscribe commands without a reply."""
        return len(self._pending)

    def info(self, name: str) -> str:
        """Return the info that the application has signed for this client and channel.

        It is kept when the client unsubscribes.
        """
        return self._infos.get(name, "")

    # ---- commands -------------------------------------------------------------------------------

    def subscribe(self, slot: ReplySlot) -> bool:
        """Start a subscription. Return False if another one has to be answered first."""
        params = codec.subscribe(slot.command.params)
        if not params.channel:
            raise FatalError(Reason.BAD_MESSAGE)
        settings, connection = self._server.settings, self._connection
        count = len(self._active) + len(self._pending)
        if self._pending and (
            params.channel in self._pending or count >= settings.client_channel_limit
        ):
            # If the pending subscription is rejected, this one may be allowed.
            return False
        error = channels.rejection(
            settings, params, user=connection.user, client=connection.client, active=self._active
        )
        if error is None:
            try:
                self._start(slot, parse_channel(params.channel), params)
            except ValueError:
                # The name cannot be that of a stream.
                error = codec.INVALID_MESSAGE
        if error is not None:
            body = codec.subscribe_body(params.channel, status=False)
            connection.reply(slot, body, error, codec.FIX)
        return True

    def _start(self, slot: ReplySlot, channel: Channel, params: codec.SubscribeParams) -> None:
        rules = None
        if not channels.is_foreign(channel):
            rules = self._server.names.rules(channel)
            self.admitted.add(channel)
        if self._server.names.is_private(channel) and is_json(params.info.encode()):
            self._infos[channel] = params.info
        pending = self._pending[channel] = _PendingSubscription(slot, params, rules)
        self._forget_rejected(channel)
        if rules is not None and rules.recover and params.recover:
            self._connection.run(self._recover(channel, pending, rules))
        else:
            self._connection.pending += 1
            self._join(channel, pending)

    async def _recover(
        self, channel: Channel, pending: _PendingSubscription, rules: CentrifugoNamespace
    ) -> None:
        server = self._server
        if self._reject_if_away(channel, pending):
            return
        try:
            pending.snapshot = await server.context.history(channel, history.snapshot_size(rules))
        except Unavailable as exc:
            if self._reject_if_away(channel, pending):
                return
            if not isinstance(exc, StreamRefused):
                raise
            del self._pending[channel]
            self._reject_refused(channel, pending)
            return
        missed = history.missed(pending.snapshot, rules, pending.params.last, server.clock())
        await encoders.encode_messages(missed.events)
        self._join(channel, pending)

    def _join(self, channel: Channel, pending: _PendingSubscription) -> None:
        session = self._connection.session
        if session is None or self._reject_if_away(channel, pending):
            return
        position = None if pending.snapshot is None else history.position(pending.snapshot)
        self._server.context.subscribe(session, channel, position)
        self._check_later()

    def _reject_if_away(self, channel: Channel, pending: _PendingSubscription) -> bool:
        """Reject the command if only the server with this channel is away.

        A reconnect would affect all channels. Return True if the subscription cannot go on.

        Raises:
            FatalError: No server can be read.
        """
        context = self._server.context
        if self._connection.closed:
            return True
        if not context.not_reading([channel]):
            return False
        if context.not_reading([]):
            raise FatalError(Reason.UNAVAILABLE)
        del self._pending[channel]
        self._answer_unavailable(channel, pending)
        if self._may_remember():
            self._unavailable.add(channel)
        return True

    def _answer_unavailable(self, channel: Channel, pending: _PendingSubscription) -> None:
        self.admitted.discard(channel)
        body = codec.subscribe_body(channel, status=False)
        self._connection.answer(pending.slot, body, codec.INTERNAL_ERROR, codec.RETRY)
        self._check_later()

    def _reject_refused(self, channel: Channel, pending: _PendingSubscription) -> None:
        """Reject the command, because Redis refuses to read the stream."""
        self._answer_unavailable(channel, pending)
        if self._may_remember():
            self._unread[channel] = _CHECKS

    def _may_remember(self) -> bool:
        known = len(self._unavailable) + len(self._unread)
        return known < self._server.settings.client_channel_limit

    def _check_later(self) -> None:
        if self._check is None and not self._connection.closed:
            delay_s = random.uniform(*_CHECK_S)  # noqa: S311  # not a key
            self._check = self._server.call_later(delay_s, self._on_check)

    def _on_check(self) -> None:
        """Reject subscribe commands whose server has become unreachable.

        Close the connection when a channel can be read again, because centrifuge-js does not repeat
        a rejected subscribe command before it has reconnected.
        """
        self._check = None
        session, not_reading = self._connection.session, self._server.context.not_reading
        if session is None or self._connection.closed:
            return
        for channel, checks in list(self._unread.items()):
            self._unread[channel] = checks - 1
            if is_away := bool(not_reading([channel])):
                self._unavailable.add(channel)
            if is_away or checks <= 1:
                del self._unread[channel]
        if any(not not_reading([channel]) for channel in self._unavailable):
            self._connection.close(Reason.UNAVAILABLE)
            return
        try:
            for name, pending in list(self._pending.items()):
                channel = Channel(name)
                # Without a subscription, the command waits for another answer.
                if channel in session.subscriptions and self._reject_if_away(channel, pending):
                    self._server.context.hub.unsubscribe(session, channel)
        except FatalError as fatal:
            self._connection.close(fatal.reason)
            return
        if self._pending or self._unavailable or self._unread:
            self._check_later()

    def _forget_rejected(self, channel: Channel) -> None:
        """Handle a new command for the channel: the connection need not be closed for it."""
        self._unavailable.discard(channel)
        self._unread.pop(channel, None)

    def unsubscribe(self, slot: ReplySlot) -> bool:
        """Unsubscribe, and reply.

        As in v1, the reply is a success for any channel of a known namespace. If the namespace has
        been removed in the meantime, it is an error and the subscription is kept.
        """
        name = codec.channel_of(slot.command.params)
        if not name:
            raise FatalError(Reason.BAD_MESSAGE)
        self._forget_rejected(Channel(name))
        error, active, session = "", name in self._active, self._connection.session
        if self._server.names.rules(name) is None and not (active and channels.is_foreign(name)):
            error = codec.NAMESPACE_NOT_FOUND
        elif active and session is not None:
            self._server.context.hub.unsubscribe(session, Channel(name))
            self._remove(Channel(name))
        body = codec.status_body(name, status=not error)
        self._connection.reply(slot, body, error, codec.FIX if error else "")
        return True

    # ---- from the hub ---------------------------------------------------------------------------

    def confirm(self, subscription: Subscription) -> None:
        """Reply to the subscribe command: the hub has placed the subscription."""
        channel, session = subscription.feed.channel, subscription.session
        pending = self._pending.pop(channel)
        self._active.add(channel)
        self._server.stats.count("client_num_subscribe", "node_num_add_client_sub")
        # The client receives its own join push after the reply, because the push travels through
        # Redis.
        self._server.presence.join(channel, *self._client_info(channel))
        rules = pending.rules
        last, messages, recovered = "", None, False
        if rules is not None and rules.recover:
            last = str(subscription.position.id)
        if rules is not None and pending.snapshot is not None:
            now = self._server.redis_time()
            missed = history.missed(pending.snapshot, rules, pending.params.last, now)
            messages = encoders.visible_messages(session, missed.events)
            recovered = missed.recovered
        body = codec.subscribe_body(
            channel, status=True, last=last, messages=messages, recovered=recovered
        )
        self._connection.answer(pending.slot, body, holds=True)

    def reject(self, channel: Channel, error: RelayError) -> None:
        """Reply with an error. Raise FatalError if the rights could not be checked.

        The client subscribes again after it has reconnected.
        """
        pending = self._pending.pop(channel, None)
        self.admitted.discard(channel)
        if pending is None:
            return
        if isinstance(error, StreamRefused):
            self._reject_refused(channel, pending)
            return
        if not isinstance(error, Forbidden):
            raise FatalError(Reason.UNAVAILABLE)
        self._answer_denied(channel, pending)

    def _answer_denied(self, channel: Channel, pending: _PendingSubscription) -> None:
        # Don't reveal whether a channel of another protocol exists.
        foreign = channels.is_foreign(channel)
        text = codec.NAMESPACE_NOT_FOUND if foreign else codec.PERMISSION_DENIED
        body = codec.subscribe_body(channel, status=False)
        self._connection.answer(pending.slot, body, text, codec.FIX)

    def drop(self, channel: Channel) -> None:
        """Remove a subscription that the server has ended. The client has received the push."""
        pending = self._pending.pop(channel, None)
        if pending is not None:
            self.admitted.discard(channel)
            self._answer_denied(channel, pending)
        elif channel in self._active:
            self._remove(channel)

    def clear(self) -> None:
        """Remove all subscriptions of a closed connection."""
        self._pending.clear()
        self._unavailable.clear()
        self._unread.clear()
        if self._check is not None:
            self._check.cancel()
            self._check = None
        for name in list(self._active):
            self._remove(Channel(name))

    def _remove(self, channel: Channel) -> None:
        self._active.remove(channel)
        self._server.stats.count("node_num_remove_client_sub")
        self.admitted.discard(channel)
        self._server.presence.leave(channel, *self._client_info(channel))
        self._server.publisher.on_unsubscribed(channel)

    async def add_presence(self, wanted: Callable[[Channel], bool]) -> None:
        """Add the client to the presence of those of its channels for which `wanted` is True."""
        async for name in in_slices(map(Channel, list(self._active))):
            # The client may have unsubscribed in the meantime.
            if name in self._active and wanted(name):
                self._server.presence.update(name, *self._client_info(name))

    def update_presence(self) -> None:
        """Write the client's new info to the presence of all its channels."""
        for name in self._active:
            self._server.presence.update(Channel(name), *self._client_info(Channel(name)))

    def _client_info(self, channel: Channel) -> tuple[str, bytes]:
        return self._connection.client, self._connection.info(channel)
