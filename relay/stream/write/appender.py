"""Batch the appends of a relay process: those of one event loop iteration share one pipeline.

Each shard has its own pipelines, so that an unreachable server delays no appends to others. If a
slot of a Redis Cluster is moved, the server rejects the appends of its channels. They are sent
again, in the same order, to the server that has the slot then. New appends of these channels wait
meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

from relay.core.durability import FAST, Durability
from relay.core.errors import (
    DurabilityUnavailable,
    RedisUnavailable,
    RelayError,
    Unavailable,
)
from relay.core.model import Channel, EntryID
from relay.core.slices import next_slice
from relay.stream.connection import scripts
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import CannotServe, PipelineConnection
from relay.stream.connection.refusals import Effect, rule_of
from relay.stream.shards.making import refusals_of
from relay.stream.shards.shard import is_misplaced, slot_of
from relay.stream.write.append import (
    APPEND_BEHIND,
    APPEND_CHANGED,
    APPEND_ONCE,
    Append,
    AppendCommands,
    outcome,
    parse_reply,
)
from relay.stream.write.confirmations import Confirming, unconfirmable

if TYPE_CHECKING:
    from relay.config.settings import NamespaceSettings, PublishSettings, RedisSettings
    from relay.stream.connection.pipeline_connection import RedisCommand
    from relay.stream.connection.refusals import Refusals
    from relay.stream.format.keys import Keys
    from relay.stream.shards.shard import Shard, ShardMap

_log = logging.getLogger(__name__)

_MAX_WAITING = 100_000
_BATCH = 1000
_PAUSE_S = 0.05
_STOPPING = "the relay is stopping"
_NO_SCRIPT = "the scripts were removed from Redis; nothing was appended"
_TOO_MANY = "too many appends are waiting for Redis"
# Name of an area in `Refusals`.
PUBLISHING = "publishing"
UIDS = "publishing with a uid"


class _PendingAppend:
    """One append. `usual` is the durability of the channel's namespace."""

    __slots__ = ("append", "channel", "future", "may_repeat", "since", "usual")

    def __init__(self, channel: Channel, append: Append, usual: Durability) -> None:
        loop = asyncio.get_running_loop()
        self.channel = channel
        self.append = append
        self.usual = usual
        self.future: asyncio.Future[EntryID] = loop.create_future()
        self.may_repeat = append.script is not None
        self.since = loop.time()


_Replies = asyncio.Future[list[object]]
# Batches and the replies to them, in order.
_Sent = list[tuple[list[_PendingAppend], _Replies]]
# By durability: appends that Redis has accepted.
_Unconfirmed = dict[Durability, dict[_PendingAppend, EntryID]]


class _Moving(NamedTuple):
    """Appends of a slot that is being moved, in their order.

    Some were rejected, some had not been sent yet, and some were made later.
    """

    rejected: list[_PendingAppend]
    unsent: list[_PendingAppend]
    later: list[_PendingAppend]

    def all(self) -> list[_PendingAppend]:
        return [*self.rejected, *self.unsent, *self.later]


class Appender:
    """Appends entries for all producers of this process. `run` must be running.

    Each append ends with the ID of its entry or with an error within the time limits of
    `[publish]`. An append with a uid is repeated once if its connection was lost. Without a uid the
    append is not repeated, because it may have been carried out.
    """

    def __init__(
        self,
        *,
        shards: ShardMap,
        keys: Keys,
        redis: RedisSettings,
        settings: PublishSettings,
        namespace_of: Callable[[Channel], NamespaceSettings],
        refusals: Callable[[Shard], Refusals] | None = None,
    ) -> None:
        """`refusals` returns where those of a server are recorded."""
        self._commands = AppendCommands(keys, namespace_of, uid_window_s=settings.uid_window_s)
        self._limits = {
            "connect_timeout_s": min(redis.connect_timeout_s, settings.timeout_s),
            "command_timeout_s": settings.timeout_s,
        }
        self._shards = shards
        self._refusals = refusals or refusals_of(shards)
        self._lanes: dict[Shard, _Lanes] = {}
        self._tasks: asyncio.TaskGroup | None = None
        # By slot.
        self._moving: dict[int, _Moving] = {}

    def __len__(self) -> int:
        """Return how many appends have no reply yet."""
        moving = sum(map(len, itertools.chain.from_iterable(self._moving.values())))
        return moving + sum(map(len, self._lanes.values()))

    async def run(self) -> None:
        """Send appends until cancelled. Reconnect after every error of Redis."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for lanes in self._lanes.values():
                    tasks.create_task(lanes.run(), name="appends")
                await self._read_map()
                await asyncio.Event().wait()
        finally:
            self._tasks = None
            for lanes in self._lanes.values():
                lanes.stop()
            for moving in self._moving.values():
                for pending in moving.all():
                    _fail(pending, RedisUnavailable(_STOPPING))

    async def _read_map(self) -> None:
        while not self._shards.shards:
            try:
                await self._shards.refresh()
            except RedisUnavailable:
                await asyncio.sleep(_PAUSE_S)

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

        Appends to one channel are carried out in the order of the calls. One whose caller is
        cancelled before it was sent is not carried out.

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
        pending = _PendingAppend(channel, append, usual)
        if self._moving and (slot := slot_of(append.stream)) in self._moving:
            later = self._moving[slot].later
            if len(later) >= _MAX_WAITING:
                raise Unavailable(_TOO_MANY)
            later.append(pending)
            return pending.future
        try:
            self._lanes_of(pending).add(pending)
        except RedisUnavailable as exc:
            pending.future.set_exception(exc)
        return pending.future

    def _lanes_of(self, pending: _PendingAppend) -> _Lanes:
        shard = self._shards.shard_of(pending.append.stream)
        lanes = self._lanes.get(shard)
        if lanes is None:
            redis = shard.settings.model_copy(update=self._limits)
            refusals = self._refusals(shard)
            lanes = self._lanes[shard] = _Lanes(shard, redis, refusals, self._on_moved)
            if self._tasks is not None:
                self._tasks.create_task(lanes.run(), name=f"appends to {shard.name}")
        return lanes

    # ---- slots that are being moved ---------------------------------------------------------

    def _on_moved(self, pending: _PendingAppend, lanes: _Lanes) -> None:
        """Send an append again that the server has rejected because the slot is being moved."""
        slot = slot_of(pending.append.stream)
        if slot in self._moving:
            self._moving[slot].rejected.append(pending)
            return
        # At once: they must not be sent before those that were rejected.
        self._moving[slot] = _Moving([pending], lanes.take(slot), [])
        if self._tasks is not None:
            self._tasks.create_task(self._send_again(slot, lanes), name=f"appends of slot {slot}")

    async def _send_again(self, slot: int, lanes: _Lanes) -> None:
        # The replies to later appends of these channels have to arrive first.
        await lanes.until_answered()
        # If the connection was lost instead, some of them would be sent to the old server again.
        self._moving[slot].unsent[:0] = lanes.take(slot)
        await asyncio.sleep(_PAUSE_S)
        problem: RedisUnavailable | None = None
        try:
            await self._shards.refresh()
        except RedisUnavailable as exc:
            problem = exc
        now = asyncio.get_running_loop().time()
        for pending in self._moving.pop(slot).all():
            if pending.future.done():
                continue
            if pending.since + self._limits["command_timeout_s"] < now:
                _fail(pending, problem or RedisUnavailable("the slot is being moved"))
                continue
            try:
                self._lanes_of(pending).add(pending)
            except RelayError as exc:
                _fail(pending, exc)


class _Lanes:
    """Connections to one shard: one for each durability, because WAIT blocks its own.

    Durabilities that differ only in their time share a connection. So a publisher that asks for
    more replicas than there are does not delay the others.

    The appends to one channel are carried out in the order of the calls, although requests may
    choose another durability than their namespace: while the channel has appends that wait for
    confirmations, all its appends use the lane of those. An append that leaves the fast lane is
    held until everything that is in that lane has been appended.
    """

    def __init__(
        self,
        shard: Shard,
        redis: RedisSettings,
        refusals: Refusals,
        on_moved: Callable[[_PendingAppend, _Lanes], None],
    ) -> None:
        """`on_moved` is called, in order, with appends that belong to another shard now."""

        def moved(pending: _PendingAppend) -> None:
            on_moved(pending, self)

        self._make_lane = partial(_Lane, shard, redis, refusals, moved)
        self._fast = self._make_lane(confirms=False)
        # By level and number of replicas.
        self._slow: dict[tuple[str, int], _Lane] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._stopped = False
        # Channels with pending appends in a slow lane: the lane and their number.
        self._pending: dict[Channel, tuple[_Lane, int]] = {}
        # Appends in their order: the last append of the fast lane, the lane to use after it.
        self._held: deque[tuple[asyncio.Future[EntryID], _Lane, _PendingAppend]] = deque()

    def __len__(self) -> int:
        return len(self._held) + sum(map(len, (self._fast, *self._slow.values())))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for (level, _), lane in self._slow.items():
                tasks.create_task(lane.run(), name=f"{level} appends")
            await self._fast.run()

    def stop(self) -> None:
        """Fail all appends and reject later ones."""
        self._stopped = True
        for lane in (self._fast, *self._slow.values()):
            lane.stop()

    def take(self, slot: int) -> list[_PendingAppend]:
        """Remove and return the appends of this slot that are not sent yet."""
        lanes = (self._fast, *self._slow.values())
        taken = [pending for lane in lanes for pending in lane.take(slot)]
        held, self._held = self._held, deque()
        for each in held:
            if slot_of(each[-1].append.stream) == slot:
                taken.append(each[-1])
            else:
                self._held.append(each)
        return taken

    async def until_answered(self) -> None:
        """Wait for the replies to everything that has been sent until now."""
        for lane in (self._fast, *self._slow.values()):
            await lane.until_answered()

    def _slow_lane(self, durability: Durability) -> _Lane:
        key = durability.level, durability.replicas
        lane = self._slow.get(key)
        if lane is None:
            lane = self._slow[key] = self._make_lane(confirms=True)
            if self._stopped:
                lane.stop()
            elif self._tasks is not None:
                self._tasks.create_task(lane.run(), name=f"{durability.level} appends")
        return lane

    def add(self, pending: _PendingAppend) -> None:
        """Add an append. Raise Unavailable if too many are waiting."""
        channel, usual = pending.channel, pending.usual
        wanted = pending.append.durability if pending.append.durability.waits else usual
        if channel in self._pending:
            lane, count = self._pending[channel]
        elif wanted.waits:
            lane, count = self._slow_lane(wanted), 0
        else:
            self._fast.add(pending)
            return
        if len(self) >= _MAX_WAITING:
            raise Unavailable(_TOO_MANY)
        after = None if usual.waits or count else self._fast.last
        if after is None:
            after = self._held[-1][0] if self._held else None
        if after is None:
            lane.add(pending)
        else:
            self._held.append((after, lane, pending))
            after.add_done_callback(self._release)
        self._pending[channel] = lane, count + 1
        pending.future.add_done_callback(partial(self._ended, channel))

    def _release(self, _: object) -> None:
        while self._held and self._held[0][0].done():
            _, lane, pending = self._held.popleft()
            if (repeated := self._fast.repeated) is not None:
                # An append before `pending` is sent again, although later ones have failed.
                self._held.appendleft((repeated, lane, pending))
                repeated.add_done_callback(self._release)
                return
            try:
                lane.add(pending)
            except Unavailable as exc:
                _fail(pending, exc)

    def _ended(self, channel: Channel, _: object) -> None:
        lane, count = self._pending.pop(channel)
        if count > 1:
            self._pending[channel] = lane, count - 1


class _Lane:
    """One connection and the appends that wait for it."""

    def __init__(
        self,
        shard: Shard,
        redis: RedisSettings,
        refusals: Refusals,
        on_moved: Callable[[_PendingAppend], None],
        *,
        confirms: bool,
    ) -> None:
        """`confirms`: some appends wait for confirmations."""
        self._confirms = confirms
        self._shard = shard
        self._on_moved = on_moved
        self._redis = redis
        self._refusals = refusals
        # Below the timeout of the connection, so that the number of replicas is received.
        self._longest_wait_ms = int(redis.command_timeout_s * 800)
        # An append that has waited for the one before is still given this time.
        self._shortest_wait_ms = int(redis.command_timeout_s * 200)
        # The last wait has confirmed something.
        self._has_confirmed = True
        self._connection: PipelineConnection | None = None
        # The reply if Redis has rejected the scripts for appends with a uid.
        self._scripts_refused: CommandRefused | None = None
        # The levels of durability that this connection can confirm.
        self._confirmable: set[str] = {FAST.level}
        # The append that was added last, those that are sent again, in order, and the replies to
        # the last pipeline.
        self._last: asyncio.Future[EntryID] | None = None
        self._repeated: deque[asyncio.Future[EntryID]] = deque()
        self._sent: _Replies | None = None
        # Appends that are sent again, before those that wait.
        self._again: list[_PendingAppend] = []
        # Redis has rejected an append because the scripts were removed.
        self._scripts_missing = False
        self._waiting: list[_PendingAppend] = []
        self._in_flight = 0
        # By stream, as long as an append with a script has no reply yet: the last append behind it,
        # and the uid key of the last one that has a uid.
        self._unanswered: dict[bytes, tuple[Append, bytes | None]] = {}
        self._stopped = False
        self._work = asyncio.Event()

    def __len__(self) -> int:
        return len(self._again) + len(self._waiting) + self._in_flight

    @property
    def last(self) -> asyncio.Future[EntryID] | None:
        """The append that ends last, of those added until now. None if all have ended."""
        return self._last if self._last is not None and not self._last.done() else self.repeated

    @property
    def repeated(self) -> asyncio.Future[EntryID] | None:
        """The last of the appends that are sent again and have not ended, or None."""
        # The last one may end before others: its caller may be cancelled.
        while self._repeated and self._repeated[-1].done():
            del self._repeated[-1]
        return self._repeated[-1] if self._repeated else None

    def stop(self) -> None:
        """Fail the waiting appends and reject later ones."""
        self._stopped = True
        for pending in self._unsent():
            _fail(pending, RedisUnavailable(_STOPPING))

    def take(self, slot: int) -> list[_PendingAppend]:
        """Remove and return the appends of this slot that are not sent yet."""
        taken: list[_PendingAppend] = []
        kept: list[_PendingAppend] = []
        for pending in self._unsent():
            (taken if slot_of(pending.append.stream) == slot else kept).append(pending)
        self._waiting = kept
        return taken

    def _unsent(self) -> list[_PendingAppend]:
        """Return everything that is not sent yet, in order."""
        if self._again:
            self._waiting[:0] = self._again
            self._again = []
        return self._waiting

    async def until_answered(self) -> None:
        """Wait for the replies to everything that has been sent until now."""
        if self._sent is not None:
            await asyncio.wait([self._sent])

    def add(self, pending: _PendingAppend) -> None:
        """Add an append to the next pipeline. Raise Unavailable if too many are waiting."""
        if self._stopped:
            raise Unavailable(_STOPPING)
        if len(self._again) + len(self._waiting) + self._in_flight >= _MAX_WAITING:
            raise Unavailable(_TOO_MANY)
        self._last = pending.future
        if not self._waiting:
            self._work.set()
        self._waiting.append(pending)

    async def run(self) -> None:
        """Send what is waiting. Runs until cancelled."""
        try:
            while True:
                await self._work.wait()
                is_new = self._connection is None
                try:
                    connection = self._connection or await self._connect()
                    problems = await self._prepare(connection)
                except (RedisUnavailable, CommandRefused) as exc:
                    if isinstance(exc, CommandRefused):
                        self._refusals.refused(PUBLISHING, exc.reply)
                    elif not is_new:
                        continue  # Nothing was sent: try it once more on a new connection.
                    waiting, self._waiting = self._unsent(), []
                    self._work.clear()
                    for pending in waiting:
                        _fail(pending, exc)
                    await asyncio.sleep(_PAUSE_S)
                    continue
                if self._confirms:
                    await self._send_and_confirm(connection, problems)
                    continue
                if batch := self._next_batch(problems):
                    self._send(connection, batch)
                # Appends of the next loop iteration go into the next pipeline.
                await asyncio.sleep(0)
        finally:
            if self._connection is not None:
                self._connection.close()
            self.stop()

    def _next_batch(self, problems: Mapping[str, str]) -> list[_PendingAppend]:
        """Remove the next appends from those that wait. Fail those that are not possible.

        No await may follow before they are sent: `take` and `until_answered` must find each append.
        """
        waiting = self._unsent()
        # Later ones no longer wait for an append whose caller was cancelled.
        batch = [pending for pending in waiting[:_BATCH] if not pending.future.done()]
        self._waiting = waiting[_BATCH:]
        if not self._waiting:
            self._work.clear()
        if problems or self._scripts_refused is not None:
            batch = self._possible(batch, problems)
        return batch

    async def _connect(self) -> PipelineConnection:
        def on_lost(exc: Exception | None) -> None:
            self._connection = None
            if exc is not None:
                _log.warning("Redis: %s", exc)

        connection = await PipelineConnection.open(
            await self._shard.locate(), settings=self._redis, on_lost=on_lost
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
        self._scripts_missing = False
        try:
            await scripts.load(connection, APPEND_ONCE, APPEND_CHANGED, APPEND_BEHIND)
        except CommandRefused as exc:
            if rule_of(exc.reply).effect is not Effect.NO_RIGHT:
                raise
            self._scripts_refused = exc
            self._refusals.refused(UIDS, exc.reply)
        else:
            self._refusals.accepted(UIDS)

    async def _prepare(self, connection: PipelineConnection) -> dict[str, str]:
        """Examine what the next batch needs.

        Return the reasons why this server cannot confirm some levels of durability. The server is
        asked once per connection, and again while it rejects the command.
        """
        if self._scripts_missing:
            # The rest of the pipelines may contain appends of the same channels.
            await self.until_answered()
            await self._load_scripts(connection)
        elif self._scripts_refused is not None and any(
            pending.append.script for pending in self._unsent()[:_BATCH]
        ):
            await self._load_scripts(connection)
        problems: dict[str, str] = {}
        while self._confirms and (
            levels := {pending.append.durability.level for pending in self._unsent()[:_BATCH]}
            - self._confirmable
            - problems.keys()
        ):
            for level in levels:
                if problem := await unconfirmable(connection, level):
                    problems[level] = problem
                else:
                    self._confirmable.add(level)
        return problems

    def _possible(
        self, batch: list[_PendingAppend], problems: Mapping[str, str]
    ) -> list[_PendingAppend]:
        """Fail the appends that this server cannot execute or confirm. Return the others."""
        possible = []
        for pending in batch:
            if pending.append.script and self._scripts_refused is not None:
                _fail(pending, self._scripts_refused)
            elif problem := problems.get(pending.append.durability.level):
                _fail(pending, DurabilityUnavailable(f"{problem}. Nothing was appended"))
            else:
                possible.append(pending)
        return possible

    def _send(self, connection: PipelineConnection, batch: list[_PendingAppend]) -> None:
        self._sent = future = self._execute(connection, batch)

        def done(executed: _Replies) -> None:
            if not executed.cancelled():
                if exc := executed.exception():
                    self._on_lost(batch, exc)
                else:
                    self._on_replies(batch, executed.result(), {})
            self._on_answered(batch)

        future.add_done_callback(done)

    def _execute(self, connection: PipelineConnection, batch: list[_PendingAppend]) -> _Replies:
        self._in_flight += len(batch)
        commands = self._in_order([pending.append for pending in batch])
        return cast("_Replies", connection.execute(commands))

    def _on_answered(self, batch: list[_PendingAppend]) -> None:
        self._in_flight -= len(batch)
        for pending in batch if self._unanswered else ():
            stream = pending.append.stream
            if (last := self._unanswered.get(stream)) and last[0] is pending.append:
                del self._unanswered[stream]

    async def _send_and_confirm(
        self, connection: PipelineConnection, problems: Mapping[str, str]
    ) -> None:
        """Send everything that waits now, and wait for its confirmations.

        WAIT blocks the connection. One confirms all that were added during the one before.
        """
        self._sent = ended = asyncio.get_running_loop().create_future()
        sent: _Sent = []
        try:
            most_ms = self._most_ms(self._unsent())
            await self._send_waiting(connection, problems, sent)
            if sent:
                await self._confirm(connection, sent, most_ms)
        except BaseException:
            for batch, executed in sent:
                executed.cancel()
                for pending in batch:
                    _fail(pending, RedisUnavailable(_STOPPING))
            raise
        finally:
            for batch, _ in sent:
                self._on_answered(batch)
            ended.set_result([])

    async def _send_waiting(
        self, connection: PipelineConnection, problems: Mapping[str, str], sent: _Sent
    ) -> None:
        left = len(self._unsent())
        while True:
            if batch := self._next_batch(problems):
                sent.append((batch, self._execute(connection, batch)))
            left -= _BATCH
            if left <= 0:
                return
            await asyncio.sleep(0)
            try:
                problems = await self._prepare(connection)
            except (RedisUnavailable, CommandRefused):
                return
            if self._connection is not connection:
                return

    async def _confirm(self, connection: PipelineConnection, sent: _Sent, most_ms: int) -> None:
        wanted = {each.append.durability for batch, _ in sent for each in batch} - {FAST}
        unconfirmed: _Unconfirmed = {}
        lost: RedisUnavailable | None = None
        are_read = False
        try:
            confirming = Confirming(connection, wanted, most_ms)
            # Those that Redis has rejected need no confirmation.
            while confirming.left and (unconfirmed or not are_read):
                known = await confirming.step()
                if not are_read:
                    are_read = True
                    self._has_confirmed = False
                    await self._read_replies(sent, unconfirmed)
                for durability, missing in known:
                    self._has_confirmed |= not missing
                    appends = unconfirmed.pop(durability, {}).items()
                    for count, (pending, entry_id) in enumerate(appends, 1):
                        _end(pending, outcome(entry_id, missing))
                        if not count % _BATCH:
                            await next_slice()
        except RedisUnavailable as exc:
            lost = exc
        if not are_read:
            await asyncio.wait([executed for _, executed in sent])
            await self._read_replies(sent, unconfirmed)
        # Those that were rejected are behind the accepted ones of their channels.
        rejected, self._again = self._again, []
        if lost is not None:
            held = {
                pending: found for each in unconfirmed.values() for pending, found in each.items()
            }
            for pending, entry_id in held.items():
                if not pending.may_repeat:
                    _end(pending, outcome(entry_id, f"Redis did not confirm it: {lost}"))
            self._on_lost([each for batch, _ in sent for each in batch if each in held], lost)
        self._again += rejected
        for batch, executed in sent:
            if failed := executed.exception():
                self._on_lost(batch, failed)

    async def _read_replies(self, sent: _Sent, unconfirmed: _Unconfirmed) -> None:
        for count, (batch, executed) in enumerate(sent):
            if count:
                await next_slice()
            if executed.exception() is None:
                self._on_replies(batch, executed.result(), unconfirmed)

    def _most_ms(self, waiting: Sequence[_PendingAppend]) -> int:
        """Return how long the confirmations may take, within the time limit of `[publish]`."""
        if self._has_confirmed or not waiting:
            # The next one may take as long, for example if Redis writes to disk once per second.
            return self._longest_wait_ms
        waited_s = asyncio.get_running_loop().time() - waiting[0].since
        return max(self._shortest_wait_ms, self._longest_wait_ms - int(waited_s * 1000))

    def _in_order(self, appends: Sequence[Append]) -> list[RedisCommand]:
        """Return the commands in a form that Redis rejects if it rejects one before, see `behind`.

        The rejected append is sent again, and would be appended after a later one of its channel.
        """
        commands: list[RedisCommand] = []
        unanswered = self._unanswered
        for append in appends:
            stream = append.stream
            before = unanswered.get(stream) if unanswered else None
            if before is None and append.script is None:
                commands.append(append.command)
                continue
            uid_key = append.uid_key
            if uid_key is None and before is not None:
                uid_key = before[1]
                commands.append(append.behind(uid_key))
            else:
                commands.append(append.command)
            unanswered[stream] = append, uid_key
        return commands

    def _on_lost(self, batch: list[_PendingAppend], exc: BaseException) -> None:
        """Send the appends again that may be repeated. Fail the others."""
        again = []
        # An append may have waited for others that were lost.
        earliest = asyncio.get_running_loop().time() - 2 * self._redis.command_timeout_s
        for pending in batch:
            may_repeat = pending.may_repeat and pending.since > earliest
            if may_repeat and self._keeps_order(pending, exc):
                pending.may_repeat = False
                again.append(pending)
            else:
                _fail(pending, exc)
        self._repeat(again)

    def _keeps_order(self, pending: _PendingAppend, exc: BaseException) -> bool:
        """Return True if no later append of the channel can have been accepted.

        After a reply that ends the connection, Redis may have accepted the next command.
        """
        if not isinstance(exc, CannotServe):
            return True
        last = self._unanswered.get(pending.append.stream)
        return last is not None and last[0] is pending.append

    def _repeat(self, again: Sequence[_PendingAppend]) -> None:
        """Send appends again, before those that wait."""
        again = [pending for pending in again if not pending.future.done()]
        if self._stopped:
            for pending in again:
                _fail(pending, RedisUnavailable(_STOPPING))
        elif again:
            # Behind those of earlier batches, which were in flight at the same time.
            self._again += again
            # Keep those only that have not ended.
            while self._repeated and self._repeated[0].done():
                del self._repeated[0]
            self._repeated += [pending.future for pending in again]
            self._work.set()

    def _on_replies(
        self,
        batch: list[_PendingAppend],
        replies: list[object],
        unconfirmed: _Unconfirmed,
    ) -> None:
        """Handle the replies. Those that need confirmations are added to `unconfirmed`."""
        refused = self._refused()
        for pending, reply in zip(batch, replies, strict=False):
            area = UIDS if pending.append.script else PUBLISHING
            if isinstance(reply, bytes):
                if self._scripts_missing:
                    self._on_overtaken(pending.append.stream)
                if area in refused:
                    self._refusals.accepted(area)
                    refused = self._refused()
                durability = pending.append.durability
                if durability.waits:
                    unconfirmed.setdefault(durability, {})[pending] = EntryID.parse(reply)
                    continue
            elif pending.future.done():  # the caller was cancelled
                continue
            elif scripts.is_missing(reply):
                # SCRIPT FLUSH was called. The scripts are loaded again before the next batch.
                self._scripts_missing = True
                self._on_missing_script(pending)
                continue
            elif is_misplaced(str(reply)):
                if self._scripts_missing:
                    # Behind appends that were rejected for their script: keep the order.
                    self._repeat([pending])
                else:
                    self._on_moved(pending)
                continue
            elif rule_of(str(reply)).effect is not Effect.ONE:
                # A key of another type concerns one channel, and its publisher gets the error.
                self._refusals.refused(area, str(reply))
                refused = self._refused()
            _end(pending, parse_reply(pending.append, reply, {}))

    def _refused(self) -> list[str]:
        return [area for area in (PUBLISHING, UIDS) if self._refusals.has(area)]

    def _on_missing_script(self, pending: _PendingAppend) -> None:
        """Send an append again that was certainly not carried out, within its time limit."""
        now = asyncio.get_running_loop().time()
        if pending.since + self._redis.command_timeout_s < now:
            _fail(pending, RedisUnavailable(_NO_SCRIPT))
        else:
            self._repeat([pending])

    def _on_overtaken(self, stream: bytes) -> None:
        """Fail the appends that were rejected before one of the same channel was accepted.

        Another client may have loaded the scripts between the two.
        """
        kept = []
        for pending in self._again:
            if pending.append.stream == stream:
                _fail(pending, RedisUnavailable(_NO_SCRIPT))
            else:
                kept.append(pending)
        self._again = kept


def _end(pending: _PendingAppend, result: EntryID | RelayError) -> None:
    if pending.future.done():
        return
    if isinstance(result, EntryID):
        pending.future.set_result(result)
    else:
        pending.future.set_exception(result)


def _fail(pending: _PendingAppend, exc: BaseException) -> None:
    if not pending.future.done():
        error = exc if isinstance(exc, RelayError) else RedisUnavailable(str(exc))
        pending.future.set_exception(error)
