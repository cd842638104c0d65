"""Services that protocols share across workers: the bus, the store, channel history."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from redis.asyncio import Redis

from relay.core.clock import RedisClock
from relay.core.errors import Unavailable
from relay.core.model import Broken, Channel, Event, Revocation
from relay.stream.connection.connect import time_ms
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.read import history
from tests.support.clients import until, within
from tests.support.several import shard_at
from tests.support.site import site
from tests.support.topologies import is_cluster
from tests.support.valkey import Server, running

pytestmark = pytest.mark.redis
NEWS = Channel("news")


async def test_the_bus_keeps_order(server: Server) -> None:
    async with site(server, "one:1") as one, site(server, "two:2") as two:
        heard: list[tuple[str, bytes]] = []
        two.bus.listen("greetings", lambda sender, payload: heard.append((sender, payload)))
        for number in range(100):
            one.bus.send("2", "greetings", b"\0%d\0" % number)
        await until(lambda: len(heard) == 100)
        assert heard == [("1", b"\0%d\0" % number) for number in range(100)]
        one.bus.send("3", "greetings", b"nobody hears it")
        two.bus.send("2", "greetings", b"to myself")
        assert heard[-1] == ("2", b"to myself")


async def test_one_listener_that_fails_does_not_deafen_the_worker(server: Server) -> None:
    async with site(server, "one:1") as one, site(server, "two:2") as two:
        heard: list[bytes] = []

        def listen(_sender: str, payload: bytes) -> None:
            heard.append(payload)
            if payload == b"bad":
                raise ValueError

        two.bus.listen("t", listen)
        for payload in (b"bad", b"good"):
            one.bus.send("2", "t", payload)
        one.bus.send("2", "unknown", b"")
        await until(lambda: heard == [b"bad", b"good"])


async def test_of_two_that_claim_one_gets_it(server: Server) -> None:
    async with site(server, "one:1") as one, site(server, "two:2") as two:
        first = await asyncio.wait_for(one.store.claim("d:session:1", b"one", 60), 30)
        second = await two.store.claim("d:session:1", b"two", 60)
        assert (first, second) == (None, b"one")
        await one.store.put_many({"d:session:1": b"again", "d:session:2": b"x"}, 60)
        assert await two.store.get("d:session:1") == b"again"
        await one.store.delete("d:session:1")
        assert await two.store.get("d:session:1") is None
        await one.store.put("d:session:3", b"short", 0.001)

        async def gone() -> bool:
            return await two.store.get("d:session:3") is None

        while not await gone():
            await asyncio.sleep(0)


async def test_the_time_is_that_of_redis(server: Server, admin: Redis) -> None:
    async with site(server, "one:1") as one:
        await asyncio.wait_for(one.bus.links.wait_open(), 30)
        before = await time_ms(admin)
        clock = RedisClock(wall=lambda: 0.0)
        await one.measure(clock)
        assert before <= clock.now_ms() <= await time_ms(admin) + 1


async def test_the_newest_events_newest_first_with_their_moment(
    server: Server, admin: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "relay:stream:{news}"
    async with site(server, "one:1") as one:
        empty = await one.history.read(NEWS, 10)
        assert (empty.state.exists, empty.events, empty.whole) == (False, [], True)
        assert not await admin.exists(key)

        for number in range(50):
            await admin.xadd(key, {"data": str(number)})
            await admin.xadd(key, {"revoke": "ann"})
            await admin.xadd(key, {"nonsense": "1"})
        asked = [one.history.read(NEWS, count) for count in (3, 40, 0)]
        found = [await each for each in asked]
        assert found[0] is found[1] is found[2]
        events = found[1].events
        assert [event.data for event in events[:3]] == [b"49", b"48", b"47"]
        assert len(events) >= 40
        assert {type(record.body) for record in found[1].records} == {Event, Revocation, Broken}
        assert found[1].state.added == 150
        mine = found[1].state.incarnation
        assert mine is not None
        again = await one.history.read(NEWS, 1)
        assert again.state.incarnation == mine
        everything = await one.history.read(NEWS, 1000)
        assert (everything.whole, len(everything.events)) == (True, 50)

        monkeypatch.setattr(history, "MAX_BYTES", 100)
        few = await one.history.read(NEWS, 1000)
        assert not few.whole
        newest = [event.id for event in everything.events[: len(few.events)]]
        assert [event.id for event in few.events] == newest
        assert 100 <= sum(record.size for record in few.records) < 1000

        await admin.set("relay:stream:{other}", "no stream")
        with pytest.raises(Unavailable):
            await one.history.read(Channel("other"), 1)


@asynccontextmanager
async def listening(server: Server, *names: str) -> AsyncIterator[None]:
    """Subscribe to pub/sub channels, each on the server that has it."""
    async with AsyncExitStack() as stack:
        for name in names:
            endpoint, settings = await shard_at(server.settings("admin"), name.encode())
            connection = await PipelineConnection.open(
                endpoint, settings=settings, on_push=lambda _: None
            )
            stack.callback(connection.close)
            command = "SSUBSCRIBE" if is_cluster() else "SUBSCRIBE"
            await connection.execute([(command, name)])
        yield


async def test_what_there_is_on_all_workers(server: Server, admin: Redis) -> None:
    names = ["relay:ephemeral:{team:news}", "relay:ephemeral:{b*}", "other:{a}"]
    async with site(server, "one:1") as one:
        assert await one.active.channels() == []
        async with listening(server, *names):
            assert sorted(await one.active.channels()) == ["b*", "team:news"]
            assert await one.active.is_followed(Channel("team:news"))
            assert not await one.active.is_followed(NEWS)
        await admin.sadd("relay:nodes", "two:2", "one:1")
        assert await one.active.workers() == ["one:1", "two:2"]
        await one.store.put("d:x:2", b"2", 60)
        assert await one.store.get_many(["d:x:1", "d:x:2"]) == [None, b"2"]


async def test_the_store_survives_a_lost_connection(server: Server, admin: Redis) -> None:
    async with site(server, "one:1") as one:
        asking: list[tuple[Callable[[], Awaitable[object]], object]] = [
            (lambda: one.store.claim("d:x:1", b"1", 60), None),
            (lambda: one.store.put("d:x:2", b"2", 60), None),
            (lambda: one.store.get("d:x:1"), b"1"),
            (lambda: one.store.get_many(["d:x:1", "d:x:2"]), [b"1", b"2"]),
            (lambda: one.store.delete("d:x:1"), None),
        ]
        for ask, expected in asking:
            await within(30, one.wait_open())
            await admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]
            assert await ask() == expected
        assert await one.store.get("d:x:1") is None


async def test_while_redis_is_away_it_is_said_and_then_it_works_again(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    server = Server(tmp_path_factory.mktemp("own"))
    with running(server):
        async with site(server, "one:1") as one:
            server.stop()
            asking: list[Callable[[], object]] = [
                lambda: one.store.get("d:x:1"),
                lambda: one.history.read(NEWS, 1),
                one.active.channels,
                lambda: one.active.is_followed(NEWS),
                lambda: one.store.get_many(["d:x:1"]),
            ]
            for ask in asking:
                with pytest.raises(Unavailable):
                    await ask()  # type: ignore[misc]
            server.start()
            await within(30, one.wait_open())
            assert await one.store.get("d:x:1") is None


async def test_the_members_of_a_group_are_the_applications_set(
    server: Server, admin: Redis
) -> None:
    await admin.sadd("relay:group:seafile:7", "anna", "bert")
    async with site(server, "one:1") as one:
        assert await one.members("seafile:7") == {"anna", "bert"}
        assert await one.members("seafile:8") == frozenset()
