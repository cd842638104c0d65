"""Workers are killed while they execute commands: each command is executed once, in order per
shard.

TEST_QUEUE=50000 runs it at full length, with a kill every 2 s. The default is a few thousand.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from relay.core.model import Channel
from relay.stream.connection.connect import redis_client
from relay.stream.format.keys import Keys
from tests.support.producer import ProducerProcess
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running

pytestmark = pytest.mark.redis

FULL = int(os.environ.get("TEST_QUEUE", "0"))
COMMANDS = FULL or 4000
BROKEN = 100
SHARDS = 4
KILL_S = 2.0 if FULL else 1.0
PUSH = 50
SECONDS = 30.0 if FULL else 5.0
SETTINGS = [
    "producer:queue.enabled=yes",
    f"producer:queue.shards={SHARDS}",
    "producer:queue.batch=25",
    "namespace.retention_count=0",
]


def items_of(shard: int) -> list[str]:
    """Return the items for this shard: numbered commands, and some invalid ones."""
    count = COMMANDS // SHARDS
    items = [
        f'{{"method":"publish","params":{{"channel":"c{shard}","data":{n}}}}}' for n in range(count)
    ]
    step = count // (BROKEN // SHARDS)
    for number in range(BROKEN // SHARDS):
        items.insert(number * (step + 1), f'{{"method":"broken {shard} {number}"}}')
    return items


@pytest.mark.slow
@pytest.mark.timeout(180 if FULL else 60)
async def test_each_command_is_applied_once_in_order_while_workers_are_killed(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path)
    keys = Keys("relay:")
    with running(server):
        relay = RelayProcess(server, settings=SETTINGS)
        alone = ProducerProcess(server, "queue", settings=SETTINGS)
        workers: tuple[RelayProcess | ProducerProcess, ...] = (alone, relay)
        await asyncio.to_thread(relay.start)
        alone.start()
        pushed = asyncio.Event()
        try:
            async with (
                redis_client(server.settings("admin")) as admin,
                asyncio.TaskGroup() as tasks,
            ):
                tasks.create_task(_push(admin, pushed))
                for worker in itertools.cycle(workers):
                    await asyncio.sleep(KILL_S)
                    await asyncio.to_thread(worker.kill)
                    await asyncio.to_thread(worker.start)
                    if pushed.is_set():
                        break
                async with asyncio.timeout(30):
                    # Polled, because other processes empty the queues.
                    while await admin.exists(*[f"centrifugo.api.{n}" for n in range(SHARDS)]):
                        await asyncio.sleep(0.05)
                for shard in range(SHARDS):
                    found: Any = await admin.xrange(keys.stream(Channel(f"c{shard}")))
                    numbers = [int(fields[b"data"]) for _, fields in found]
                    assert numbers == list(range(COMMANDS // SHARDS))
                letters: Any = await admin.xrange(keys.dead_letters)
                broken = [json.loads(letter[b"fields"])[0][1] for _, letter in letters]
                assert sorted(broken) == sorted(
                    item for n in range(SHARDS) for item in items_of(n) if "broken" in item
                )
                assert len(broken) == BROKEN
                assert {letter[b"reason"][:14] for _, letter in letters} == {b"unknown method"}
        finally:
            for worker in workers:
                worker.kill()


async def _push(admin: Any, pushed: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    queues = [items_of(shard) for shard in range(SHARDS)]
    begun, steps = loop.time(), -(-len(queues[0]) // PUSH)
    for step in range(steps):
        for shard, items in enumerate(queues):
            part = items[step * PUSH : (step + 1) * PUSH]
            if part:
                await admin.rpush(f"centrifugo.api.{shard}", *part)
        await asyncio.sleep(max(0.0, begun + SECONDS * (step + 1) / steps - loop.time()))
    pushed.set()


async def test_the_shards_of_a_killed_producer_are_taken_over(tmp_path: Path) -> None:
    server = Server(tmp_path)
    keys = Keys("relay:")
    queues = ["centrifugo.api", *(f"centrifugo.api.{n}" for n in range(SHARDS))]
    with running(server):
        alone = [ProducerProcess(server, "queue", settings=SETTINGS) for _ in range(2)]
        try:
            async with redis_client(server.settings("admin")) as admin:

                async def shares(*wanted: int) -> None:
                    async with asyncio.timeout(30):
                        found: list[int] = []
                        while found != list(wanted):
                            await asyncio.sleep(0.05)
                            leases = [keys.lease(f"queue:{queue}") for queue in queues]
                            holders = Counter([await admin.get(lease) for lease in leases])
                            found = sorted(holders.values()) if None not in holders else []

                alone[0].start()
                await shares(5)
                alone[1].start()
                await shares(2, 3)
                await asyncio.to_thread(alone[0].kill)
                await shares(5)
                alone[0].start()
                await shares(2, 3)
        finally:
            for producer in alone:
                producer.kill()


async def test_a_producer_by_itself_takes_commands_and_leaves_in_order(tmp_path: Path) -> None:
    server = Server(tmp_path)
    keys = Keys("relay:")
    with running(server):
        alone = ProducerProcess(server, "queue")
        alone.start()
        try:
            async with redis_client(server.settings("admin")) as admin:
                text = '{"method":"publish","params":{"channel":"c","data":[]}}'
                await admin.rpush("centrifugo.api", text)
                found = await admin.xread({keys.stream(Channel("c")): "0"}, block=10_000)
                assert "[]" in str(found)
                assert await asyncio.to_thread(alone.stop) == 0
                assert not await admin.exists(keys.lease("queue:centrifugo.api"))
        finally:
            alone.kill()
