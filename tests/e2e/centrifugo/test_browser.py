"""centrifuge-js 1.5.0 in Chromium, on a page of another origin, over each of its transports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from selenium.webdriver import Chrome
from selenium.webdriver.support.ui import WebDriverWait

from relay.protocols.centrifugo.tokens import sign
from tests.support.browser import chromium
from tests.support.npm import node_modules
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, free_port

pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(240)]
SECRET = "a secret of the application"
# `iframe-` transports use a page of relay, which loads `sockjs_url`.
TRANSPORTS = [
    "websocket",
    "xhr-streaming",
    "xhr-polling",
    "jsonp-polling",
    "iframe-eventsource",
    "iframe-htmlfile",
    "iframe-xhr-polling",
]
PAGE = """<!doctype html><meta charset="utf-8">
<script src="/sockjs.min.js"></script><script src="/centrifuge.js"></script>
<script>
function talk(given, transport, report) {
  const seen = { messages: [], joined: [] }, raw = transport === 'raw';
  const client = new Centrifuge(Object.assign({
    transports: raw ? undefined : [transport], retry: 50,
    authEndpoint: '/centrifuge/auth/', refreshEndpoint: '/centrifuge/refresh/',
  }, given));
  const fail = (error) => report({ failed: JSON.stringify(error), seen });
  client.on('error', fail);
  client.on('connect', (context) => { seen.transport = context.transport; });
  const room = client.subscribe('$room-' + transport, {
    join: (context) => seen.joined.push(context.data.user),
    message: (message) => seen.messages.push([message.data, message.info.channel_info]),
    error: fail,
    subscribe: async () => {
      try {
        for (const text of ['<\\/b> é 😀 \\u2028', { deep: [1, 2.50, null] }]) {
          await room.publish(text);
        }
        seen.there = Object.values((await room.presence()).data).map((each) => each.user);
        seen.history = (await room.history()).data.map((each) => each.data);
        // The other client's message ends it.
        const wait = setInterval(() => {
          if (seen.messages.length < 3) return;
          clearInterval(wait);
          client.disconnect();
          report(seen);
        }, 20);
        window.ready = true;
      } catch (error) { fail(error); }
    },
  });
  client.connect();
}
</script>"""


@asynccontextmanager
async def application(port: int) -> AsyncIterator[None]:
    """The application's pages with the clients' scripts, and its signatures."""

    async def page(request: web.Request) -> web.Response:
        return web.Response(text=PAGE, content_type="text/html")

    def script(*path: str) -> web.RouteDef:
        body = node_modules().joinpath(*path).read_bytes()

        async def answer(request: web.Request) -> web.Response:
            return web.Response(body=body, content_type="text/javascript")

        return web.get(f"/{path[-1]}", answer)

    async def auth(request: web.Request) -> web.Response:
        asked = await request.json()
        info = '{"by": "ajax"}'
        return web.json_response(
            {
                channel: {
                    "sign": sign(SECRET.encode(), asked["client"], channel, info),
                    "info": info,
                }
                for channel in asked["channels"]
            }
        )

    app = web.Application()
    app.add_routes(
        [
            web.get("/", page),
            web.post("/centrifuge/auth/", auth),
            await asyncio.to_thread(script, "sockjs-client", "dist", "sockjs.min.js"),
            await asyncio.to_thread(script, "centrifuge", "centrifuge.js"),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield
    finally:
        await runner.cleanup()


@pytest.fixture(scope="module")
def pages() -> int:
    """Return the port of the application."""
    return free_port()


@pytest.fixture(scope="module")
def relay(valkey: Server, pages: int) -> Iterator[RelayProcess]:
    settings = {
        "secret": SECRET,
        "publish": "true",
        "presence": "true",
        "join_leave": "true",
        "history_size": "10",
        "history_lifetime": "60",
        "sockjs_url": f"http://127.0.0.1:{pages}/sockjs.min.js",
    }
    process = RelayProcess(
        valkey,
        settings=[f"protocol:centrifugo.{key}={value}" for key, value in settings.items()],
        flags=["--workers", "2"],
    ).start()
    yield process
    process.kill()


async def test_all_features_over_every_transport(
    relay: RelayProcess, pages: int, tmp_path: Path
) -> None:
    async with application(pages):
        found = await asyncio.to_thread(_browse, relay, pages, tmp_path)
    said: list[tuple[Any, Any]] = [
        ("</b> é 😀 \u2028", {"by": "ajax"}),
        ({"deep": [1, 2.5, None]}, {"by": "ajax"}),
    ]
    for transport in ["raw", *TRANSPORTS]:
        seen = found[transport]
        assert seen.get("failed") is None, (transport, seen)
        assert seen["transport"] == ("raw-websocket" if transport == "raw" else transport)
        assert [tuple(each) for each in seen["messages"]] == [*said, ("from elsewhere", None)]
        assert seen["there"] == ["ann"], transport
        assert seen["history"] == [each for each, _ in reversed(said)], transport


def _browse(relay: RelayProcess, pages: int, profile: Path) -> dict[str, Any]:
    with chromium(profile) as browser:
        return {each: _talk(browser, relay, pages, each) for each in ["raw", *TRANSPORTS]}


def _talk(browser: Chrome, relay: RelayProcess, pages: int, transport: str) -> Any:
    # Use a new page for each transport, so that they do not affect each other.
    browser.get(f"http://127.0.0.1:{pages}/")
    path = "ws{}/connection/websocket" if transport == "raw" else "http{}/connection"
    given = {
        "url": path.format(f"://127.0.0.1:{relay.port}"),
        "user": "ann",
        "timestamp": "1500000000",
        "token": sign(SECRET.encode(), "ann", "1500000000"),
    }
    browser.execute_script(
        "window.result = null; talk(arguments[0], arguments[1], (r) => { window.result = r; });",
        given,
        transport,
    )
    wait = WebDriverWait(browser, 25, poll_frequency=0.05)
    wait.until(lambda each: each.execute_script("return !!(window.ready || window.result);"))
    relay.xadd(
        f"$room-{transport}",
        data='"from elsewhere"',
        info='{"user":"bob","client":"b","channel_info":null}',
    )
    found = wait.until(
        lambda each: each.execute_script("return window.result && JSON.stringify(window.result);")
    )
    return json.loads(found)
