"""Centrifugo's HTTP API while Redis is unreachable: clear errors, and a complete recovery."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.centrifugo_client import SECRET, centrifugo
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, running

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
RULES = [
    f"protocol:centrifugo.secret={SECRET}",
    "protocol:centrifugo:here.presence=true",
    "protocol:centrifugo:here.join_leave=true",
    "protocol:centrifugo:here.history_size=5",
    "protocol:centrifugo:here.history_lifetime=60",
    "redis.command_timeout_s=2",
]


async def test_the_api_says_so_and_presence_is_written_again(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # Without persistence, so that the server loses its data.
    server = Server(tmp_path_factory.mktemp("own"), options=("--save", ""))
    with running(server):
        relay = RelayProcess(server, settings=RULES)
        await asyncio.to_thread(relay.start)
        try:
            async with centrifugo(relay.url) as site:
                anna, bob = await site.client("anna"), await site.client("bob")
                for each in (anna, bob):
                    await each.subscribe("here:x")
                server.stop()
                for method in ("presence", "history"):
                    reply = await site.api(method, channel="here:x")
                    assert reply["error"] == "internal server error"
                    assert reply["body"] == {"channel": "here:x", "data": None}
                for method in ("channels", "stats"):
                    reply = await site.api(method)
                    assert (reply["error"], reply["body"]) == (
                        "internal server error",
                        {"data": None},
                    )
                for method in ("unsubscribe", "disconnect"):
                    reply = await site.api(method, user="nobody")
                    assert (reply["error"], reply["body"]) == ("internal server error", None)
                # This method needs no Redis.
                assert (await site.api("node"))["body"]["data"]["metrics"]["node_num_clients"] == 2
                answer = await site.request(json.dumps([{"method": "channels"}] * 3).encode())
                assert len(json.loads(answer.body)) == 3
                await bob.stop()
                server.start()
                # A loss cannot be excluded, so clients reconnect.
                await anna.until_closed()
                carol = await site.client("carol")
                await carol.subscribe("here:x")
                async with asyncio.timeout(30):
                    while True:
                        reply = await site.api("presence", channel="here:x")
                        if reply["error"] is None and set(reply["body"]["data"]) == {carol.id}:
                            break
                        await asyncio.sleep(0.1)
                with server.client() as admin:
                    admin.delete(*admin.keys("relay:presen*"))
                    async with asyncio.timeout(30):
                        while set(admin.hkeys("relay:presence:{here:x}")) != {carol.id.encode()}:
                            await asyncio.sleep(0.05)
        finally:
            relay.kill()
