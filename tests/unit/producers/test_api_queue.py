"""producers/api_queue.py: a command for many channels does not block the event loop."""

from __future__ import annotations

import asyncio

import orjson

from producers.api_queue import Dispatcher
from relay.config.settings import NamespaceSettings
from relay.stream.format.keys import Keys

CHANNELS = [f"c{number}" for number in range(10_000)]


def broadcast(channels: list[str]) -> bytes:
    params = {"channels": channels, "data": {"a": 1}}
    return orjson.dumps({"method": "broadcast", "params": params})


async def test_a_broadcast_to_many_channels_is_prepared_in_slices_and_whole_or_not() -> None:
    dispatcher = Dispatcher(
        keys=Keys("relay:"),
        namespace_of=lambda _: NamespaceSettings(),
        max_entry_bytes=1000,
        uid_window_s=0,
    )
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        counting = tasks.create_task(count())
        operations, reasons = await dispatcher.operations(broadcast(CHANNELS), 0)
        counting.cancel()
    assert len(operations) == len(CHANNELS)
    assert not reasons
    assert turns > 1
    operations, reasons = await dispatcher.operations(broadcast([*CHANNELS[:500], ""]), 0)
    assert not operations
    assert len(reasons) == 1
