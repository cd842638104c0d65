"""Events of each kind of producer reach curl, a websocket and a page in Chromium."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web
from selenium.webdriver import Chrome

from tests.support.browser import chromium
from tests.support.clients import SseClient, native, until
from tests.support.relay import ROOT, RelayProcess
from tests.support.tools import TOOLS, Tool, run
from tests.support.valkey import Server, free_port, password_of

pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]
SECRET = "the secret of the api"
CHANNEL = "orders:eu"
# A page of the application, which is served from another origin than relay's.
PAGE = """<!doctype html><title>orders</title><script>
const seen = [];
const events = new EventSource("RELAY/sse?channel=CHANNEL&token=TOKEN");
events.onopen = () => { document.title = "open"; };
events.addEventListener("note", ({ type, data, lastEventId: id }) => seen.push({ id, type, data }));
events.onmessage = ({ type, data, lastEventId: id }) => seen.push({ id, type, data });
</script>"""
BLOCKING = """
import sys
from producers.publisher import Publisher
with Publisher(sys.argv[1], limit_ms=9000) as publisher:
    print(publisher.publish(sys.argv[2], {"by": "python"}, type="note", to="alice, bob"))
"""
ASYNCIO = """
import asyncio, sys
from producers.publisher import AsyncPublisher
async def main():
    async with AsyncPublisher(http=sys.argv[1], secret=sys.argv[3], limit_ms=9000) as publisher:
        print(await publisher.publish(sys.argv[2], {"by": "http"}, type="note", to=["alice"]))
    async with AsyncPublisher(sys.argv[4], limit_ms=9000) as publisher:
        print(await publisher.publish(sys.argv[2], {"by": "asyncio"}, type="note", to=["alice"]))
asyncio.run(main())
"""
# A signed request in shell, as in the documentation of Centrifugo v1.
SIGNED = """
sign=$(printf %s "$BODY" | openssl dgst -sha256 -hmac "$SECRET")
printf %s "$BODY" | curl -sS --data-binary @- -H 'Content-Type: application/json' \\
    -H "X-API-Sign: ${sign##* }" "$URL/api/"
"""


@pytest.fixture
def application() -> int:
    """Return a free port for the application's page."""
    return free_port()


@pytest.fixture
def relay(valkey: Server, application: int) -> Iterator[RelayProcess]:
    settings = [
        f"protocol:centrifugo.secret={SECRET}",
        f"protocol:native.allowed_origins=http://127.0.0.1:{application}",
        "producer:queue.enabled=yes",
        "producer:queue.shards=2",
    ]
    process = RelayProcess(valkey, settings=settings).start()
    yield process
    process.kill()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    with chromium(tmp_path / "chromium") as chrome:
        yield chrome


@asynccontextmanager
async def curl(relay: RelayProcess) -> AsyncIterator[SseClient]:
    """Run `curl -N` with a subscription to the channel."""
    process = await asyncio.create_subprocess_exec(
        *("curl", "-N", "-sS", "-H", f"Authorization: Bearer {relay.token()}"),
        f"{relay.url}/sse?channel={quote(CHANNEL)}",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    try:
        client = SseClient(process.stdout, process.stdin)
        client.opened = await client.block()
        yield client
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def page(relay: RelayProcess, port: int, browser: Chrome) -> AsyncIterator[Chrome]:
    """Open the application's page in Chromium and wait until it is subscribed."""
    text = PAGE.replace("RELAY", relay.url).replace("CHANNEL", quote(CHANNEL))
    text = text.replace("TOKEN", relay.token())

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=text, content_type="text/html")

    application = web.Application()
    application.router.add_get("/", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.to_thread(browser.get, f"http://127.0.0.1:{port}/")
        await until(lambda: browser.title == "open", 30)
        yield browser
    finally:
        await runner.cleanup()


def seen(browser: Chrome) -> list[dict[str, str]]:
    found: list[dict[str, str]] = browser.execute_script("return seen")
    return found


def command(by: str) -> str:
    params = {"channel": CHANNEL, "data": {"by": by}, "type": "note", "to": ["alice"]}
    return json.dumps({"method": "publish", "params": params})


class Producers:
    """The producers. Each method publishes one or two events and returns the reported IDs."""

    def __init__(self, relay: RelayProcess) -> None:
        self.relay = relay
        self.server = relay.server

    async def _run(self, *words: str, **environment: str) -> list[str]:
        done = await run(words, environment)
        assert (done.code, done.err) == (0, ""), (words, done)
        return done.out.splitlines()

    async def _redis_cli(self, *words: str, user: Any = "producer") -> list[str]:
        login = {"REDISCLI_AUTH": password_of(user)}
        where = ("redis-cli", "-p", str(self.server.port), "--user", user)
        return await self._run(*where, *words, **login)

    async def xadd(self) -> list[str]:
        fields = ("type", "note", "to", "alice", "data", '{"by":"xadd"}')
        return await self._redis_cli("XADD", f"relay:stream:{{{CHANNEL}}}", "*", *fields)

    async def rpush(self) -> list[str]:
        for queue in ("centrifugo.api", "centrifugo.api.1"):
            # The documented producer user may append to streams, but not push to the queue.
            await self._redis_cli("RPUSH", queue, command(queue), user="admin")
        return ["", ""]

    async def signed_post(self) -> list[str]:
        given = {"BODY": command("post"), "SECRET": SECRET, "URL": self.relay.url}
        (answer,) = await self._run("sh", "-c", SIGNED, **given)
        assert answer == '[{"method":"publish","error":null,"body":null}]'
        return [""]

    async def python(self) -> list[str]:
        path = {"PYTHONPATH": str(ROOT)}
        url = self.server.url("producer")
        ids = await self._run(sys.executable, "-c", BLOCKING, url, CHANNEL, **path)
        words = ("-c", ASYNCIO, self.relay.url, CHANNEL, SECRET, url)
        return ids + await self._run(sys.executable, *words, **path)

    async def other_languages(self) -> list[str]:
        ids = []
        options = ("--type", "note", "--to", "alice, bob", "--limit-ms", "9000")
        for name in TOOLS:
            tool = Tool.of(name, self.server)
            done = await tool.run(CHANNEL, json.dumps({"by": name}), *options)
            assert (done.code, done.err) == (0, ""), done
            ids += done.out.splitlines()
        tool = Tool("sh", {"PUBLISH_API_SECRET": SECRET})
        done = await tool.run(CHANNEL, '{"by":"sh http"}', *options, "--http", self.relay.url)
        assert (done.code, done.err) == (0, ""), done
        return ids + done.out.splitlines()


async def test_an_event_of_each_producer_is_seen_by_each_client(
    relay: RelayProcess, application: int, browser: Chrome
) -> None:
    producers = Producers(relay)
    async with native(relay) as door, curl(relay) as terminal, page(relay, application, browser):
        ws = await door.ws(CHANNEL)
        await ws.next()  # subscribed
        told: list[str] = []
        frames: list[dict[str, Any]] = []
        for publish in (
            producers.xadd,
            producers.rpush,
            producers.signed_post,
            producers.python,
            producers.other_languages,
        ):
            ids = await publish()
            told += ids
            frames += await ws.take(len(ids))
        names = ["xadd", "centrifugo.api", "centrifugo.api.1", "post", "python", "http", "asyncio"]
        names += [*TOOLS, "sh http"]
        blocks = await terminal.take(len(names))
        await until(lambda: len(seen(browser)) >= len(names))
        shown = seen(browser)
    by = [frame["data"]["by"] for frame in frames]
    # Events from two queues may arrive in any order.
    assert [by[0], *sorted(by[1:3]), *by[3:]] == names
    for frame, block, event, entry_id in zip(frames, blocks, shown, told, strict=True):
        assert frame["id"] == block.id == event["id"]
        assert entry_id in ("", frame["id"])
        assert frame["type"] == block.event == event["type"] == "note"
        assert frame["data"] == block.json() == json.loads(event["data"])
