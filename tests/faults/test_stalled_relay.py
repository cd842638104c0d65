"""A relay whose process was suspended for seconds: it gets no invalidations, but keeps
connections."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from tests.support.clients import native, redis, stream_key
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]


async def test_it_reads_on_after_it_stood_still(valkey: Server, channel: str) -> None:
    """Invalidations that are late have still arrived: the connection is kept."""
    relay = RelayProcess(valkey, settings=["stream.canary_s=0.1"])
    await asyncio.to_thread(relay.start)
    try:
        async with native(relay) as door:
            client = await door.sse(channel)
            for number in range(5):
                relay.send(signal.SIGSTOP)
                relay.xadd(channel, data=str(number))
                await asyncio.to_thread(time.sleep, 0.5)
                relay.send(signal.SIGCONT)
                assert (await client.next()).data == str(number)
            assert not any("no invalidation arrived" in line for line in relay.log)
            async with asyncio.timeout(30):
                while await door.status("/readyz") != 200:
                    await asyncio.sleep(0.05)
    finally:
        relay.kill()


async def test_clients_that_come_while_it_is_late_are_served(valkey: Server, channel: str) -> None:
    """The worker was busy for so long that its canary is overdue, but Redis is reachable."""
    relay = RelayProcess(valkey, settings=["stream.canary_s=0.1"])
    await asyncio.to_thread(relay.start)
    try:
        async with native(relay) as door, asyncio.TaskGroup() as tasks:
            first = relay.xadd(channel, data="1")
            for _ in range(3):
                relay.send(signal.SIGSTOP)
                opening = [
                    tasks.create_task(door.sse(channel, last=first), name="resume")
                    for _ in range(50)
                ]
                await asyncio.to_thread(time.sleep, 1.0)
                relay.send(signal.SIGCONT)
                streams = [await each for each in opening]
                opened = [each.opened for each in streams if each.opened is not None]
                assert [each.id is not None for each in opened] == [True] * 50
                for each in streams:
                    each.drop()
    finally:
        relay.kill()


async def test_a_stream_that_is_deleted_while_its_last_client_leaves_is_no_error(
    valkey: Server, channel: str
) -> None:
    """The worker destroys its group in a stream before it is notified of the stream's deletion."""
    relay = RelayProcess(valkey)
    await asyncio.to_thread(relay.start)
    try:
        async with native(relay) as door:
            # The worker does not always notice the client's disconnect first.
            for name in (f"{channel}:{number}" for number in range(5)):
                client = await door.sse(name)
                assert redis(valkey, "XINFO", "GROUPS", stream_key(name))
                relay.send(signal.SIGSTOP)
                redis(valkey, "DEL", stream_key(name))
                client.drop()
                relay.send(signal.SIGCONT)
                # These commands follow on the same connection.
                again = await door.sse(name)
                relay.xadd(name, data="1")
                assert (await again.next()).data == "1"
            assert not [line for line in relay.log if " error " in line], relay.log
    finally:
        relay.kill()
