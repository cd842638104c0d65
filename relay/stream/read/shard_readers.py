"""Read the followed streams of all shards: one reader per shard, and each stream with its shard.

One task reads the shard map: at the start, periodically, as soon as a reply or a push shows that a
key is in another shard, and while a primary of a Redis Cluster is away. Streams whose shard has
changed are given to its reader and examined there. Parked streams are examined again after each
read of the map. After such a reply, the map is read repeatedly for a few seconds, after 50 ms at
first and then at most once a second: a slot may still be moving, and the node that is asked may not
have received the change yet. The first such reply from another server ends the pause: it may be the
next one that has been replaced.

A server that cannot be reached affects only the channels in its shard. `problem` names it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from relay.core.errors import RedisUnavailable
from relay.core.slices import in_slices
from relay.stream.connection.reconnecting import Backoff
from relay.stream.shards.shard import slot_of

if TYPE_CHECKING:
    from relay.core.model import Channel
    from relay.core.stream_interface import Followed
    from relay.stream.connection.primary import Primaries
    from relay.stream.format.keys import Keys
    from relay.stream.read.control_reader import ControlReader
    from relay.stream.read.reader import StreamReader
    from relay.stream.shards.shard import Shard, ShardMap

_log = logging.getLogger(__name__)

_FIRST_LOOK_S, _LAST_LOOK_S = 0.05, 1.0
_SHORTEST_PAUSE_S = _FIRST_LOOK_S / 2
# For this time after a sign that the map has changed, it is read again and again.
_SIGN_S = 3.0
# A change that no reply and no push has shown is found after this time.
_PERIOD_S = 5.0
# Subscriptions wait this long for a connection to a primary that was promoted just now.
_PROMOTED_S = 3.0


class ShardReaders:
    """Implements `relay.core.stream_interface.StreamReads` with one `StreamReader` per shard."""

    def __init__(
        self,
        *,
        shards: ShardMap,
        keys: Keys,
        control: ControlReader,
        primaries: Primaries,
        make: Callable[[Shard], StreamReader],
    ) -> None:
        """`make` creates the reader of a shard. `control` is used by the reader of the home."""
        self._map = shards
        self._keys = keys
        self._control = control
        self._primaries = primaries
        self._make = make
        self._readers: dict[Shard, StreamReader] = {}
        self._tasks: dict[Shard, asyncio.Task[None]] = {}
        self._reader_of: dict[Followed, StreamReader] = {}
        # The slots when streams were last moved, and the streams in each slot. Empty unless keys
        # can move.
        self._placed: list[Shard | None] = []
        self._in_slot: dict[int, dict[Followed, None]] = {}
        # Streams whose slot has no server, or whose map was never read.
        self._homeless: dict[Followed, None] = {}
        self._look = asyncio.Event()
        self._look_until = 0.0
        # The shards that have shown a change since the map last changed, and whether there is a new
        # one since it was last read. Streams that are parked again and again are no news.
        self._signs: set[Shard | None] = set()
        self._new_sign = asyncio.Event()
        # Until when the channels of a shard wait for its first connection.
        self._promoted_until: dict[Shard, float] = {}
        self._stopping = False
        self._problem = "the shards are not known yet"

    # ---- relay.core.stream_interface.StreamReads --------------------------------------------

    def follow(self, stream: Followed) -> None:
        """See `StreamReads`."""
        reader = self._find(stream.channel)
        if reader is None:
            self._homeless[stream] = None
            self.look()
        else:
            self._reader_of[stream] = reader
            reader.follow(stream)
            if self._map.slots:
                slot = slot_of(stream.key)
                self._in_slot.setdefault(slot, {})[stream] = None
                if self._placed and self._placed[slot] is not reader.shard:
                    # Another task has read a newer map. Visit the slot at the next look.
                    self._placed[slot] = None

    def want_join(self, stream: Followed) -> None:
        """See `StreamReads`."""
        if (reader := self._reader_of.get(stream)) is not None:
            reader.want_join(stream)

    def want_examine(self, stream: Followed) -> None:
        """See `StreamReads`."""
        if (reader := self._reader_of.get(stream)) is not None:
            reader.want_examine(stream)

    def want_read(self, stream: Followed) -> None:
        """See `StreamReads`."""
        if (reader := self._reader_of.get(stream)) is not None:
            reader.want_read(stream)

    def want_page(self, stream: Followed) -> None:
        """See `StreamReads`."""
        if (reader := self._reader_of.get(stream)) is not None:
            reader.want_page(stream)

    def release(self, stream: Followed) -> None:
        """See `StreamReads`."""
        self._homeless.pop(stream, None)
        if (reader := self._reader_of.pop(stream, None)) is not None:
            reader.release(stream)
            if self._in_slot:
                slot = slot_of(stream.key)
                neighbours = self._in_slot.get(slot, {})
                neighbours.pop(stream, None)
                if not neighbours:
                    self._in_slot.pop(slot, None)

    # ---- health -----------------------------------------------------------------------------

    def ready(self) -> bool:
        """Return True if the streams of at least one shard are being read.

        One that cannot be read must not take all channels of the others away.
        """
        return any(reader.ready() for reader in self._readers.values())

    def is_connected(self, channels: Iterable[Channel] = ()) -> bool:
        """Return True if there are connections over which these channels are read, or will be in a
        moment, because a primary was just promoted.

        Without channels, return True if there is any such connection.
        """
        shards = {self._shard_of(channel) for channel in channels}
        if not shards:
            return any(reader.is_connected() for reader in self._readers.values())
        return all(shard is not None and self._serves(shard) for shard in shards)

    def _serves(self, shard: Shard) -> bool:
        reader = self._readers.get(shard)
        if reader is None:
            # The map names a primary whose reader will be started after the next read of the map.
            return not self._problem
        if reader.is_connected():
            # A frozen server is still connected. If no reader is ready, this worker is only late.
            return not reader.refusals.cannot_read and not (reader.is_silent() and self.ready())
        return asyncio.get_running_loop().time() < self._promoted_until.get(shard, 0.0)

    def connected(self) -> dict[str, bool]:
        """Return the addresses of the servers, and whether there is a connection to each."""
        return {each.shard.name: each.is_connected() for each in self._readers.values()}

    def settled(self) -> bool:
        """Return False after a reconnect until all streams of a shard were checked for new entries.

        As with `ready`, one shard for which this is true is enough.
        """
        return any(reader.ready() and reader.settled() for reader in self._readers.values())

    def limits(self) -> str:
        """Return what the servers refuse now. With a single server, its `Refusals` are shared."""
        if len(self._readers) < 2:
            return ""
        return "; ".join(filter(None, (str(each.refusals) for each in self._readers.values())))

    def problem(self, channels: Iterable[Channel] = ()) -> str:
        """Return which servers cannot be read, or ''. With channels: only those of their shards.

        Slots of a Cluster without a server are a problem as well.
        """
        if self._problem:
            return self._problem
        channels = list(channels)
        problems = self._unserved(channels)
        found = {self._find(channel) for channel in channels} or set(self._readers.values())
        away = [reader for reader in found if reader is not None and not reader.ready()]
        causes = "; ".join(sorted({reader.problem for reader in away if reader.problem}))
        if away and (len(self._readers) > 1 or causes):
            names = ", ".join(sorted(reader.shard.name for reader in away))
            problems.append(f"Redis at {names} cannot be read" + (f": {causes}" if causes else ""))
        return "; ".join(problems)

    def _unserved(self, channels: Sequence[Channel]) -> list[str]:
        """Return errors about the slots of these channels, or without channels of all slots."""
        if not channels:
            count = self._map.slots.count(None)
            return [f"slots without a server in the Redis Cluster: {count}"] if count else []
        errors: dict[str, None] = {}
        for channel in channels:
            try:
                self._map.shard_of(self._keys.stream(channel))
            except RedisUnavailable as exc:
                errors[str(exc)] = None
        return list(errors)

    async def wait_ready(self, channels: Iterable[Channel] = ()) -> None:
        """Wait until these channels are being read; without channels, those of all shards."""
        while not await self._are_ready(channels):  # noqa: ASYNC110  # the map has no event
            await asyncio.sleep(_FIRST_LOOK_S)
        self._primaries.is_starting = False

    async def _are_ready(self, channels: Iterable[Channel]) -> bool:
        """Wait for one of these readers. Return True if all are ready."""
        if self._problem or not self._readers:
            return False
        for reader in {self._find(channel) for channel in channels} or set(self._readers.values()):
            if reader is None:
                return False
            if not reader.is_reading():
                # Its shard may be gone before it is ready.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_LOOK_S):
                        await reader.wait_ready()
                return False
        return True

    # ---- life -------------------------------------------------------------------------------

    def look(self, source: Shard | None = None) -> None:
        """Read the map soon: a key is, or will be, in another shard. `source` has shown this."""
        if source not in self._signs:
            self._signs.add(source)
            self._new_sign.set()
        self._look_longer()

    def _look_longer(self) -> None:
        self._look_until = asyncio.get_running_loop().time() + _SIGN_S
        self._look.set()

    async def run(self) -> None:
        """Read until cancelled or stopped."""
        loop = asyncio.get_running_loop()
        backoff = Backoff(_FIRST_LOOK_S, _LAST_LOOK_S)
        async with asyncio.TaskGroup() as tasks:
            while not self._stopping:
                self._look.clear()
                self._new_sign.clear()
                try:
                    await self._map.refresh()
                except RedisUnavailable as exc:
                    if self._problem != str(exc):
                        _log.warning("Redis: %s", exc)
                    self._problem = str(exc)
                else:
                    self._problem = ""
                    if await self._place(tasks):
                        self._signs.clear()
                        backoff.reset()
                for reader in list(self._readers.values()):
                    reader.unpark()
                if self._problem or self._awaits_promotion():
                    # This is not a new sign, which would end each pause.
                    self._look_longer()
                if await self._pause(backoff) or loop.time() < self._look_until:
                    continue
                self._signs.clear()
                backoff.reset()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PERIOD_S):
                        await self._look.wait()

    def _awaits_promotion(self) -> bool:
        """Return True if a replica may soon have the slots of a server that is away."""
        readers = self._readers.values()
        return bool(self._map.slots) and not all(reader.is_connected() for reader in readers)

    async def _pause(self, backoff: Backoff) -> bool:
        """Pause between two reads of the map. Return True if a new sign has ended the pause."""
        pause_s = backoff.next_s()
        shortest_s = min(pause_s, _SHORTEST_PAUSE_S)
        await asyncio.sleep(shortest_s)
        try:
            async with asyncio.timeout(pause_s - shortest_s):
                await self._new_sign.wait()
        except TimeoutError:
            return False
        backoff.reset()
        return True

    async def stop(self) -> None:
        """Stop reading and destroy the groups of this worker."""
        self._stopping = True
        # A server that does not answer must not keep the groups on the others.
        async with asyncio.TaskGroup() as stopping:
            for reader in list(self._readers.values()):
                stopping.create_task(reader.stop(), name=f"stop {reader.shard.name}")

    # ---- the map ----------------------------------------------------------------------------

    def _shard_of(self, channel: Channel) -> Shard | None:
        try:
            return self._map.shard_of(self._keys.stream(channel))
        except RedisUnavailable:
            return None

    def _find(self, channel: Channel) -> StreamReader | None:
        shard = self._shard_of(channel)
        return None if shard is None else self._readers.get(shard)

    async def _place(self, tasks: asyncio.TaskGroup) -> bool:
        """Start and end readers, and give each stream to its reader. Return True if any moved."""
        present = self._map.shards
        is_first = not self._readers
        for shard in present:
            if shard not in self._readers:
                if not is_first:
                    now = asyncio.get_running_loop().time()
                    self._promoted_until[shard] = now + _PROMOTED_S
                self._readers[shard] = reader = self._make(shard)
                name = f"reader of {shard.name}"
                self._tasks[shard] = tasks.create_task(reader.run(), name=name)
        self._place_control()
        moved = await self._move()
        self._follow_homeless()
        for shard in [shard for shard in self._readers if shard not in present]:
            _log.info("No longer reading streams from %s: it has no slots", shard.name)
            self._tasks.pop(shard).cancel()
            self._readers.pop(shard).unpark()
            self._promoted_until.pop(shard, None)
            self._signs.discard(shard)
        if not self._homeless:
            self._signs.discard(None)
        return moved

    def _place_control(self) -> None:
        try:
            home = self._map.home
        except RedisUnavailable:
            return
        for shard, reader in self._readers.items():
            reader.set_control(self._control if shard is home else None)

    async def _move(self) -> bool:
        """Give the streams in slots whose shard has changed to its reader."""
        slots, before = list(self._map.slots), self._placed
        if slots == before:
            return False
        self._placed = slots
        moved = False
        # Before the first look at the map, no stream had a reader.
        pairs = enumerate(zip(before, slots, strict=True)) if before else ()
        for slot in [slot for slot, (source, target) in pairs if source is not target]:
            async for stream in in_slices(list(self._in_slot.get(slot, ()))):
                target = self._find(stream.channel)
                if target is None or target.shard is not slots[slot]:
                    # Another task has read a newer map in the meantime. Visit the slot again.
                    slots[slot] = None
                if target is not None:
                    moved |= self._move_stream(stream, target)
        return moved

    def _move_stream(self, stream: Followed, target: StreamReader) -> bool:
        source = self._reader_of.get(stream)
        if source is None or source is target:
            return False
        source.drop(stream)
        self._reader_of[stream] = target
        target.moved_here(stream, source)
        # The requests that were dropped are sent again to the new reader.
        source.unpark()
        stream.on_unsettled()
        return True

    def _follow_homeless(self) -> None:
        homeless, self._homeless = self._homeless, {}
        for stream in homeless:
            if stream.alive:
                self.follow(stream)
                stream.on_unsettled()
