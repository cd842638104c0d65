"""What is published to Centrifugo channels, by clients and by the API, on its way to the stream.

Two options see it there. `watch`: administrators are shown it, on whichever worker they are.
`history_drop_inactive`: to a channel that nobody is subscribed to and that has no history it is not
appended at all; unless the last subscriber left less than `history_lifetime` ago.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from relay.core.errors import RelayError
from relay.core.json_text import is_json
from relay.core.model import Channel, EntryID, Event
from relay.protocols.centrifugo import codec, history

if TYPE_CHECKING:
    from relay.doorkit.contract import DoorContext
    from relay.protocols.centrifugo.settings import CentrifugoNamespace
    from relay.protocols.centrifugo.stats import Stats

_log = logging.getLogger(__name__)

Appended = asyncio.Future[EntryID | None]

# What administrators watch travels here. No door's clients have this one's name, so that nobody
# else is given any of it, whoever subscribes.
WATCH = Channel("relay.centrifugo.watch")
WATCHERS = "centrifugo admin"


class ChannelPublisher:
    """`rules` are a channel's, None where its namespace is unknown; `clock` is seconds since the
    epoch."""

    def __init__(
        self,
        context: DoorContext,
        rules: Callable[[str], CentrifugoNamespace | None],
        clock: Callable[[], float],
        stats: Stats,
    ) -> None:
        self._context = context
        self._rules = rules
        self._clock = clock
        self._stats = stats
        # Channels that a client has just left, with their lifetime in seconds.
        self._left: dict[Channel, int] = {}
        # By channel: what waits until it is known whether anybody would read it.
        self._waiting: dict[Channel, list[tuple[Callable[[], Appended], Appended]]] = {}

    def publish(
        self,
        channel: Channel,
        data: bytes,
        *,
        client: str | None = None,
        uid: str | None = None,
        type: str | None = None,
        to: Iterable[str] | None = None,
        info: bytes | None = None,
    ) -> Appended:
        """The entry's ID, None where the channel is inactive; errors as of `DoorContext.publish`,
        of which some may come later."""
        publish = partial(
            self._append,
            channel,
            data,
            client=client,
            uid=uid,
            type=type,
            to=None if to is None else tuple(to),
            info=info,
        )
        self._stats.count("node_num_client_msg_published")
        rules = self._rules(channel)
        if rules is None or not (rules.history_drop_inactive and rules.has_history):
            return publish()
        answer: Appended = asyncio.get_running_loop().create_future()
        waiting = self._waiting.get(channel)
        if waiting is None:
            waiting = self._waiting[channel] = []
            _ = self._context.spawn(self._if_active(channel, rules), name=f"publish {channel}")
        waiting.append((publish, answer))
        return answer

    def _append(
        self,
        channel: Channel,
        data: bytes,
        *,
        client: str | None,
        uid: str | None,
        type: str | None,
        to: Iterable[str] | None,
        info: bytes | None,
    ) -> Appended:
        appended: Appended = self._context.publish(  # type: ignore[assignment]  # it is wider
            channel, data, client=client, uid=uid, type=type, to=to, info=info
        )
        rules = self._rules(channel)
        if rules is not None and rules.watch:

            def show(done: Appended) -> None:
                if done.cancelled() or done.exception() is not None:
                    return
                event = Event(channel, done.result(), data, is_json(data))
                event.client, event.info = client, info
                shown = Event(WATCH, None, codec.message(event), is_json=False, door=WATCHERS)
                self._context.whisper(shown)
                self._stats.count("node_num_admin_msg_published")

            appended.add_done_callback(show)
        return appended

    async def _if_active(self, channel: Channel, rules: CentrifugoNamespace) -> None:
        # Those that come meanwhile wait too: so their order stays.
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
                    _pass_on(publish, answer)
        del self._waiting[channel]

    async def _is_active(self, channel: Channel, rules: CentrifugoNamespace) -> bool:
        if await self._context.active.is_followed(channel):
            return True
        if await self._context.store.get(_touched(channel)) is not None:
            return True
        snapshot = await self._context.history(channel, 1)
        return bool(history.kept(snapshot, rules, self._clock()))

    def unsubscribed(self, channel: Channel) -> None:
        """A client has left: what is published from now on is kept for a while even if nobody
        else is there."""
        rules = self._rules(channel)
        if rules is None or not (rules.history_drop_inactive and rules.has_history):
            return
        if not self._left:
            _ = self._context.spawn(self._touch(), name="centrifugo touch")
        self._left[channel] = rules.history_lifetime

    async def _touch(self) -> None:
        # So that one task serves all who leave in one turn.
        await asyncio.sleep(0)
        left, self._left = self._left, {}
        for lifetime in set(left.values()):
            names = [_touched(channel) for channel, each in left.items() if each == lifetime]
            try:
                await self._context.store.put_many(dict.fromkeys(names, b""), lifetime)
            except RelayError as exc:
                _log.debug("%d channels without subscribers are not noted: %s", len(names), exc)


def _touched(channel: Channel) -> str:
    return f"centrifugo:touched:{channel}"


def _pass_on(publish: Callable[[], Appended], answer: Appended) -> None:
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
