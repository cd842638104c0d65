"""Batch the appends of a relay process: those of one event loop iteration share one pipeline.

Each shard has its own pipelines, so that an unreachable server delays no appends to others. If a
slot of a Redis Cluster is moved, the server rejects the appends of its channels. They are sent
again, in the same order, to the server that has the slot then. New appends of these channels wait
meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from relay.core.errors import RedisUnavailable, RelayError, Unavailable
from relay.stream.shards.making import refusals_of
from relay.stream.shards.shard import slot_of
from relay.stream.write.append import AppendCommands
from relay.stream.write.lanes import Lanes
from relay.stream.write.pending import MAX_WAITING, STOPPING, TOO_MANY, PendingAppend

if TYPE_CHECKING:
    from relay.config.settings import NamespaceSettings, PublishSettings, RedisSettings
    from relay.core.durability import Durability
    from relay.core.model import Channel, EntryID
    from relay.stream.connection.refusals import Refusals
    from relay.stream.format.keys import Keys
    from relay.stream.shards.shard import Shard, ShardMap

_PAUSE_S = 0.05


class _Moving(NamedTuple):
    """Appends of a slot that is being moved, in their order.

    Some were rejected, some had not been sent yet, and some were made later.
    """

    rejected: list[PendingAppend]
    unsent: list[PendingAppend]
    later: list[PendingAppend]

    def all(self) -> list[PendingAppend]:
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
        self._lanes: dict[Shard, Lanes] = {}
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
                    pending.fail(RedisUnavailable(STOPPING))

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
        pending = PendingAppend(channel, append, usual)
        if self._moving and (slot := slot_of(append.stream)) in self._moving:
            later = self._moving[slot].later
            if len(later) >= MAX_WAITING:
                raise Unavailable(TOO_MANY)
            later.append(pending)
            return pending.future
        try:
            self._lanes_of(pending).add(pending)
        except RedisUnavailable as exc:
            pending.future.set_exception(exc)
        return pending.future

    def _lanes_of(self, pending: PendingAppend) -> Lanes:
        shard = self._shards.shard_of(pending.append.stream)
        lanes = self._lanes.get(shard)
        if lanes is None:
            redis = shard.settings.model_copy(update=self._limits)
            refusals = self._refusals(shard)
            lanes = self._lanes[shard] = Lanes(shard, redis, refusals, self._on_moved)
            if self._tasks is not None:
                self._tasks.create_task(lanes.run(), name=f"appends to {shard.name}")
        return lanes

    # ---- slots that are being moved ---------------------------------------------------------

    def _on_moved(self, pending: PendingAppend, lanes: Lanes) -> None:
        """Send an append again that the server has rejected because the slot is being moved."""
        slot = slot_of(pending.append.stream)
        if slot in self._moving:
            self._moving[slot].rejected.append(pending)
            return
        # At once: they must not be sent before those that were rejected.
        self._moving[slot] = _Moving([pending], lanes.take(slot), [])
        if self._tasks is not None:
            self._tasks.create_task(self._send_again(slot, lanes), name=f"appends of slot {slot}")

    async def _send_again(self, slot: int, lanes: Lanes) -> None:
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
                pending.fail(problem or RedisUnavailable("the slot is being moved"))
                continue
            try:
                self._lanes_of(pending).add(pending)
            except RelayError as exc:
                pending.fail(exc)
