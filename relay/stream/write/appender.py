"""Batch the appends of a relay process: those of one event loop iteration share one pipeline."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from relay.core.durability import FAST, Durability
from relay.core.errors import (
    DurabilityUnavailable,
    RedisUnavailable,
    RelayError,
    Unavailable,
)
from relay.core.model import Channel, EntryID
from relay.stream.connection import scripts
from relay.stream.connection.connect import CommandRefused, discover
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.connection.refusals import Effect, Refusals, rule_of
from relay.stream.write.append import (
    APPEND_CHANGED,
    APPEND_ONCE,
    Append,
    AppendCommands,
    confirming_commands,
    is_missing_script,
    parse_reply,
)
from relay.stream.write.confirmations import parse_confirmations, unconfirmable

if TYPE_CHECKING:
    from relay.config.settings import NamespaceSettings, PublishSettings, RedisSettings
    from relay.stream.connection.pipeline_connection import RedisCommand
    from relay.stream.format.keys import Keys

_log = logging.getLogger(__name__)

_MAX_WAITING = 100_000
_BATCH = 1000
_PAUSE_S = 0.05
_STOPPING = "the relay is stopping"
_TOO_MANY = "too many appends are waiting for Redis"
# Name of an area in `Refusals`.
PUBLISHING = "publishing"
UIDS = "publishing with a uid"


class _PendingAppend:
    __slots__ = ("append", "future", "may_repeat")

    def __init__(self, append: Append, future: asyncio.Future[EntryID]) -> None:
        self.append = append
        self.future = future
        self.may_repeat = append.script is not None


class Appender:
    """Appends entries for all producers of this process. `run` must be running.

    Each append ends with the ID of its entry or with an error within the time limits of
    `[publish]`. An append with a uid is repeated once if its connection was lost. Without a uid the
    append is not repeated, because it may have been carried out.
    """

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
        self._commands = AppendCommands(keys, namespace_of, uid_window_s=settings.uid_window_s)
        limits = {
            "connect_timeout_s": min(redis.connect_timeout_s, settings.timeout_s),
            "command_timeout_s": settings.timeout_s,
        }
        limited = redis.model_copy(update=limits)
        self._lanes = _Lanes(limited, refusals)

    async def run(self) -> None:
        """Send appends until cancelled. Reconnect after every error of Redis."""
        await self._lanes.run()

    def append(
        self,
        channel: Channel,
        fields: Sequence[bytes],
        uid: str | None = None,
        *,
        unless_latest: bytes | None = None,
        durability: Durability | None = None,
    ) -> asyncio.Future[EntryID]:
        """Append an entry and return its ID; for the arguments see `AppendCommands.build`.

        Appends to one channel are carried out in the order of the calls.

        Raises:
            Unavailable: Too many appends are waiting. Raised at once, as is LimitExceeded.
            RedisUnavailable: The entry may have been appended.
            CommandRefused: Redis rejected the entry.
            NotDurable: The entry was appended, but its durability was not confirmed in time.
            DurabilityUnavailable: Redis cannot confirm the durability. Nothing was appended.
        """
        append = self._commands.build(
            channel, fields, uid, unless_latest=unless_latest, durability=durability
        )
        usual = append.durability if durability is None else self._commands.durability(channel)
        return self._lanes.add(channel, append, usual)


class _Lanes:
    """Connections to one Redis: one for each level of durability, because WAIT blocks its own.

    The appends to one channel are carried out in the order of the calls, although requests may
    choose another durability than their namespace: while the channel has appends that wait for
    confirmations, all its appends use the lane of those. An append that leaves the fast lane is
    held until everything that is in that lane has been appended.
    """

    def __init__(self, redis: RedisSettings, refusals: Refusals) -> None:
        self._fast = _Lane(redis, refusals)
        self._slow = {level: _Lane(redis, refusals) for level in ("replicated", "fsynced")}
        # Channels with pending appends in a slow lane: the lane and their number.
        self._pending: dict[Channel, tuple[_Lane, int]] = {}
        # Appends in their order: the last append of the fast lane, the lane to use after it.
        self._held: deque[tuple[asyncio.Future[EntryID], _Lane, _PendingAppend]] = deque()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._fast.run(), name="appends")
            for level, lane in self._slow.items():
                tasks.create_task(lane.run(), name=f"{level} appends")

    def add(self, channel: Channel, append: Append, usual: Durability) -> asyncio.Future[EntryID]:
        """Add an append. `usual` is the durability of the channel's namespace."""
        level = append.durability.level if append.durability.waits else usual.level
        if level == FAST.level and channel not in self._pending:
            return self._fast.add(append)
        lane, count = self._pending.get(channel) or (self._slow[level], 0)
        after = None if usual.waits or count else self._fast.last
        if after is None or after.done():
            after = self._held[-1][0] if self._held else None
        if after is None:
            future = lane.add(append)
        else:
            if len(self._held) >= _MAX_WAITING:
                raise Unavailable(_TOO_MANY)
            future = asyncio.get_running_loop().create_future()
            self._held.append((after, lane, _PendingAppend(append, future)))
            after.add_done_callback(self._release)
        self._pending[channel] = lane, count + 1
        future.add_done_callback(partial(self._ended, channel))
        return future

    def _release(self, _: object) -> None:
        while self._held and self._held[0][0].done():
            _, lane, pending = self._held.popleft()
            lane.put(pending)

    def _ended(self, channel: Channel, _: object) -> None:
        lane, count = self._pending.pop(channel)
        if count > 1:
            self._pending[channel] = lane, count - 1


class _Lane:
    """One connection and the appends that wait for it."""

    def __init__(self, redis: RedisSettings, refusals: Refusals) -> None:
        self._redis = redis
        self._refusals = refusals
        # Below the timeout of the connection, so that the number of replicas is received.
        self._wait_ms = int(redis.command_timeout_s * 800)
        self._connection: PipelineConnection | None = None
        # The reply if Redis has rejected the scripts for appends with a uid.
        self._scripts_refused: CommandRefused | None = None
        # The levels of durability that this connection can confirm.
        self._confirmable: set[str] = {FAST.level}
        # The append that was added last.
        self.last: asyncio.Future[EntryID] | None = None
        self._waiting: list[_PendingAppend] = []
        self._in_flight = 0
        self._stopped = False
        self._work = asyncio.Event()

    def add(self, append: Append) -> asyncio.Future[EntryID]:
        """Add an append to the next pipeline."""
        if self._stopped:
            raise Unavailable(_STOPPING)
        if len(self._waiting) + self._in_flight >= _MAX_WAITING:
            raise Unavailable(_TOO_MANY)
        future: asyncio.Future[EntryID] = asyncio.get_running_loop().create_future()
        self.put(_PendingAppend(append, future))
        return future

    def put(self, pending: _PendingAppend) -> None:
        """Add an append that has been accepted. Its future fails if this lane has stopped."""
        if self._stopped:
            _fail(pending, Unavailable(_STOPPING))
            return
        self.last = pending.future
        self._waiting.append(pending)
        self._work.set()

    async def run(self) -> None:
        """Send what is waiting. Runs until cancelled."""
        try:
            while True:
                await self._work.wait()
                try:
                    connection = self._connection or await self._connect()
                except (RedisUnavailable, CommandRefused) as exc:
                    if isinstance(exc, CommandRefused):
                        self._refusals.refused(PUBLISHING, exc.reply)
                    waiting, self._waiting = self._waiting, []
                    self._work.clear()
                    for pending in waiting:
                        _fail(pending, exc)
                    await asyncio.sleep(_PAUSE_S)
                    continue
                batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
                if not self._waiting:
                    self._work.clear()
                try:
                    if self._scripts_refused is not None:
                        batch = await self._without_scripts(connection, batch)
                    batch = await self._confirmable_only(connection, batch)
                except RedisUnavailable as exc:
                    self._repeat(batch, exc)
                    continue
                if batch:
                    self._send(connection, batch)
                # Appends of the next loop iteration go into the next pipeline.
                await asyncio.sleep(0)
        finally:
            self._stopped = True
            if self._connection is not None:
                self._connection.close()
            for pending in self._waiting:
                _fail(pending, RedisUnavailable(_STOPPING))

    async def _connect(self) -> PipelineConnection:
        def on_lost(exc: Exception | None) -> None:
            self._connection = None
            if exc is not None:
                _log.warning("Redis: %s", exc)

        connection = await PipelineConnection.open(
            await discover(self._redis), settings=self._redis, on_lost=on_lost
        )
        try:
            await self._load_scripts(connection)
        except BaseException:
            connection.close()
            raise
        self._confirmable = {FAST.level}
        self._connection = connection
        return connection

    async def _load_scripts(self, connection: PipelineConnection) -> None:
        self._scripts_refused = None
        try:
            await scripts.load(connection, APPEND_ONCE, APPEND_CHANGED)
        except CommandRefused as exc:
            if rule_of(exc.reply).effect is not Effect.NO_RIGHT:
                raise
            self._scripts_refused = exc
            self._refusals.refused(UIDS, exc.reply)
        else:
            self._refusals.accepted(UIDS)

    async def _without_scripts(
        self, connection: PipelineConnection, batch: list[_PendingAppend]
    ) -> list[_PendingAppend]:
        """Try to load the scripts again. If Redis still rejects them, fail the appends with one.

        Return the others.
        """
        if any(pending.append.script for pending in batch):
            await self._load_scripts(connection)
        refused = self._scripts_refused
        if refused is None:
            return batch
        for pending in batch:
            if pending.append.script:
                _fail(pending, refused)
        return [pending for pending in batch if not pending.append.script]

    async def _confirmable_only(
        self, connection: PipelineConnection, batch: list[_PendingAppend]
    ) -> list[_PendingAppend]:
        """Fail the appends whose durability this server cannot confirm. Return the others.

        The server is asked once per connection, and again while it rejects the command.
        """
        levels = {pending.append.durability.level for pending in batch} - self._confirmable
        for level in levels:
            problem = await unconfirmable(connection, level)
            if not problem:
                self._confirmable.add(level)
                continue
            for pending in batch:
                if pending.append.durability.level == level:
                    _fail(pending, DurabilityUnavailable(f"{problem}. Nothing was appended"))
            batch = [each for each in batch if each.append.durability.level != level]
        return batch

    def _send(self, connection: PipelineConnection, batch: list[_PendingAppend]) -> None:
        appends = [pending.append for pending in batch]
        commands = [append.command for append in appends]
        waits = confirming_commands(appends, self._wait_ms)
        self._in_flight += len(batch)
        future = cast("asyncio.Future[list[object]]", connection.execute([*commands, *waits]))

        def done(executed: asyncio.Future[list[object]]) -> None:
            self._in_flight -= len(batch)
            if executed.cancelled():
                return
            exc = executed.exception()
            if exc is None:
                self._on_replies(batch, executed.result(), waits)
            else:
                self._repeat(batch, exc)

        future.add_done_callback(done)

    def _repeat(self, batch: list[_PendingAppend], exc: BaseException) -> None:
        """Send the appends again that may be repeated. Fail the others."""
        again = []
        for pending in batch:
            if pending.may_repeat and not pending.future.done() and not self._stopped:
                pending.may_repeat = False
                again.append(pending)
            else:
                _fail(pending, exc)
        if again:
            self._waiting[:0] = again
            self._work.set()

    def _on_replies(
        self,
        batch: list[_PendingAppend],
        replies: list[object],
        waits: Sequence[RedisCommand],
    ) -> None:
        confirmed = parse_confirmations(waits, replies[len(batch) :], self._wait_ms)
        for pending, reply in zip(batch, replies, strict=False):
            if pending.future.done():  # the caller was cancelled
                continue
            area = UIDS if pending.append.script else PUBLISHING
            if isinstance(reply, bytes):
                if self._refusals.has(area):
                    self._refusals.accepted(area)
            elif is_missing_script(reply):
                # SCRIPT FLUSH was called. The next connection loads the scripts again.
                self._repeat([pending], RedisUnavailable("the script was removed from Redis"))
                if self._connection is not None:
                    self._connection.close()
                continue
            elif rule_of(str(reply)).effect is not Effect.ONE:
                # A key of another type concerns one channel, and its publisher gets the error.
                self._refusals.refused(area, str(reply))
            result = parse_reply(pending.append, reply, confirmed)
            if isinstance(result, EntryID):
                pending.future.set_result(result)
            else:
                pending.future.set_exception(result)


def _fail(pending: _PendingAppend, exc: BaseException) -> None:
    if not pending.future.done():
        error = exc if isinstance(exc, RelayError) else RedisUnavailable(str(exc))
        pending.future.set_exception(error)
