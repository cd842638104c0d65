"""Streams are given to other readers when their slots move."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from relay.core.errors import RedisUnavailable
from relay.core.model import Channel
from relay.core.stream_interface import Followed
from relay.stream.connection.primary import Primaries
from relay.stream.connection.refusals import Refusals
from relay.stream.read import shard_readers
from relay.stream.read.control_reader import ControlReader
from relay.stream.read.reader import StreamReader
from relay.stream.read.shard_readers import ShardReaders
from relay.stream.shards.shard import SLOTS, Shard, slot_of
from tests.support.clients import until
from tests.support.hub import KEYS

STREAMS = 2000


class OneShard:
    def __init__(self, name: str) -> None:
        self.name = name
        self.uses_sharded_pubsub = True


class Map:
    """A map whose slots are changed by the test. It counts how often a shard was asked for."""

    def __init__(self, shards: Sequence[OneShard]) -> None:
        self.shards = shards
        self.slots: list[OneShard | None] = [shards[0]] * SLOTS
        self.asked = self.refreshes = 0
        self.refreshed = asyncio.Event()

    @property
    def home(self) -> OneShard:
        return self.shards[0]

    def shard_of(self, key: bytes) -> OneShard:
        self.asked += 1
        if (shard := self.slots[slot_of(key)]) is None:
            raise RedisUnavailable("no server")
        return shard

    async def refresh(self) -> None:
        self.refreshes += 1
        self.refreshed.set()


class Reader:
    """Records the streams of a shard."""

    def __init__(self, shard: OneShard) -> None:
        self.shard = shard
        self.streams: set[object] = set()
        self.has_connection = False
        self.refusals = Refusals()

    def is_connected(self) -> bool:
        return self.has_connection

    ready = is_connected

    def is_silent(self) -> bool:
        return False

    async def run(self) -> None:
        await asyncio.Event().wait()

    def follow(self, stream: Followed) -> None:
        stream.key = KEYS.stream(stream.channel)
        self.streams.add(stream)

    def moved_here(self, stream: Followed, _source: object) -> None:
        self.follow(stream)

    def drop(self, stream: Followed) -> None:
        self.streams.remove(stream)

    release = drop

    def set_control(self, _control: object) -> None:
        pass

    def unpark(self) -> None:
        pass


class Stream:
    def __init__(self, number: int) -> None:
        self.channel = Channel(f"room{number}")
        self.key = b""
        self.alive = True
        self.unsettled = 0

    def on_unsettled(self) -> None:
        self.unsettled += 1


class HookedStream(Stream):
    """Calls `on_moved` when it is moved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.on_moved: Callable[[], None] = lambda: None

    def on_unsettled(self) -> None:
        super().on_unsettled()
        self.on_moved()


def readers_of(shard_map: Map, made: dict[str, Reader]) -> ShardReaders:
    def make(shard: Shard) -> StreamReader:
        reader = made[shard.name] = Reader(cast(Any, shard))
        return cast(StreamReader, reader)

    return ShardReaders(
        shards=cast(Any, shard_map),
        keys=KEYS,
        control=cast(ControlReader, None),
        primaries=Primaries(),
        make=make,
    )


async def test_only_the_streams_of_slots_that_moved_are_visited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_readers, "_LAST_LOOK_S", 0.05)
    shards = [OneShard("one"), OneShard("two")]
    shard_map, made = Map(shards), dict[str, Reader]()
    readers = readers_of(shard_map, made)

    async def looked() -> int:
        """Let the readers look at the map. Return how many streams they have visited."""
        shard_map.asked = 0
        for _ in range(2):  # the second look begins when the first one is complete
            shard_map.refreshed.clear()
            readers.look()
            await shard_map.refreshed.wait()
        return shard_map.asked

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(readers.run())
        streams = [Stream(number) for number in range(STREAMS)]
        for stream in streams:
            readers.follow(cast(Followed, stream))
        await looked()
        assert len(made["one"].streams) == STREAMS
        for stream in streams:
            stream.unsettled = 0
        assert await looked() == 0
        # Two slots move, one of them with its only stream.
        moving = streams[:2]
        for stream in moving:
            shard_map.slots[slot_of(stream.key)] = shards[1]
        neighbours = [each for each in streams if shard_map.shard_of(each.key) is shards[1]]
        assert await looked() == len(neighbours)
        assert made["two"].streams == set(neighbours)
        assert [each for each in streams if each.unsettled] == neighbours
        # A stream that was released is not visited, and one whose slot has no server is kept.
        readers.release(cast(Followed, moving[0]))
        shard_map.slots[slot_of(moving[0].key)] = shards[0]
        shard_map.slots[slot_of(moving[1].key)] = None
        await looked()
        assert moving[1] in made["two"].streams
        shard_map.slots[slot_of(moving[1].key)] = shards[0]
        await looked()
        assert moving[1] in made["one"].streams
        running.cancel()


async def test_a_stream_follows_its_slot_back_if_no_look_saw_it_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_readers, "_LAST_LOOK_S", 0.05)
    shards = [OneShard("one"), OneShard("two")]
    shard_map, made = Map(shards), dict[str, Reader]()
    readers = readers_of(shard_map, made)

    async def looked() -> None:
        for _ in range(3):  # the third look begins when two are complete
            shard_map.refreshed.clear()
            readers.look()
            await shard_map.refreshed.wait()

    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(readers.run())
        await looked()
        # Another task has read a newer map, and a client joins before the readers look at it.
        joining = Stream(0)
        slot = slot_of(KEYS.stream(joining.channel))
        shard_map.slots[slot] = shards[1]
        readers.follow(cast(Followed, joining))
        assert joining in made["two"].streams
        shard_map.slots[slot] = shards[0]
        await looked()
        assert joining in made["one"].streams
        assert joining not in made["two"].streams
        # Another task reads two newer maps while streams are being moved, one of them between the
        # two streams.
        moving = HookedStream(1), HookedStream(2)
        first, second = sorted(moving, key=lambda each: slot_of(KEYS.stream(each.channel)))
        for stream in (first, second):
            readers.follow(cast(Followed, stream))
            shard_map.slots[slot_of(stream.key)] = shards[1]
        slot = slot_of(second.key)

        def on_moved() -> None:
            shard_map.slots[slot] = shards[0]
            asyncio.get_running_loop().call_soon(shard_map.slots.__setitem__, slot, shards[1])

        first.on_moved = on_moved
        await looked()
        assert made["two"].streams == {first, second}
        running.cancel()


async def test_subscriptions_wait_for_a_primary_that_was_just_promoted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = OneShard("old"), OneShard("new")
    shard_map, made = Map([old]), dict[str, Reader]()
    readers = readers_of(shard_map, made)
    channels = [Channel("room")]
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(readers.run())
        # At the start, clients learn at once that the server is away.
        assert not readers.is_connected(channels)
        await until(lambda: "old" in made)
        assert not readers.is_connected(channels)
        made["old"].has_connection = True
        assert readers.is_connected(channels)
        # Another task has read the map, which names the promoted replica.
        shard_map.shards, shard_map.slots = [new], [new] * SLOTS
        assert readers.is_connected(channels)
        readers.look()
        await until(lambda: "new" in made)
        assert readers.is_connected(channels)
        shard_map.slots = [None] * SLOTS
        assert not readers.is_connected(channels)
        # They do not wait for it forever.
        monkeypatch.setattr(shard_readers, "_PROMOTED_S", 0.0)
        shard_map.shards, shard_map.slots = [old], [old] * SLOTS
        made.clear()
        readers.look()
        await until(lambda: "old" in made)
        assert not readers.is_connected(channels)
        running.cancel()


async def test_the_replica_of_a_primary_that_is_away_is_found_when_it_is_promoted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without a reason, the next look would be after the end of the test.
    monkeypatch.setattr(shard_readers, "_SIGN_S", 0.0)
    monkeypatch.setattr(shard_readers, "_PERIOD_S", 300.0)
    monkeypatch.setattr(shard_readers, "_LAST_LOOK_S", 0.1)
    old, new = OneShard("old"), OneShard("new")
    shard_map, made = Map([old]), dict[str, Reader]()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(readers_of(shard_map, made).run())
        await until(lambda: "old" in made)
        # Longer than one sign lasts.
        await until(lambda: shard_map.refreshes == 5)
        shard_map.shards, shard_map.slots = [new], [new] * SLOTS
        await until(lambda: "new" in made)
        made["new"].has_connection = True
        looks = -1
        while looks < shard_map.refreshes:
            looks = shard_map.refreshes
            await asyncio.sleep(2 * shard_readers._LAST_LOOK_S)
        running.cancel()


async def test_a_primary_that_stays_away_does_not_shorten_the_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_readers, "_FIRST_LOOK_S", 300.0)
    monkeypatch.setattr(shard_readers, "_LAST_LOOK_S", 300.0)
    shard = OneShard("away")
    shard_map, made = Map([shard]), dict[str, Reader]()
    shard_map.slots = [shard] * SLOTS
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(readers_of(shard_map, made).run())
        await until(lambda: "away" in made)
        await asyncio.sleep(20 * shard_readers._SHORTEST_PAUSE_S)
        assert not made["away"].is_connected()
        assert shard_map.refreshes == 1
        running.cancel()


async def test_the_first_sign_of_another_shard_ends_the_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without a sign, the next look would be after the end of the test.
    monkeypatch.setattr(shard_readers, "_FIRST_LOOK_S", 300.0)
    monkeypatch.setattr(shard_readers, "_LAST_LOOK_S", 300.0)
    monkeypatch.setattr(Reader, "is_connected", lambda _: True)
    shards = [OneShard("one"), OneShard("two")]
    shard_map = Map(shards)
    one, two = cast("list[Shard]", shards)
    readers = readers_of(shard_map, {})
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(readers.run())
        await until(lambda: shard_map.refreshes == 1)
        readers.look(one)
        await until(lambda: shard_map.refreshes == 2)
        # A stream that is parked again is no news, but another server is.
        readers.look(one)
        readers.look(two)
        await until(lambda: shard_map.refreshes == 3)
        readers.look(one)
        readers.look(two)
        for _ in range(10):
            await asyncio.sleep(0.01)
            readers.look(one)
        assert shard_map.refreshes == 3
        running.cancel()
