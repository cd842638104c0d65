"""The appender on real servers: order, idempotence, errors within the time limits, replicas."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.asyncio import Redis

from producers.outgoing import InvalidEvent, PublishFailed
from producers.publisher import AsyncPublisher
from relay.config.settings import NamespaceSettings, PublishSettings
from relay.core.durability import Durability
from relay.core.errors import (
    DurabilityUnavailable,
    NotDurable,
    RedisUnavailable,
    RelayError,
)
from relay.core.model import Channel, EntryID
from relay.stream.connection.connect import CommandRefused, command
from relay.stream.format.keys import Keys
from relay.stream.shards.making import shard_map
from relay.stream.write.append import APPEND_CHANGED, APPEND_ONCE
from relay.stream.write.appender import Appender
from tests.support.valkey import Flavour, Server, running

pytestmark = pytest.mark.redis
NEWS = Channel("news")


@contextlib.asynccontextmanager
async def appending(
    server: Server, keys: Keys, *, timeout_s: float = 2.0, window_s: float = 600, **rules: Any
) -> AsyncIterator[Appender]:
    redis = server.settings().model_copy(update={"connect_timeout_s": timeout_s})
    shards = shard_map(redis)
    await shards.refresh()
    appender = Appender(
        shards=shards,
        keys=keys,
        redis=redis,
        settings=PublishSettings(timeout_s=timeout_s, uid_window_s=window_s),
        namespace_of=lambda _: NamespaceSettings(**rules),
    )
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(appender.run())
        try:
            yield appender
        finally:
            task.cancel()


async def entries(admin: Redis, keys: Keys) -> list[tuple[EntryID, bytes]]:
    found: Any = await admin.xrange(keys.stream(NEWS))
    return [(EntryID.parse(entry_id), fields[b"data"]) for entry_id, fields in found]


async def test_appends_of_one_turn_keep_their_order_and_get_their_ids(
    server: Server, admin: Redis, keys: Keys
) -> None:
    async with appending(server, keys) as appender:
        futures = [
            appender.append(NEWS, [b"data", b"%d" % n], f"u{n}" if n % 3 else None)
            for n in range(2500)
        ]
        ids = [await future for future in futures]
    assert await entries(admin, keys) == [(ids[n], b"%d" % n) for n in range(2500)]


async def test_a_turn_is_a_pipeline(server: Server, admin: Redis, keys: Keys) -> None:
    async with appending(server, keys) as appender:
        await appender.append(NEWS, [b"data", b"0"])
        before = (await admin.info("stats"))["total_reads_processed"]
        for future in [appender.append(NEWS, [b"data", b"1"]) for _ in range(500)]:
            await future
        after = (await admin.info("stats"))["total_reads_processed"]
    assert after - before < 10


async def test_a_uid_is_appended_once_within_its_window(
    server: Server, admin: Redis, keys: Keys
) -> None:
    async with appending(server, keys, window_s=0.5) as appender:
        twice = [appender.append(NEWS, [b"data", b"%d" % n], "u") for n in range(2)]
        first, second = [await each for each in twice]
        assert first == second
        assert await appender.append(Channel("other"), [b"data", b"1"], "u")
        assert await admin.xlen(keys.stream(Channel("other"))) == 1
        while await admin.exists(keys.uid(NEWS, "u")):
            await asyncio.sleep(0.05)
        assert await appender.append(NEWS, [b"data", b"2"], "u") > first
    assert [data for _, data in await entries(admin, keys)] == [b"0", b"2"]


async def test_without_a_window_a_uid_is_only_a_field(
    server: Server, admin: Redis, keys: Keys
) -> None:
    async with appending(server, keys, window_s=0) as appender:
        assert await appender.append(NEWS, [b"data", b"1"], "u") != await appender.append(
            NEWS, [b"data", b"1"], "u"
        )


async def test_a_stream_is_trimmed_as_its_namespace_says(
    server: Server, admin: Redis, keys: Keys
) -> None:
    async with appending(server, keys, retention_count=100) as appender:
        for future in [appender.append(NEWS, [b"data", b"1"]) for _ in range(1000)]:
            await future
    assert 100 <= await admin.xlen(keys.stream(NEWS)) <= 300


async def test_a_refusal_concerns_its_append_only(server: Server, admin: Redis, keys: Keys) -> None:
    await admin.set(keys.stream(NEWS), "no stream")
    async with appending(server, keys) as appender:
        refused = [appender.append(NEWS, [b"data", b"1"], uid) for uid in (None, "u")]
        fine = appender.append(Channel("other"), [b"data", b"1"])
        for each in refused:
            with pytest.raises(CommandRefused, match="WRONGTYPE"):
                await each
        assert await fine


async def test_flushed_scripts_come_back(server: Server, admin: Redis, keys: Keys) -> None:
    async with appending(server, keys) as appender:
        first = await appender.append(NEWS, [b"data", b"1"], "u")
        await command(admin, "SCRIPT", "FLUSH")
        assert await appender.append(NEWS, [b"data", b"1"], "u") == first


@pytest.mark.parametrize("loads", [False, True])
async def test_removed_scripts_do_not_change_the_order(
    server: Server, admin: Redis, keys: Keys, loads: bool
) -> None:
    async def flush() -> None:
        await command(admin, "SCRIPT", "FLUSH")
        # As another worker does it.
        for script in (APPEND_ONCE, APPEND_CHANGED) if loads else ():
            await command(admin, "SCRIPT", "LOAD", script.text)

    sent: list[tuple[bytes, asyncio.Future[EntryID]]] = []
    waits = Durability.parse("replicated:1:1")
    async with appending(server, keys, timeout_s=15) as appender, asyncio.TaskGroup() as tasks:
        for number in range(1500):
            if number % 50 == 0:
                tasks.create_task(flush())
            data, kind = b"%d" % number, number % 7
            fields = [b"type", b"n", b"data", data]
            if kind in (1, 3, 4):
                future = appender.append(NEWS, fields, f"u{number}")
            elif kind == 5:
                future = appender.append(NEWS, fields, unless_latest=b"data")
            elif number % 100 == 0:
                future = appender.append(NEWS, fields, durability=waits)
            else:
                future = appender.append(NEWS, fields)
            sent.append((data, future))
            if kind in (0, 4):
                await asyncio.sleep(0)
        await asyncio.wait([future for _, future in sent])
    appended = [data for _, data in await entries(admin, keys)]
    assert appended == sorted(appended, key=int)
    # NotDurable: appended, but there is no replica.
    answered = [
        data
        for data, future in sent
        if future.exception() is None or isinstance(future.exception(), NotDurable)
    ]
    assert answered == appended
    assert loads or len(appended) == len(sent)


async def test_an_append_is_counted_and_ends_while_its_durability_is_examined(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    # The user may not use WAITAOF, so the server is asked again for each append.
    fsynced = Durability.parse("fsynced")
    server = Server(tmp_path, flavour)
    with running(server):
        async with appending(server, keys, timeout_s=15) as appender:
            with pytest.raises(DurabilityUnavailable):
                await appender.append(NEWS, [b"data", b"1"], durability=fsynced)
            server.freeze()
            pending = appender.append(NEWS, [b"data", b"2"], durability=fsynced)
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(appender) == 1
        server.thaw()
        await asyncio.wait([pending], timeout=10)
        assert isinstance(pending.exception(), RedisUnavailable)


async def test_no_caller_waits_longer_than_the_limit(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    loop = asyncio.get_running_loop()
    server = Server(tmp_path, flavour)

    async def succeed() -> None:
        # A busy machine may take longer than the time limit.
        while True:
            with contextlib.suppress(RelayError):
                await appender.append(NEWS, [b"data", b"1"])
                return

    with running(server):
        async with appending(server, keys, timeout_s=0.5) as appender:
            await succeed()
            server.freeze()
            for uid in (None, "u"):
                begun = loop.time()
                with pytest.raises(RedisUnavailable):
                    await appender.append(NEWS, [b"data", b"2"], uid)
                assert loop.time() - begun < 8
            server.thaw()
            await asyncio.to_thread(server.kill)
            with pytest.raises(RelayError):
                await appender.append(NEWS, [b"data", b"3"])
            await asyncio.to_thread(server.start)
            await succeed()


_REPLICATED = Durability.parse("replicated:1:50")


async def _first_of_two_connections(appender: Appender, admin: redis.Redis) -> int:
    """Return the ID of the connection for the default durability. The other one is open as well."""
    other = Channel("other")
    await appender.append(other, [b"data", b"1"])
    with pytest.raises(NotDurable):
        await appender.append(other, [b"data", b"1"], durability=_REPLICATED)
    return min(int(each["id"]) for each in admin.client_list() if each["name"] == "relay")


async def test_appends_that_are_sent_again_keep_their_order(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    other = Channel("other")
    server = Server(tmp_path, flavour)
    with running(server), server.client() as admin:
        async with appending(server, keys, timeout_s=10) as appender:
            first = await _first_of_two_connections(appender, admin)
            admin.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
            repeated, lost = [], []
            for number in range(5):
                repeated.append(appender.append(NEWS, [b"data", b"%d" % number], str(number)))
                lost.append(appender.append(other, [b"data", b"1"]))
                await asyncio.sleep(0.01)  # so that each is a pipeline of its own
            last = appender.append(NEWS, [b"data", b"last"], durability=_REPLICATED)
            admin.execute_command("CLIENT", "KILL", "ID", first)
            for each in lost:
                with pytest.raises(RedisUnavailable):
                    await each
            admin.execute_command("CLIENT", "UNPAUSE")
            for each in repeated:
                await each
            with pytest.raises(NotDurable):
                await last
        found = [fields[b"data"] for _, fields in admin.xrange(keys.stream(NEWS))]
        assert found == [b"0", b"1", b"2", b"3", b"4", b"last"]


async def test_the_last_append_that_is_sent_again_may_end_first(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    other = Channel("other")
    server = Server(tmp_path, flavour)
    with running(server), server.client() as admin:
        async with appending(server, keys, timeout_s=10) as appender:
            first = await _first_of_two_connections(appender, admin)
            admin.execute_command("CLIENT", "PAUSE", 1000, "WRITE")
            lost = appender.append(other, [b"data", b"1"])
            early = appender.append(NEWS, [b"data", b"early"], "early")
            cancelled = appender.append(other, [b"data", b"1"], "cancelled")
            await asyncio.sleep(0.1)
            # No new connection is ready before the other one gets its append.
            with admin.pipeline(transaction=False) as commands:
                commands.execute_command("CLIENT", "KILL", "ID", first)
                commands.execute_command("CLIENT", "PAUSE", 1000, "ALL")
                commands.execute()
            with contextlib.suppress(RedisUnavailable):
                await lost
            cancelled.cancel()
            late = appender.append(NEWS, [b"data", b"late"], durability=_REPLICATED)
            await early
            with pytest.raises(NotDurable):
                await late
        found = [fields[b"data"] for _, fields in admin.xrange(keys.stream(NEWS))]
        assert found == [b"early", b"late"]


@contextlib.contextmanager
def replicated(folder: Path, flavour: Flavour) -> Iterator[tuple[Server, Server]]:
    """Run a primary and a replica that has received everything."""
    primary = Server(folder / "primary", flavour)
    replica = Server(folder / "replica", flavour, replica_of=primary)
    with running(primary, replica):
        with primary.client() as admin:
            confirmed = 0
            while not confirmed:
                admin.xadd("other", {"a": "b"})
                confirmed = admin.execute_command("WAIT", 1, 100)
            if primary.has("waitaof"):
                admin.execute_command("ACL", "SETUSER", "relay", "+waitaof")
        yield primary, replica


async def test_success_means_that_the_replicas_have_it(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    wanted = Durability.parse("replicated:1:400")
    with replicated(tmp_path, flavour) as (primary, replica):
        async with appending(primary, keys, timeout_s=10, durability="replicated") as appender:
            entry_id = await appender.append(NEWS, [b"data", b"1"])
            assert await appender.append(NEWS, [b"data", b"a"], "known")
            with replica.client() as other:
                assert other.xrange(keys.stream(NEWS))[0][0] == str(entry_id).encode()
            replica.freeze()
            with pytest.raises(NotDurable, match="appended as .* but 0 of 1 replicas .* 400 ms"):
                await appender.append(NEWS, [b"data", b"2"], "u", durability=wanted)
        # The first appends on a connection. The second one writes nothing, because its uid is
        # known, but it is the answer about the same entry.
        async with appending(primary, keys) as appender:
            for uid in ("u", "new"):
                with pytest.raises(NotDurable) as caught:
                    await appender.append(NEWS, [b"data", b"2"], uid, durability=wanted)
                assert caught.value.entry_id
        with primary.client() as admin:
            assert admin.xlen(keys.stream(NEWS)) == 4
        replica.thaw()


async def test_appends_wait_for_replicas_together(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    with replicated(tmp_path, flavour) as (primary, replica), primary.client() as admin:
        async with appending(primary, keys, durability="replicated") as appender:
            await appender.append(NEWS, [b"data", b"1"])
            replica.freeze()
            admin.config_resetstat()
            appends = [appender.append(NEWS, [b"data", b"2"])]
            while not admin.info("clients")["blocked_clients"]:
                await asyncio.sleep(0.01)
            # They wait for the first one, and have less time. They need several pipelines.
            appends += [appender.append(NEWS, [b"data", b"2"]) for _ in range(3500)]
            for each in appends:
                with pytest.raises(NotDurable):
                    await each
            assert admin.info("commandstats")["cmdstat_wait"]["calls"] == 2
            replica.thaw()


async def test_each_durability_is_confirmed_by_itself(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    def begin(text: str, channel: str = "news") -> asyncio.Future[EntryID]:
        wanted = Durability.parse(text)
        return appender.append(Channel(channel), [b"data", b"1"], durability=wanted)

    with replicated(tmp_path, flavour) as (primary, replica), primary.client() as admin:
        async with appending(primary, keys, timeout_s=20) as appender:
            # Nobody waits for a publisher that wants more replicas than there are, whether they use
            # the same channel at the same time, or another one.
            many, one = begin("replicated:3:15000"), begin("replicated")
            assert await one
            while not admin.info("clients")["blocked_clients"]:
                await asyncio.sleep(0.01)
            assert await begin("replicated", "other")
            assert not many.done()
            many.cancel()
        async with appending(primary, keys, timeout_s=2) as appender:
            replica.freeze()
            long, short = begin("replicated:1:1500"), begin("replicated:1:100")
            on_disk = begin("fsynced:0:1400") if primary.has("waitaof") else None
            with pytest.raises(NotDurable, match="0 of 1 replicas .* within 100 ms"):
                await short
            assert not long.done()
            # Of the same channel, so by the same connection, which waits for one after another.
            assert on_disk is None or await on_disk
            with pytest.raises(NotDurable, match="0 of 1 replicas .* within 1500 ms"):
                await long
            both = [begin("replicated")]
            if primary.has("waitaof"):
                both.append(begin("fsynced:1"))
            for each in both:
                with pytest.raises(NotDurable, match="0 of 1 replicas have .* within 1[56].. ms"):
                    await each
            replica.thaw()


async def test_a_channel_keeps_its_order_whatever_durability_its_requests_choose(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    other = Channel("other")
    with replicated(tmp_path, flavour) as (primary, replica):
        names = ("fast", "replicated", *(("fsynced",) if primary.has("waitaof") else ()))
        for usual in ("fast", "replicated"):
            async with appending(primary, keys, timeout_s=10, durability=usual) as appender:
                choices = random.Random(5)
                futures = []
                for n in range(600):
                    chosen = choices.choice((None, *map(Durability.parse, names)))
                    futures.append(appender.append(NEWS, [b"data", b"%d" % n], durability=chosen))
                    futures.append(appender.append(other, [b"data", b"%d" % n]))
                    if not n % 50:
                        await futures[choices.randrange(len(futures))]
                for future in futures:
                    await future
            with primary.client() as admin:
                for channel in (NEWS, other):
                    found = [fields[b"data"] for _, fields in admin.xrange(keys.stream(channel))]
                    assert found == [b"%d" % n for n in range(600)]
                admin.delete(keys.stream(NEWS), keys.stream(other))
        # Appends that wait for a stalled replica don't delay others.
        async with appending(primary, keys, timeout_s=10) as appender:
            replica.freeze()
            slow = appender.append(NEWS, [b"data", b"1"], durability=Durability.parse("replicated"))
            assert await appender.append(other, [b"data", b"1"])
            assert not slow.done()
            replica.thaw()
            assert await slow


async def test_a_rejected_append_is_not_waited_for(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    server = Server(tmp_path, flavour)
    with running(server), server.client() as admin:
        admin.set(keys.stream(NEWS), "no stream")
        async with appending(server, keys, timeout_s=20) as appender:
            for _ in range(2):
                long, short = (Durability.parse(f"replicated:1:{ms}") for ms in (15_000, 100))
                rejected = appender.append(NEWS, [b"data", b"1"], durability=long)
                unconfirmed = appender.append(Channel("other"), [b"data", b"1"], durability=short)
                async with asyncio.timeout(10):
                    await asyncio.wait([rejected, unconfirmed])
                assert isinstance(rejected.exception(), CommandRefused)
                assert isinstance(unconfirmed.exception(), NotDurable)


async def test_an_append_whose_caller_was_cancelled_is_not_made_later(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    wanted = Durability.parse("replicated:1:1000")
    with replicated(tmp_path, flavour) as (primary, replica), primary.client() as admin:
        async with appending(primary, keys, timeout_s=10) as appender:
            replica.freeze()
            before = appender.append(Channel("other"), [b"data", b"1"], durability=wanted)
            while not admin.info("clients")["blocked_clients"]:
                await asyncio.sleep(0.01)
            cancelled = appender.append(NEWS, [b"data", b"1"], durability=wanted)
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.sleep(0)
            await appender.append(NEWS, [b"data", b"2"])
            with pytest.raises(NotDurable):
                await before
            replica.thaw()
            assert await appender.append(NEWS, [b"data", b"3"], durability=wanted)
            found = [fields[b"data"] for _, fields in admin.xrange(keys.stream(NEWS))]
            assert found == [b"2", b"3"]


async def test_a_publisher_outside_relay_chooses_a_durability_as_well(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    with replicated(tmp_path, flavour) as (primary, replica), primary.client() as admin:
        spool = tmp_path / "spool"
        url = primary.url("producer")
        async with (
            AsyncPublisher(url, limit_ms=8000) as plain,
            AsyncPublisher(url, limit_ms=8000, spool=spool) as spooling,
        ):
            assert await plain.publish("news", 1, durability="replicated")
            with pytest.raises(InvalidEvent, match="durability must be"):
                await plain.publish("news", 1, durability="disk")
            replica.freeze()
            with pytest.raises(PublishFailed, match="appended as .* but 0 of 1 replicas") as caught:
                await plain.publish("news", 2, durability="replicated:1:100")
            assert caught.value.unknown
            # It stays in the spool with its durability until a replica has it.
            assert await spooling.publish("news", 3, durability="replicated:1:100") is None
            with pytest.raises(PublishFailed):
                await spooling.flush(1000)
            replica.thaw()
            while spool.stat().st_size:
                with contextlib.suppress(PublishFailed):
                    await spooling.flush()
            assert admin.xlen(keys.stream(NEWS)) == 3


async def test_appends_that_arrive_during_a_wait_have_enough_time(tmp_path: Path) -> None:
    # A replica reports once per second what it has written to disk.
    with replicated(tmp_path, "valkey") as (primary, _):
        if not primary.has("waitaof"):
            pytest.skip("no WAITAOF")
        async with appending(primary, Keys("relay:"), durability="fsynced:1") as appender:
            appends = []
            for _ in range(50):
                appends.append(appender.append(NEWS, [b"data", b"1"]))
                await asyncio.sleep(0.05)
            await asyncio.wait(appends)
        missed = [each for each in appends if isinstance(each.exception(), NotDurable)]
        # Tolerate some on a busy machine. Half of them had too little time.
        assert len(missed) < len(appends) / 5


async def test_events_are_on_disk_or_the_answer_says_why_not(
    tmp_path: Path, flavour: Flavour, keys: Keys
) -> None:
    fsynced = Durability.parse("fsynced:0:2000")
    with replicated(tmp_path, flavour) as (primary, _), primary.client() as admin:
        async with appending(primary, keys, timeout_s=10) as appender:
            if not primary.has("waitaof"):
                why = "no WAITAOF; it needs Redis 7.2 or newer, or Valkey. Nothing was appended"
                with pytest.raises(DurabilityUnavailable, match=why):
                    await appender.append(NEWS, [b"data", b"1"], durability=fsynced)
                assert not admin.exists(keys.stream(NEWS))
                return
            assert await appender.append(NEWS, [b"data", b"1"], durability=fsynced)
            # With `no`, only the kernel decides when the file is written to disk.
            admin.config_set("appendfsync", "no")
            with pytest.raises(NotDurable, match="primary has not written it to disk within 2000"):
                await appender.append(NEWS, [b"data", b"2"], durability=fsynced)
        async with appending(primary, keys) as appender:
            admin.config_set("appendonly", "no")
            with pytest.raises(DurabilityUnavailable, match="set appendonly yes"):
                await appender.append(NEWS, [b"data", b"3"], durability=fsynced)
            admin.execute_command("ACL", "SETUSER", "relay", "-waitaof")
            with pytest.raises(DurabilityUnavailable, match=r"\+waitaof in docs/redis.md"):
                await appender.append(NEWS, [b"data", b"3"], durability=fsynced)
            assert admin.xlen(keys.stream(NEWS)) == 2


async def test_what_equals_the_newest_of_its_type_is_not_appended_again(
    server: Server, admin: Redis, keys: Keys
) -> None:
    """Two appenders publish the same values, as two sources of the same facts do."""

    def update(commit: str, kind: str = "update") -> list[bytes]:
        return [b"data", b"1", b"type", kind.encode(), b"commit", commit.encode()]

    async with appending(server, keys) as one, appending(server, keys) as two:

        async def append(commit: str, by: Appender = one) -> EntryID:
            return await by.append(NEWS, update(commit), unless_latest=b"commit")

        first = await append("a")
        assert await append("a", two) == first
        both = [each.append(NEWS, update("b"), unless_latest=b"commit") for each in (one, two)]
        second, again = [await each for each in both]
        assert second == again > first
        # Equal to the first entry, which is not the latest, so it is appended.
        third = await append("a")
        assert third > second
        # Other types in between, one with the same value in it, have no effect ...
        for _ in range(40):
            await one.append(NEWS, update("a", "other"))
        assert await append("a", two) == third
        # ... but an entry without the field has one: it is the latest of its type.
        await one.append(NEWS, [b"data", b"1", b"type", b"update"])
        fourth = await append("a")
        assert fourth > third
        # An entry that was removed from the stream is not compared.
        await admin.delete(keys.stream(NEWS))
        await append("a")
        assert await admin.xlen(keys.stream(NEWS)) == 1
        await admin.set(keys.stream(Channel("not a stream")), "x")
        with pytest.raises(CommandRefused):
            await one.append(Channel("not a stream"), update("a"), unless_latest=b"commit")
