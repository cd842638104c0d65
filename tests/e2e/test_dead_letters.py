"""Each unreadable entry becomes one dead letter, and later events are delivered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from tests.support.clients import Native, native, redis, until
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    """Run a relay with a small limit for the size of entries."""
    process = RelayProcess(valkey, settings=["stream.max_entry_bytes=1024"]).start()
    yield process
    process.kill()


def _letters(server: Server, channel: str) -> list[dict[str, str]]:
    found = []
    for _, fields in redis(server, "XRANGE", "relay:dead-letters", "-", "+"):
        pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2])  # noqa: B905
        letter = {name.decode(): value.decode() for name, value in pairs}
        if letter["stream"] == f"relay:stream:{{{channel}}}":
            found.append(letter)
    return found


async def test_each_is_written_once_by_two_relays_and_the_next_events_flow(
    relay: RelayProcess, door: Native, valkey: Server, channel: str
) -> None:
    other = RelayProcess(valkey, settings=["stream.max_entry_bytes=1024"])
    await asyncio.to_thread(other.start)
    try:
        async with native(other) as second:
            streams = [await door.sse(channel), await second.sse(channel)]
            websocket = await second.ws(channel)
            # The handshake comes before the subscription.
            assert "data" not in await websocket.next()
            ids = {}
            for number, fields in enumerate(
                (
                    {"no": "data"},
                    {"data": "1", "v": "99"},
                    {"data": "x" * 1100},
                    {"data": "1", "to": ""},
                    {"data": "1", "info": "no json"},
                )
            ):
                ids[relay.xadd(channel, **fields)] = fields
                relay.xadd(channel, data=str(number))
            for stream in streams:
                assert [block.json() for block in await stream.take(5)] == list(range(5))
            said = await websocket.take(5)
            assert [each["data"] for each in said] == list(range(5))
            await until(lambda: len(_letters(valkey, channel)) >= 5)
            # A resuming client reads the entries again. This must not write more dead letters.
            replay = await door.sse(channel, last="0-0")
            assert [block.json() for block in await replay.take(5)] == list(range(5))
            letters = {letter["id"]: letter for letter in _letters(valkey, channel)}
            assert len(_letters(valkey, channel)) == len(letters) == 5
            assert letters.keys() == ids.keys()
            reasons = [letters[entry]["reason"] for entry in ids]
            assert reasons[0] == "no data"
            assert "schema" in reasons[1]
            assert "too large" in reasons[2]
            for entry, fields in ids.items():
                assert dict(json.loads(letters[entry]["fields"])) == fields
            # Both workers read the entries, and one of them writes the letter.
            counts = [await each.metric("relay_dead_letters_total") for each in (door, second)]
            assert sum(counts) == 5
    finally:
        other.kill()
