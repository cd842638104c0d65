"""Events straight to Redis: one connection, kept from event to event, opened again when lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from producers.outgoing import Away, Outcome, Outgoing, Postponed, Refused
from relay.config.settings import RedisSettings
from relay.core.errors import RedisUnavailable
from relay.core.model import EntryID
from relay.stream.connection.connect import CommandRefused, discover
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.connection.refusals import TEMPORARY_CODES
from relay.stream.connection.scripts import APPEND_ONCE, load
from relay.stream.format.keys import Keys
from relay.stream.write.append_once import Appender, Entry


class DirectSender:
    """A `Sender` over Redis; needs the `producer` rights of docs/redis.md and no more.

    With `load_script` the rights of the user `relay`, who may not EVAL, do as well.
    """

    def __init__(
        self,
        settings: RedisSettings,
        *,
        window_s: int,
        maxlen: int = 0,
        load_script: bool = False,
    ) -> None:
        # The caller's own limit is over all waits together, and ends first.
        self._settings = settings.model_copy(
            update={"connect_timeout_s": 60.0, "command_timeout_s": 300.0}
        )
        self._keys = Keys(settings.prefix)
        self._window_s = window_s
        self._maxlen = maxlen
        self._load_script = load_script
        self._link: PipelineConnection | None = None
        self._appender: Appender | None = None
        self._opening = asyncio.Lock()

    async def send(self, events: Sequence[Outgoing], leaving: Callable[[], None]) -> list[Outcome]:
        """Append in order, in one pipeline."""
        entries = [Entry(each.channel, each.fields(), each.uid) for each in events]
        try:
            appender = await self._connected()
        except RedisUnavailable as exc:
            raise Away(str(exc)) from exc
        link = self._link
        leaving()
        try:
            replies = await appender.append(entries)
        except RedisUnavailable as exc:
            self._drop(link)
            raise Away(str(exc), sent=True) from exc
        except asyncio.CancelledError:
            # Nobody knows when this connection answers again: the next event takes a new one.
            self._drop(link)
            raise
        return [_outcome(reply) for reply in replies]

    async def close(self) -> None:
        """Give up the connection."""
        self._drop(self._link)

    async def _connected(self) -> Appender:
        async with self._opening:
            if self._appender is None:
                endpoint = await discover(self._settings)
                self._link = link = await PipelineConnection.open(
                    endpoint,
                    settings=self._settings,
                    on_lost=lambda _: self._drop(link),
                    name="relay-producer",
                    check_primary=False,
                )
                loaded = False
                if self._load_script:
                    with contextlib.suppress(CommandRefused):
                        await load(link, APPEND_ONCE)
                        loaded = True
                self._appender = Appender(
                    link, self._keys, window_s=self._window_s, maxlen=self._maxlen, loaded=loaded
                )
            return self._appender

    def _drop(self, link: PipelineConnection | None) -> None:
        if link is not None and link is self._link:
            self._link = self._appender = None
            link.close()


def _outcome(reply: EntryID | CommandRefused) -> Outcome:
    if isinstance(reply, EntryID):
        return reply
    reason = str(reply)
    # A user who may not run scripts is the fault of no event, and would empty a spool of thousands.
    # A key that is not allowed may be that of this event alone.
    unusable = reply.code == "NOSCRIPT" or (reply.code == "NOPERM" and " to run " in reason)
    return Postponed(reason) if unusable or reply.code in TEMPORARY_CODES else Refused(reason)
