"""One connection to a server, and the appends that wait for it.

Without confirmations, the appends of each event loop iteration are one pipeline, and several
pipelines are in flight. With confirmations there is one round at a time: everything that waits is
sent, and its confirmations are awaited.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from relay.core.durability import FAST, Durability
from relay.core.errors import DurabilityUnavailable, RedisUnavailable, Unavailable
from relay.core.model import EntryID
from relay.core.slices import next_slice
from relay.stream.connection import scripts
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import CannotServe, PipelineConnection
from relay.stream.connection.refusals import Effect, rule_of
from relay.stream.shards.shard import is_misplaced, slot_of
from relay.stream.write.append import (
    APPEND_BEHIND,
    APPEND_CHANGED,
    APPEND_ONCE,
    Append,
    outcome,
    parse_reply,
)
from relay.stream.write.confirmations import Confirming, unconfirmable
from relay.stream.write.pending import MAX_WAITING, STOPPING, TOO_MANY, PendingAppend

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.connection.pipeline_connection import RedisCommand
    from relay.stream.connection.refusals import Refusals
    from relay.stream.shards.shard import Shard

_log = logging.getLogger(__name__)

_BATCH = 1000
_PAUSE_S = 0.05
_NO_SCRIPT = "the scripts were removed from Redis; nothing was appended"
# Names of areas in `Refusals`.
_PUBLISHING = "publishing"
_UIDS = "publishing with a uid"

_Replies = asyncio.Future[list[object]]
# Batches and the replies to them, in order.
_Sent = list[tuple[list[PendingAppend], _Replies]]
# By durability: appends that Redis has accepted.
_Unconfirmed = dict[Durability, dict[PendingAppend, EntryID]]


class Lane:
    """One connection and the appends that wait for it."""

    def __init__(
        self,
        shard: Shard,
        redis: RedisSettings,
        refusals: Refusals,
        on_moved: Callable[[PendingAppend], None],
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
        self._again: list[PendingAppend] = []
        # Redis has rejected an append because the scripts were removed.
        self._scripts_missing = False
        self._waiting: list[PendingAppend] = []
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
            pending.fail(RedisUnavailable(STOPPING))

    def take(self, slot: int) -> list[PendingAppend]:
        """Remove and return the appends of this slot that are not sent yet."""
        taken: list[PendingAppend] = []
        kept: list[PendingAppend] = []
        for pending in self._unsent():
            (taken if slot_of(pending.append.stream) == slot else kept).append(pending)
        self._waiting = kept
        return taken

    def _unsent(self) -> list[PendingAppend]:
        """Return everything that is not sent yet, in order."""
        if self._again:
            self._waiting[:0] = self._again
            self._again = []
        return self._waiting

    async def until_answered(self) -> None:
        """Wait for the replies to everything that has been sent until now."""
        if self._sent is not None:
            await asyncio.wait([self._sent])

    def add(self, pending: PendingAppend) -> None:
        """Add an append to the next pipeline. Raise Unavailable if too many are waiting."""
        if self._stopped:
            raise Unavailable(STOPPING)
        if len(self._again) + len(self._waiting) + self._in_flight >= MAX_WAITING:
            raise Unavailable(TOO_MANY)
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
                        self._refusals.refused(_PUBLISHING, exc.reply)
                    elif not is_new:
                        continue  # Nothing was sent: try it once more on a new connection.
                    waiting, self._waiting = self._unsent(), []
                    self._work.clear()
                    for pending in waiting:
                        pending.fail(exc)
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

    def _next_batch(self, problems: Mapping[str, str]) -> list[PendingAppend]:
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
            self._refusals.refused(_UIDS, exc.reply)
        else:
            self._refusals.accepted(_UIDS)

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
        self, batch: list[PendingAppend], problems: Mapping[str, str]
    ) -> list[PendingAppend]:
        """Fail the appends that this server cannot execute or confirm. Return the others."""
        possible = []
        for pending in batch:
            if pending.append.script and self._scripts_refused is not None:
                pending.fail(self._scripts_refused)
            elif problem := problems.get(pending.append.durability.level):
                pending.fail(DurabilityUnavailable(f"{problem}. Nothing was appended"))
            else:
                possible.append(pending)
        return possible

    def _send(self, connection: PipelineConnection, batch: list[PendingAppend]) -> None:
        self._sent = future = self._execute(connection, batch)

        def done(executed: _Replies) -> None:
            if not executed.cancelled():
                if exc := executed.exception():
                    self._on_lost(batch, exc)
                else:
                    self._on_replies(batch, executed.result(), {})
            self._on_answered(batch)

        future.add_done_callback(done)

    def _execute(self, connection: PipelineConnection, batch: list[PendingAppend]) -> _Replies:
        self._in_flight += len(batch)
        commands = self._in_order([pending.append for pending in batch])
        return cast("_Replies", connection.execute(commands))

    def _on_answered(self, batch: list[PendingAppend]) -> None:
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
                    pending.fail(RedisUnavailable(STOPPING))
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
            # Wait only while Redis has accepted appends whose outcome is unknown.
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
                        pending.end(outcome(entry_id, missing))
                        if not count % _BATCH:
                            await next_slice()
        except RedisUnavailable as exc:
            lost = exc
        if not are_read:
            await asyncio.wait([executed for _, executed in sent])
            await self._read_replies(sent, unconfirmed)
        # In each channel, rejected appends come after accepted ones: send them again in this order.
        rejected, self._again = self._again, []
        if lost is not None:
            held = {
                pending: found for each in unconfirmed.values() for pending, found in each.items()
            }
            for pending, entry_id in held.items():
                if not pending.may_repeat:
                    pending.end(outcome(entry_id, f"Redis did not confirm it: {lost}"))
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

    def _most_ms(self, waiting: Sequence[PendingAppend]) -> int:
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

    def _on_lost(self, batch: list[PendingAppend], exc: BaseException) -> None:
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
                pending.fail(exc)
        self._repeat(again)

    def _keeps_order(self, pending: PendingAppend, exc: BaseException) -> bool:
        """Return True if no later append of the channel can have been accepted.

        After a reply that ends the connection, Redis may have accepted the next command.
        """
        if not isinstance(exc, CannotServe):
            return True
        last = self._unanswered.get(pending.append.stream)
        return last is not None and last[0] is pending.append

    def _repeat(self, again: Sequence[PendingAppend]) -> None:
        """Send appends again, before those that wait."""
        again = [pending for pending in again if not pending.future.done()]
        if self._stopped:
            for pending in again:
                pending.fail(RedisUnavailable(STOPPING))
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
        batch: list[PendingAppend],
        replies: list[object],
        unconfirmed: _Unconfirmed,
    ) -> None:
        """Handle the replies. Those that need confirmations are added to `unconfirmed`."""
        refused = self._refused()
        for pending, reply in zip(batch, replies, strict=False):
            area = _UIDS if pending.append.script else _PUBLISHING
            if isinstance(reply, bytes):
                if self._scripts_missing:
                    self._on_overtaken(pending.append.stream)
                if area in refused:
                    self._refusals.accepted(area)
                    refused = self._refused()
                durability = pending.append.durability
                if durability is not FAST:
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
            pending.end(parse_reply(pending.append, reply, {}))

    def _refused(self) -> list[str]:
        return [area for area in (_PUBLISHING, _UIDS) if self._refusals.has(area)]

    def _on_missing_script(self, pending: PendingAppend) -> None:
        """Send an append again that was certainly not carried out, within its time limit."""
        now = asyncio.get_running_loop().time()
        if pending.since + self._redis.command_timeout_s < now:
            pending.fail(RedisUnavailable(_NO_SCRIPT))
        else:
            self._repeat([pending])

    def _on_overtaken(self, stream: bytes) -> None:
        """Fail the appends that were rejected before one of the same channel was accepted.

        Another client may have loaded the scripts between the two.
        """
        kept = []
        for pending in self._again:
            if pending.append.stream == stream:
                pending.fail(RedisUnavailable(_NO_SCRIPT))
            else:
                kept.append(pending)
        self._again = kept
