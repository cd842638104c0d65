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

from relay.core.errors import Forbidden, RelayError, Unavailable
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

# Interval between checks whether a server that was unreachable is read again.
_RETRY_S = (0.5, 1.5)


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
        "_connection",
        "_infos",
        "_pending",
        "_retry",
        "_server",
        "_unavailable",
        "admitted",
    )

    def __init__(self, server: ServerState, connection: CommandContext) -> None:
        self._server = server
        self._connection = connection
        self._active: set[str] = set()
        self._pending: dict[str, _PendingSubscription] = {}
        self._infos: dict[str, str] = {}
        # Channels whose subscriptions were rejected because their server was unreachable.
        self._unavailable: set[Channel] = set()
        self._retry: asyncio.TimerHandle | None = None
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
        self._stop_retry(channel)
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
        except Unavailable:
            if self._reject_if_away(channel, pending):
                return
            raise
        missed = history.missed(pending.snapshot, rules, pending.params.last, server.clock())
        await encoders.encode_messages(missed.events)
        self._join(channel, pending)

    def _join(self, channel: Channel, pending: _PendingSubscription) -> None:
        session = self._connection.session
        if session is None or self._reject_if_away(channel, pending):
            return
        position = None if pending.snapshot is None else history.position(pending.snapshot)
        self._server.context.subscribe(session, channel, position)

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
        self.admitted.discard(channel)
        body = codec.subscribe_body(channel, status=False)
        self._connection.answer(pending.slot, body, codec.INTERNAL_ERROR, codec.RETRY)
        if len(self._unavailable) < self._server.settings.client_channel_limit:
            self._unavailable.add(channel)
        self._retry_later()
        return True

    def _retry_later(self) -> None:
        if self._retry is None:
            delay_s = random.uniform(*_RETRY_S)  # noqa: S311  # not a key
            self._retry = self._server.call_later(delay_s, self._on_retry)

    def _on_retry(self) -> None:
        """Close the connection when a channel can be read again.

        centrifuge-js does not repeat a rejected subscribe command before it has reconnected.
        """
        self._retry = None
        if all(self._server.context.not_reading([channel]) for channel in self._unavailable):
            self._retry_later()
        else:
            self._connection.close(Reason.UNAVAILABLE)

    def _stop_retry(self, channel: Channel) -> None:
        """Handle a new command for the channel: the connection need not be closed for it."""
        self._unavailable.discard(channel)
        if not self._unavailable and self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def unsubscribe(self, slot: ReplySlot) -> bool:
        """Unsubscribe, and reply.

        As in v1, the reply is a success for any channel of a known namespace. If the namespace has
        been removed in the meantime, it is an error and the subscription is kept.
        """
        name = codec.channel_of(slot.command.params)
        if not name:
            raise FatalError(Reason.BAD_MESSAGE)
        self._stop_retry(Channel(name))
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
        """Reply with an error. Raise FatalError if the rights could not be checked."""
        pending = self._pending.pop(channel, None)
        self.admitted.discard(channel)
        if pending is None:
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
        for channel in list(self._unavailable):
            self._stop_retry(channel)
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
