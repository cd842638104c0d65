"""What one connection is subscribed to, and how it comes to that.

A subscription is asked of the hub, and answered when the hub has placed it. Recovery reads the end
of the stream first and joins from that very place, so that what arrives meanwhile follows the
recovered messages, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relay.core.errors import Forbidden, RelayError
from relay.core.json_text import is_json
from relay.core.model import Channel, Event, parse_channel
from relay.core.slices import in_slices
from relay.protocols.centrifugo import channels, codec, encoders, history
from relay.protocols.centrifugo.server_state import FatalError, ServerState

if TYPE_CHECKING:
    from relay.core.stream_interface import Snapshot
    from relay.hub.session import Session, Subscription
    from relay.protocols.centrifugo.clients.connection import CentrifugoConnection
    from relay.protocols.centrifugo.clients.reply_queue import ReplySlot
    from relay.protocols.centrifugo.settings import CentrifugoNamespace


@dataclass(slots=True, eq=False)
class _PendingSubscription:
    """A subscription that has not been answered. `snapshot` is what it is recovered
    from."""

    slot: ReplySlot
    wanted: codec.SubscribeParams
    rules: CentrifugoNamespace | None
    snapshot: Snapshot | None = None


class Subscriptions:
    """Of one connection."""

    __slots__ = ("_asked", "_connection", "_door", "_infos", "_own", "admitted")

    def __init__(self, door: ServerState, connection: CentrifugoConnection) -> None:
        self._door = door
        self._connection = connection
        self._own: set[str] = set()
        self._asked: dict[str, _PendingSubscription] = {}
        self._infos: dict[str, str] = {}
        # What this door's rules let the client read; its principal's `grant` looks here.
        self.admitted: set[Channel] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._own

    @property
    def asked(self) -> int:
        """How many have not been answered."""
        return len(self._asked)

    def info(self, name: str) -> str:
        """What the application signed about this client in this channel; it outlasts the
        subscription."""
        return self._infos.get(name, "")

    # ---- commands -------------------------------------------------------------------------------

    def subscribe(self, slot: ReplySlot) -> bool:
        """False where another one must be answered first."""
        wanted = codec.subscribe(slot.command.params)
        if not wanted.channel:
            raise FatalError(codec.INVALID_MESSAGE)
        settings, connection = self._door.settings, self._connection
        count = len(self._own) + len(self._asked)
        if self._asked and (
            wanted.channel in self._asked or count >= settings.client_channel_limit
        ):
            # It may be refused yet, and then this one is not.
            return False
        error = channels.refusal(
            settings, wanted, user=connection.user, client=connection.client, own=self._own
        )
        if error is None:
            try:
                self._ask(slot, parse_channel(wanted.channel), wanted)
            except ValueError:
                # No stream can have this name.
                error = codec.INVALID_MESSAGE
        if error is not None:
            body = codec.subscribe_body(wanted.channel, status=False)
            connection.reply(slot, body, error, codec.FIX)
        return True

    def _ask(self, slot: ReplySlot, channel: Channel, wanted: codec.SubscribeParams) -> None:
        rules = None
        if not channels.is_foreign(channel):
            rules = self._door.names.rules(channel)
            self.admitted.add(channel)
        if self._door.names.is_private(channel) and wanted.info and is_json(wanted.info.encode()):
            self._infos[channel] = wanted.info
        asked = self._asked[channel] = _PendingSubscription(slot, wanted, rules)
        if rules is not None and rules.recover and wanted.recover:
            self._connection.later(self._recover(channel, asked, rules))
        else:
            self._connection.pending += 1
            self._join(channel, asked)

    async def _recover(
        self, channel: Channel, asked: _PendingSubscription, rules: CentrifugoNamespace
    ) -> None:
        asked.snapshot = await self._door.context.history(channel, history.wanted(rules))
        missed = history.missed(asked.snapshot, rules, asked.wanted.last, self._door.clock())
        await encoders.encode_messages(missed.events)
        self._join(channel, asked)

    def _join(self, channel: Channel, asked: _PendingSubscription) -> None:
        context, session = self._door.context, self._connection.session
        if session is None or self._connection.closed:
            return
        if not context.is_connected():
            raise FatalError(codec.INTERNAL_ERROR, reconnect=True)
        position = None if asked.snapshot is None else history.position(asked.snapshot)
        context.subscribe(session, channel, position)

    def unsubscribe(self, slot: ReplySlot) -> bool:
        """What is not subscribed to is unsubscribed from too, if its namespace is known."""
        name = codec.channel_of(slot.command.params)
        if not name:
            raise FatalError(codec.INVALID_MESSAGE)
        error, own, session = "", name in self._own, self._connection.session
        if self._door.names.rules(name) is None and not (own and channels.is_foreign(name)):
            # Also where the namespace was removed meanwhile: the subscription stays, as in v1.
            error = codec.NAMESPACE_NOT_FOUND
        elif own and session is not None:
            self._door.context.hub.unsubscribe(session, Channel(name))
            self._left(Channel(name))
        body = codec.status_body(name, status=not error)
        self._connection.reply(slot, body, error, codec.FIX if error else "")
        return True

    # ---- from the hub ---------------------------------------------------------------------------

    def stands(self, subscription: Subscription) -> None:
        """The hub has placed it: the reply leaves, and what follows it."""
        channel, session = subscription.feed.channel, subscription.session
        asked = self._asked.pop(channel)
        self._own.add(channel)
        self._door.stats.count("client_num_subscribe", "node_num_add_client_sub")
        # Over Redis and back: the client has its reply before it is told of itself.
        self._door.presence.joined(channel, *self._who(channel))
        rules = asked.rules
        last, messages, recovered = "", None, False
        if rules is not None and rules.recover:
            last = str(subscription.position.id)
        if rules is not None and asked.snapshot is not None:
            found = history.missed(asked.snapshot, rules, asked.wanted.last, self._door.clock())
            messages, recovered = visible(session, found.events), found.recovered
        body = codec.subscribe_body(
            channel, status=True, last=last, messages=messages, recovered=recovered
        )
        self._connection.answer(asked.slot, body, holds=True)

    def refused(self, channel: Channel, error: RelayError) -> None:
        """Its sources of rights did not open it, or nobody can say now."""
        asked = self._asked.pop(channel, None)
        self.admitted.discard(channel)
        if asked is None:
            return
        if not isinstance(error, Forbidden):
            raise FatalError(codec.INTERNAL_ERROR, reconnect=True)
        self._refuse(channel, asked)

    def _refuse(self, channel: Channel, asked: _PendingSubscription) -> None:
        # Of another door's channel a client learns no more than of one that does not exist.
        foreign = channels.is_foreign(channel)
        text = codec.NAMESPACE_NOT_FOUND if foreign else codec.PERMISSION_DENIED
        body = codec.subscribe_body(channel, status=False)
        self._connection.answer(asked.slot, body, text, codec.FIX)

    def dropped(self, channel: Channel) -> None:
        """The server has ended it; the client has been told."""
        asked = self._asked.pop(channel, None)
        if asked is not None:
            self.admitted.discard(channel)
            self._refuse(channel, asked)
        elif channel in self._own:
            self._left(channel)

    def end(self) -> None:
        """The client is gone."""
        self._asked.clear()
        for name in list(self._own):
            self._left(Channel(name))

    def _left(self, channel: Channel) -> None:
        self._own.remove(channel)
        self._door.stats.count("node_num_remove_client_sub")
        self.admitted.discard(channel)
        self._door.presence.left(channel, *self._who(channel))
        self._door.publisher.unsubscribed(channel)

    async def introduce_in(self, wanted: Callable[[Channel], bool]) -> None:
        """Add the client to the presence of those of its channels that are `wanted`."""
        async for name in in_slices(map(Channel, list(self._own))):
            # It may have been unsubscribed from in the meantime.
            if name in self._own and wanted(name):
                self._door.presence.changed(name, *self._who(name))

    def introduce(self) -> None:
        """The client has another info."""
        for name in self._own:
            self._door.presence.changed(Channel(name), *self._who(Channel(name)))

    def _who(self, channel: Channel) -> tuple[str, bytes]:
        return self._connection.client, self._connection.info(channel)


def visible(session: Session, events: Iterable[Event]) -> list[bytes]:
    """Those that are for this client, as history has them."""
    return [
        encoders.message(event)
        for event in events
        if event.to is None or not event.to.isdisjoint(session.selectors)
    ]
