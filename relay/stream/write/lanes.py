"""The connections for appends to one server, and the order of the appends on them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from relay.core.durability import FAST, Durability
from relay.core.errors import Unavailable
from relay.stream.shards.shard import slot_of
from relay.stream.write.lane import Lane
from relay.stream.write.pending import MAX_WAITING, TOO_MANY, PendingAppend

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.core.model import Channel, EntryID
    from relay.stream.connection.refusals import Refusals
    from relay.stream.shards.shard import Shard


class Lanes:
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
        on_moved: Callable[[PendingAppend, Lanes], None],
    ) -> None:
        """`on_moved` is called, in order, with appends that belong to another shard now."""

        def moved(pending: PendingAppend) -> None:
            on_moved(pending, self)

        self._make_lane = partial(Lane, shard, redis, refusals, moved)
        self._fast = self._make_lane(confirms=False)
        # By level and number of replicas.
        self._slow: dict[tuple[str, int], Lane] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._stopped = False
        # Channels with pending appends in a slow lane: the lane and their number.
        self._pending: dict[Channel, tuple[Lane, int]] = {}
        # Appends in their order: the last append of the fast lane, the lane to use after it.
        self._held: deque[tuple[asyncio.Future[EntryID], Lane, PendingAppend]] = deque()

    def __len__(self) -> int:
        return len(self._held) + sum(map(len, (self._fast, *self._slow.values())))

    async def run(self) -> None:
        """Send appends until cancelled."""
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

    def take(self, slot: int) -> list[PendingAppend]:
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

    def _slow_lane(self, durability: Durability) -> Lane:
        key = durability.level, durability.replicas
        lane = self._slow.get(key)
        if lane is None:
            lane = self._slow[key] = self._make_lane(confirms=True)
            if self._stopped:
                lane.stop()
            elif self._tasks is not None:
                self._tasks.create_task(lane.run(), name=f"{durability.level} appends")
        return lane

    def add(self, pending: PendingAppend) -> None:
        """Add an append. Raise Unavailable if too many are waiting."""
        channel, usual = pending.channel, pending.usual
        wanted = usual if pending.append.durability is FAST else pending.append.durability
        if channel in self._pending:
            lane, count = self._pending[channel]
        elif wanted is not FAST:
            lane, count = self._slow_lane(wanted), 0
        else:
            self._fast.add(pending)
            return
        if len(self) >= MAX_WAITING:
            raise Unavailable(TOO_MANY)
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
                pending.fail(exc)

    def _ended(self, channel: Channel, _: object) -> None:
        lane, count = self._pending.pop(channel)
        if count > 1:
            self._pending[channel] = lane, count - 1
