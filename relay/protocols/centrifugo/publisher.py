"""Publishing to Centrifugo channels, for clients and the API.

Two options are implemented here:

- `watch`: publications are also sent to administrators, on any worker.
- `history_drop_inactive`: publications to a channel without subscribers and without history are not
  appended, unless the last subscriber has left less than `history_lifetime` seconds ago.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Unpack

from relay.core.errors import RelayError
from relay.core.model import Channel, EntryID, Event, EventFields
from relay.protocols.centrifugo import codec, history
from relay.stream.format.json_text import is_json

if TYPE_CHECKING:
    from relay.core.durability import Durability
    from relay.doorkit.contract import DoorContext
    from relay.protocols.centrifugo.settings import CentrifugoNamespace
    from relay.protocols.centrifugo.stats import Stats

_log = logging.getLogger(__name__)

Appended = asyncio.Future[EntryID | None]

# Channel of publications for administrators. They are limited to a protocol name that no client
# has, so that other subscribers of this channel do not receive them.
WATCH = Channel("relay.centrifugo.watch")
WATCHERS = "centrifugo admin"


class ChannelPublisher:
    """Publishes events according to the rules of their channels."""

    def __init__(
        self,
        context: DoorContext,
        rules: Callable[[str], CentrifugoNamespace | None],
        redis_time: Callable[[], float],
        stats: Stats,
    ) -> None:
        """`rules` returns a channel's rules, or None if its namespace is unknown.

        `redis_time` returns the time of Redis in seconds since the epoch.
        """
        self._context = context
        self._rules = rules
        self._redis_time = redis_time
        self._stats = stats
        # Channels that clients have left in this turn of the loop, with their lifetime in seconds.
        self._left: dict[Channel, int] = {}
        # Publications that wait until it is known whether their channel is active.
        self._waiting: dict[Channel, list[tuple[Callable[[], Appended], Appended]]] = {}

    def publish(
        self,
        channel: Channel,
        data: bytes,
        *,
        durability: Durability | None = None,
        **fields: Unpack[EventFields],
    ) -> Appended:
        """Publish an event. The result is the entry's ID, or None if the channel is inactive.

        Errors are those of `DoorContext.publish`. They are raised here or set on the future.
        """
        self._stats.count("node_num_client_msg_published")
        rules = self._rules(channel)
        if rules is None or not (rules.history_drop_inactive and rules.has_history):
            return self._append(rules, channel, data, durability, **fields)
        answer: Appended = asyncio.get_running_loop().create_future()
        waiting = self._waiting.get(channel)
        if waiting is None:
            waiting = self._waiting[channel] = []
            _ = self._context.spawn(
                self._publish_if_active(channel, rules), name=f"publish {channel}"
            )
        publish = partial(self._append, rules, channel, data, durability, **fields)
        # It runs in another task, and belongs to the trace of this request.
        waiting.append((partial(copy_context().run, publish), answer))
        return answer

    def _append(
        self,
        rules: CentrifugoNamespace | None,
        channel: Channel,
        data: bytes,
        durability: Durability | None,
        **fields: Unpack[EventFields],
    ) -> Appended:
        appended: Appended = self._context.publish(  # type: ignore[assignment]  # it is wider
            channel, data, durability=durability, **fields
        )
        if rules is not None and rules.watch:

            def push_to_watchers(done: Appended) -> None:
                if done.cancelled() or done.exception() is not None:
                    return
                event = Event(channel, done.result(), data, is_json(data))
                event.client, event.info = fields.get("client"), fields.get("info")
                push = Event(WATCH, None, codec.message(event), is_json=False, door=WATCHERS)
                self._context.publish_ephemeral(push)
                self._stats.count("node_num_admin_msg_published")

            appended.add_done_callback(push_to_watchers)
        return appended

    async def _publish_if_active(self, channel: Channel, rules: CentrifugoNamespace) -> None:
        # Publications that arrive in the meantime wait too, to keep their order.
        while waiting := self._waiting[channel]:
            self._waiting[channel] = []
            error: RelayError | None = None
            active = False
            try:
                active = await self._is_active(channel, rules)
            except RelayError as exc:
                error = exc
            for publish, answer in waiting:
                if answer.done():
                    continue
                if error is not None:
                    answer.set_exception(error)
                elif not active:
                    answer.set_result(None)
                else:
                    _forward(publish, answer)
        del self._waiting[channel]

    async def _is_active(self, channel: Channel, rules: CentrifugoNamespace) -> bool:
        if await self._context.active.is_followed(channel):
            return True
        if await self._context.store.get(_left_key(channel)) is not None:
            return True
        snapshot = await self._context.history(channel, 1)
        return bool(history.retained(snapshot, rules, self._redis_time()))

    def on_unsubscribed(self, channel: Channel) -> None:
        """Keep the channel active for `history_lifetime` seconds after a client has left."""
        rules = self._rules(channel)
        if rules is None or not (rules.history_drop_inactive and rules.has_history):
            return
        if not self._left:
            _ = self._context.spawn(self._mark_left(), name="centrifugo left channels")
        self._left[channel] = rules.history_lifetime

    async def _mark_left(self) -> None:
        # One task handles all clients that leave in this turn.
        await asyncio.sleep(0)
        left, self._left = self._left, {}
        for lifetime in set(left.values()):
            names = [_left_key(channel) for channel, each in left.items() if each == lifetime]
            try:
                await self._context.store.put_many(dict.fromkeys(names, b""), lifetime)
            except RelayError as exc:
                _log.debug("Could not mark %d channels as recently active: %s", len(names), exc)


def _left_key(channel: Channel) -> str:
    return f"centrifugo:touched:{channel}"


def _forward(publish: Callable[[], Appended], answer: Appended) -> None:
    try:
        appended = publish()
    except (RelayError, ValueError) as exc:
        answer.set_exception(exc)
        return

    def done(finished: Appended) -> None:
        if answer.done():
            return
        if finished.cancelled():
            answer.cancel()
            return
        exc = finished.exception()
        if exc is None:
            answer.set_result(finished.result())
        else:
            answer.set_exception(exc)

    appended.add_done_callback(done)
