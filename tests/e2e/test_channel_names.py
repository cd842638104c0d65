"""Channel names of the replaced servers work with each producer and each kind of client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from producers.publisher import AsyncPublisher
from tests.support.centrifuge_js import Node, running_node
from tests.support.cli import Cli
from tests.support.clients import Native, native, redis, until
from tests.support.pydio import KEY, browse, publish, seen_by, standing_in, tree
from tests.support.relay import RelayProcess
from tests.support.socketio import npm_clients
from tests.support.tools import TOOLS, Tool
from tests.support.valkey import Server

# Node and PHP start slowly while other tests use the machine.
pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]
SECRET = "a secret of the application"
SETTINGS = [
    f"protocol:centrifugo.secret={SECRET}",
    "protocol:centrifugo.publish=true",
    # With Centrifugo's default, a channel name with & belongs to a single connection.
    "protocol:centrifugo.client_channel_boundary=",
    "protocol:centrifugo.insecure_api=true",
    "producer:queue.enabled=yes",
]
NAMES = ["ws-ü & co", "{a}}{b", "50%20 off %7B", "tab\tand\nline\r\n", "a?'b"]


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=SETTINGS).start()
    yield process
    process.kill()


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with running_node(SECRET) as found:
        yield found


def command(name: str, data: object) -> str:
    params = {"channel": name, "data": data}
    return json.dumps({"method": "publish", "params": params})


@pytest.mark.parametrize("name", NAMES)
async def test_from_each_producer_to_each_client(
    relay: RelayProcess, door: Native, node: Node, valkey: Server, name: str
) -> None:
    sse, ws = await door.sse(name), await door.ws(name)
    assert (await ws.next())["channel"] == name
    ann = await node.client(f"ws://127.0.0.1:{relay.port}/connection/websocket").connected()
    await ann.subscribed(name)

    async def seen(data: object) -> None:
        assert (await sse.next()).json() == data
        frame = await ws.next()
        assert (frame["channel"], frame["data"]) == (name, data)
        message = await ann.next("message")
        assert (message["channel"], message["data"]) == (name, data)

    await ann.ask("publish", name, data="centrifuge-js")
    await seen("centrifuge-js")
    async with aiohttp.ClientSession() as session:
        headers = {"Content-Type": "application/json"}
        request = session.post(f"{relay.url}/api/", data=command(name, "api"), headers=headers)
        async with request as answer:
            assert (await answer.json())[0]["error"] is None
    await seen("api")
    redis(valkey, "RPUSH", "centrifugo.api", command(name, "queue"))
    await seen("queue")
    async with AsyncPublisher(valkey.url("producer"), limit_ms=9000) as publisher:
        await publisher.publish(name, '"python"', uid="u")
        await publisher.publish(name, '"python"', uid="u")
    await seen("python")
    for tool in TOOLS:
        for uid in ((), ("--uid", f"{tool} 1"), ("--uid", f"{tool} 1")):
            words = (name, json.dumps(tool), *uid, "--limit-ms", "9000")
            done = await Tool.of(tool, valkey).run(*words)
            assert (done.code, done.err) == (0, "")
        await seen(tool)
        await seen(tool)
    done = await Tool("sh", {"PUBLISH_API_SECRET": SECRET}).run(
        name, '"sh http"', "--http", relay.url, "--limit-ms", "9000"
    )
    assert (done.code, done.err) == (0, "")
    await seen("sh http")
    cli = Cli(valkey)
    await cli.out("publish", name, '"cli"')
    await seen("cli")
    # `relay streams` prints the key that an operator needs for redis-cli.
    streams = (await cli.out("streams", "--json")).splitlines()
    (mine,) = [each for each in map(json.loads, streams) if each["channel"] == name]
    redis(valkey, "XADD", mine["key"], "*", "data", '"xadd"')
    await seen("xadd")
    assert mine["key"].count("{") == mine["key"].count("}") == 1
    assert not any(char <= " " for char in mine["key"])
    listed = (await cli.out("streams", name, "--json")).splitlines()
    assert mine["key"] in [json.loads(each)["key"] for each in listed]
    shown = (await cli.out("streams", name)).splitlines()
    assert (f"  key: {mine['key']}" in shown) == (mine["key"] != f"relay:stream:{{{name}}}")
    assert "removed" in await cli.out("trim", name, "--max-entries", "0")


async def test_a_subscriber_leaves_no_key_that_stays(
    relay: RelayProcess, door: Native, valkey: Server
) -> None:
    sse = await door.sse("nobody has\tpublished {here}")
    sse.transport.abort()
    key = "relay:stream:{nobody%20has%09published%20%7Bhere%7D}"
    assert redis(valkey, "KEYS", "relay:*nobody*") in ([], [key.encode()])


async def test_pydio_workspaces(valkey: Server) -> None:
    names = ["ws-ü & co", " {x} ", "50%20"]
    async with standing_in() as pydio, aiohttp.ClientSession() as http, npm_clients() as npm:
        pydio.login("alice").acl = dict.fromkeys(names, "rw")
        settings = [
            f"protocol:pydio.key={KEY}",
            f"protocol:pydio.auth_url={pydio.auth_url}",
            "protocol:pydio.drain_s=0.2",
        ]
        relay = RelayProcess(valkey, settings=settings)
        await asyncio.to_thread(relay.start)
        try:
            page = await browse(http, relay, "alice")
            headers = {"Cookie": "AjaXplorer=alice", "Origin": relay.url}
            modern = await npm.open(relay.url, path="/public", extraHeaders=headers)
            async with native(relay) as door:
                for name in names:
                    sse = await door.sse(f"pydio:{name}", token=relay.token(channels=["pydio:*"]))
                    await seen_by(page, relay, name)
                    await modern.do("ask", "register", name)
                    assert (await modern.until("answer"))["args"][0] == {"ok": True}
                    for form in ("serialize", "json"):
                        content = tree(f"{form} ü & co")
                        sent = [{"REPO_ID": name, "CONTENT": content}]
                        assert await publish(relay.port, sent, form=form) == [
                            "HTTP/1.1 101 Switching Protocols"
                        ]
                        assert await page.next() == content
                        assert (await modern.event())[:2] == ["message", content]
                        while (await sse.next()).data != content:
                            pass  # skip the probes of seen_by()
        finally:
            await asyncio.to_thread(relay.kill)


async def test_what_is_still_refused_says_why(
    relay: RelayProcess, door: Native, node: Node, valkey: Server
) -> None:
    cases = (("", "this one is empty"), ("x" * 256, "this one has 256"))
    for name, why in cases:
        assert why in await Cli(valkey).refused("publish", name, "1")
    answer = await door.get(f"/sse?channel={'x' * 256}")
    assert (answer.status, answer.error["code"]) == (400, "bad_request")
    assert "this one has 256" in answer.error["message"]
    for tool in TOOLS:
        for name, _ in cases:
            done = await Tool.of(tool, valkey).run(name, "1")
            assert done.code == 1
            assert "1 to 255 characters" in done.err
        assert (await Tool.of(tool, valkey).run("ü" * 255, "1", "--limit-ms", "9000")).code == 0
    ann = await node.client(f"ws://127.0.0.1:{relay.port}/connection/websocket").connected()
    ann.tell("subscribe", channel="x" * 256)
    assert (await ann.next("error"))["error"] == "limit exceeded"
    redis(valkey, "RPUSH", "centrifugo.api", command("x" * 256, 1))
    letters = "relay:dead-letters"
    await until(
        lambda: b"this one has 256" in str(redis(valkey, "XRANGE", letters, "-", "+")).encode()
    )
