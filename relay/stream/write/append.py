"""Appends of all producers in this process: those of one loop turn leave in one pipeline.

Whoever awaits an append gets its entry's ID, or an error within the limits of `[publish]`: success
is never said without the ID. With a uid the append is idempotent within the configured window and
is tried once more where the connection broke; without one nobody could know whether it happened.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import hiredis

from relay.core.errors import (
    LimitExceeded,
    NotReplicated,
    RedisUnavailable,
    RelayError,
    Unavailable,
)
from relay.core.model import RESERVED_NAMESPACES, Channel, EntryID, namespace_of
from relay.stream.connection import scripts
from relay.stream.connection.connect import CommandRefused, RefusedForNow, discover
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.connection.refusals import TEMPORARY_CODES, Effect, Refusals, code_of, rule_of

if TYPE_CHECKING:
    from relay.config.settings import NamespaceSettings, PublishSettings, RedisSettings
    from relay.stream.connection.pipeline_connection import RedisCommand
    from relay.stream.format.keys import Keys

_log = logging.getLogger(__name__)

UID_BYTES = 255
_WAITING = 100_000
_BATCH = 1000
_PAUSE_S = 0.05
# Name of an area in `Refusals`.
PUBLISHING = "publishing"


class _Append:
    __slots__ = ("command", "future", "once_more", "replicas")

    def __init__(
        self,
        command: RedisCommand,
        future: asyncio.Future[EntryID],
        replicas: int,
        once_more: bool,
    ) -> None:
        self.command = command
        self.future = future
        self.replicas = replicas
        self.once_more = once_more


class Appender:
    """The one way into streams for producers in this process; `run` must be running."""

    def __init__(
        self,
        *,
        keys: Keys,
        redis: RedisSettings,
        settings: PublishSettings,
        namespace_of: Callable[[Channel], NamespaceSettings],
        refusals: Refusals | None = None,
    ) -> None:
        refusals = refusals or Refusals()
        self._keys = keys
        self._namespace_of = namespace_of
        self._window_ms = int(settings.uid_window_s * 1000)
        limits = {
            "connect_timeout_s": min(redis.connect_timeout_s, settings.timeout_s),
            "command_timeout_s": settings.timeout_s,
        }
        limited = redis.model_copy(update=limits)
        self._plain = _Lane(limited, refusals)
        # WAIT blocks its connection, and counts what that connection wrote.
        self._replicated = _Lane(limited, refusals)

    async def run(self) -> None:
        """Until cancelled; survives everything that Redis does."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._plain.run(), name="appends")
            tasks.create_task(self._replicated.run(), name="replicated appends")

    def append(
        self,
        channel: Channel,
        fields: Sequence[bytes],
        uid: str | None = None,
        *,
        unless_latest: bytes | None = None,
    ) -> asyncio.Future[EntryID]:
        """The ID of the entry with these fields, at the end of the channel's stream.

        With `unless_latest`, the name of one of the fields, nothing is appended where the newest
        entry of this one's type has the same value in it: that one's ID is the answer then. A uid
        is only a field beside that.

        Appends to one channel happen in the order of the calls. Errors: RedisUnavailable (it may
        or may not have happened), CommandRefused (it has not), NotReplicated (it has, here),
        Unavailable (too many are waiting), LimitExceeded (the uid is too long).
        """
        rules = self._namespace_of(channel)
        words: list[bytes | str | int] = []
        if rules.retention_count:
            words += "MAXLEN", "~", rules.retention_count
        words.append("*")
        words += fields
        key = self._keys.stream(channel)
        # In channels of one protocol the uid is the relay's own: it makes an append repeatable.
        unique = rules.unique_uids or namespace_of(channel) in RESERVED_NAMESPACES
        once = bool(uid) and self._window_ms > 0 and unique
        if unless_latest is not None:
            values = dict(zip(fields[::2], fields[1::2], strict=True))
            same = values.get(b"type", b""), unless_latest, values[unless_latest]
            once = True
            command: RedisCommand = ("EVALSHA", scripts.APPEND_CHANGED.sha, 1, key, *same, *words)
        elif uid and once:
            if len(uid.encode(errors="replace")) > UID_BYTES:
                raise LimitExceeded(f"a uid is at most {UID_BYTES} bytes long")
            sha, uid_key = scripts.APPEND_ONCE.sha, self._keys.uid(channel, uid)
            command = ("EVALSHA", sha, 2, key, uid_key, self._window_ms, *words)
        else:
            command = ("XADD", key, *words)
        lane = self._replicated if rules.wait_replicas else self._plain
        return lane.add(command, rules.wait_replicas, once)


class _Lane:
    """One connection and what waits for it."""

    def __init__(self, redis: RedisSettings, refusals: Refusals) -> None:
        self._redis = redis
        self._refusals = refusals
        self._link: PipelineConnection | None = None
        self._waiting: list[_Append] = []
        self._in_flight = 0
        self._stopped = False
        self._work = asyncio.Event()

    def add(self, command: RedisCommand, replicas: int, once_more: bool) -> asyncio.Future[EntryID]:
        """Wait for the next pipeline."""
        if self._stopped:
            raise Unavailable("the relay is stopping")
        if len(self._waiting) + self._in_flight >= _WAITING:
            raise Unavailable("too many appends are waiting for Redis")
        future: asyncio.Future[EntryID] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Append(command, future, replicas, once_more))
        self._work.set()
        return future

    async def run(self) -> None:
        """For ever."""
        try:
            while True:
                await self._work.wait()
                try:
                    link = self._link or await self._open()
                except (RedisUnavailable, CommandRefused) as exc:
                    if isinstance(exc, CommandRefused):
                        self._refusals.refused(PUBLISHING, exc.reply)
                    waiting, self._waiting = self._waiting, []
                    self._work.clear()
                    for append in waiting:
                        _fail(append, exc)
                    await asyncio.sleep(_PAUSE_S)
                    continue
                batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
                if not self._waiting:
                    self._work.clear()
                self._send(link, batch)
                # The next turn's appends are the next pipeline.
                await asyncio.sleep(0)
        finally:
            self._stopped = True
            if self._link is not None:
                self._link.close()
            for append in self._waiting:
                _fail(append, RedisUnavailable("the relay is stopping"))

    async def _open(self) -> PipelineConnection:
        def on_lost(exc: Exception | None) -> None:
            self._link = None
            if exc is not None:
                _log.warning("Redis: %s", exc)

        link = await PipelineConnection.open(
            await discover(self._redis), settings=self._redis, on_lost=on_lost
        )
        try:
            await scripts.load(link, scripts.APPEND_ONCE, scripts.APPEND_CHANGED)
        except BaseException:
            link.close()
            raise
        self._link = link
        return link

    def _send(self, link: PipelineConnection, batch: list[_Append]) -> None:
        commands = [append.command for append in batch]
        replicas = max((append.replicas for append in batch), default=0)
        if replicas:
            # Within the link's own limit, so that the answer says how many there were.
            commands.append(("WAIT", replicas, int(self._redis.command_timeout_s * 800)))
        self._in_flight += len(batch)
        future = cast("asyncio.Future[list[object]]", link.execute(commands))

        def done(answered: asyncio.Future[list[object]]) -> None:
            self._in_flight -= len(batch)
            if answered.cancelled():
                return
            exc = answered.exception()
            if exc is None:
                self._answer(batch, answered.result())
            else:
                self._lost(batch, exc)

        future.add_done_callback(done)

    def _lost(self, batch: list[_Append], exc: BaseException) -> None:
        again = []
        for append in batch:
            if append.once_more and not append.future.done() and not self._stopped:
                append.once_more = False
                again.append(append)
            else:
                _fail(append, exc)
        if again:
            self._waiting[:0] = again
            self._work.set()

    def _answer(self, batch: list[_Append], replies: list[object]) -> None:
        confirmed = replies[-1] if len(replies) > len(batch) else 0
        for append, reply in zip(batch, replies, strict=False):
            if append.future.done():  # whoever asked has gone
                continue
            if isinstance(reply, bytes):
                if self._refusals.has(PUBLISHING):
                    self._refusals.accepted(PUBLISHING)
                entry_id = EntryID.parse(reply)
                if append.replicas and not (
                    isinstance(confirmed, int) and confirmed >= append.replicas
                ):
                    text = f"entry {entry_id}: {confirmed} of {append.replicas} replicas confirmed"
                    append.future.set_exception(NotReplicated(text))
                else:
                    append.future.set_result(entry_id)
            elif isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
                # Somebody flushed the scripts: the next connection brings them again.
                self._lost([append], RedisUnavailable("Redis has forgotten the script"))
                if self._link is not None:
                    self._link.close()
            else:
                append.future.set_exception(self._refused(str(reply)))

    def _refused(self, reply: str) -> RelayError:
        rule = rule_of(reply)
        # A key of another type concerns one channel. Its publisher gets the error.
        if rule.effect is not Effect.ONE:
            self._refusals.refused(PUBLISHING, reply)
        if code_of(reply) in TEMPORARY_CODES:
            return RefusedForNow("XADD", reply)
        return CommandRefused("XADD", reply)


def _fail(append: _Append, exc: BaseException) -> None:
    if not append.future.done():
        error = exc if isinstance(exc, RelayError) else RedisUnavailable(str(exc))
        append.future.set_exception(error)
