"""A first subscription with recovery to a channel without any publication."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.centrifugo_client import SECRET, Centrifugo, centrifugo
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running

RULES = [
    f"protocol:centrifugo.secret={SECRET}",
    "protocol:centrifugo:kept.recover=true",
    "protocol:centrifugo:kept.history_size=5",
    "protocol:centrifugo:kept.history_lifetime=60",
]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Centrifugo]:
    server = Server(tmp_path)
    with running(server):
        relay = RelayProcess(server, settings=RULES)
        await asyncio.to_thread(relay.start)
        try:
            async with centrifugo(relay.url) as made:
                yield made
        finally:
            relay.kill()


@pytest.mark.redis
@pytest.mark.parametrize("last", ["", "0-0"])
async def test_it_stays_connected_and_receives_what_follows(site: Centrifugo, last: str) -> None:
    anna = await site.client("anna")
    body = await anna.subscribe("kept:x", recover=True, last=last)
    assert body["messages"] in (None, [])
    await site.api("publish", channel="kept:x", data={"n": 1})
    assert (await anna.push("message"))["data"] == {"n": 1}
    assert anna.closed is None
    await anna.stop()
