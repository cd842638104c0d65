"""Server-sent events with the libraries that applications use, in Chromium, Python and Node."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from selenium.webdriver import Chrome

from tests.support.browser import chromium
from tests.support.clients import until
from tests.support.cutter import Cutter, cutting
from tests.support.npm import environment, node, node_modules
from tests.support.pypi import run
from tests.support.relay import RelayProcess
from tests.support.sockjs import serving
from tests.support.valkey import Server, free_port

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]
SUPPORT = Path(__file__).parents[1] / "support"
KINDS = ("native", "old", "polyfill", "fetch")
TEXT = "é 😀 100% %41 \u2028 </script>"
# Texts that something between the producer and the page could change. With CR and CR LF, which
# server-sent events cannot carry, they are sent in envelopes only.
TEXTS = (
    *("plain", "", " ", "  two spaces", "ends with a space ", "\t", ":", ": comment", "data: x"),
    *("id: 1", "event: error", "retry: 1", "a\nb", "\n", "\n\n", "a\n\nb", "\na", "a\n"),
    *("100% sure", "%41%42", "%u0041", "%", "</script>", "<!--", "]]>", "&amp;", "\\", "\\n"),
    *("\0", "\x1e", "\x7f", "\u0085", "\u2028", "\u2029", "\ufeff", "\ufffd", "é 😀"),
)


@pytest.fixture(scope="module")
def page_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def relay(valkey: Server, page_port: int) -> Iterator[RelayProcess]:
    setting = f"protocol:native.allowed_origins=http://127.0.0.1:{page_port}"
    process = RelayProcess(valkey, settings=[setting]).start()
    yield process
    process.kill()


async def _page(_request: web.Request) -> web.Response:
    text = (SUPPORT / "event_source_page.html").read_text()
    return web.Response(text=text, content_type="text/html")


async def _library(request: web.Request) -> web.FileResponse:
    file = node_modules() / request.match_info["file"]
    # Modules import each other without the ending.
    return web.FileResponse(file if file.suffix else file.with_suffix(".js"))


async def test_libraries_in_a_browser(relay: RelayProcess, page_port: int, tmp_path: Path) -> None:
    pages: list[web.AbstractRouteDef] = [web.get("/", _page), web.get("/npm/{file:.*}", _library)]
    async with serving(pages, page_port), cutting(relay.port) as cutter:
        with chromium(tmp_path / "profile") as browser:
            await asyncio.to_thread(browser.get, f"http://127.0.0.1:{page_port}/")
            await until(lambda: browser.execute_script("return window.ready"))
            await _libraries(browser, relay, cutter)
            await _texts(browser, relay)


async def _got(browser: Chrome, name: str, count: int) -> list[list[Any]]:
    """Return what a client has received, without its openings, once it is this much."""

    def found() -> list[list[Any]]:
        script = "return window.got[arguments[0]]"
        every: list[list[Any]] = browser.execute_script(script, name)
        return [each for each in every if each[0] not in ("open", "relay:open", "error")]

    await until(lambda: len(found()) >= count, 30)
    return found()


async def _start(browser: Chrome, name: str, kind: str, url: str, token: str) -> None:
    browser.execute_script("start(...arguments)", name, kind, url, token)
    script = "return window.got[arguments[0]].length"
    if kind != "websocket":
        await until(lambda: browser.execute_script(script, name))


async def _libraries(browser: Chrome, relay: RelayProcess, cutter: Cutter) -> None:
    token = relay.token()
    for kind in KINDS:
        url = f"http://127.0.0.1:{cutter.port}/sse?channel=libraries"
        await _start(browser, kind, kind, url, token)
    url = f"ws://127.0.0.1:{relay.port}/ws?channel=libraries"
    await _start(browser, "websocket", "websocket", url, token)
    # The reply to the subscription.
    await _got(browser, "websocket", 1)
    relay.xadd("libraries", data=json.dumps({"text": TEXT}))
    # A browser would call the application's onerror with it.
    relay.xadd("libraries", data='"a type"', type="error")
    received = [{"text": TEXT}, "a type"]
    for kind in KINDS:
        assert _data(kind, await _got(browser, kind, 2)) == received, kind
    assert [each[1]["data"] for each in (await _got(browser, "websocket", 3))[1:]] == received
    # The libraries reconnect with their positions, each in its own way.
    while len(cutter):
        cutter.cut(0)
    relay.xadd("libraries", data='"missed"')
    for kind in KINDS:
        assert _data(kind, await _got(browser, kind, 3)) == [*received, "missed"], kind


def _data(kind: str, events: list[list[Any]]) -> list[Any]:
    assert {each[0] for each in events} <= {"message", ""}, events
    return [json.loads(each[1]) if kind == "native" else each[1] for each in events]


async def _texts(browser: Chrome, relay: RelayProcess) -> None:
    """Send each text as it is and in an envelope: the page receives the same."""
    for name, texts in (("plain", TEXTS), ("envelope", [each + "\r\n\r" for each in TEXTS])):
        url = f"{relay.url}/sse?channel={name}"
        url += "&envelope=1" if name == "envelope" else ""
        await _start(browser, name, "native", url, relay.token())
        for text in texts:
            relay.xadd(name, data=text)
        found = [each[1] for each in await _got(browser, name, len(texts))]
        if name == "envelope":
            found = [json.loads(each)["data"] for each in found]
        wrong = [pair for pair in zip(texts, found, strict=True) if pair[0] != pair[1]]
        assert wrong == []


@pytest.mark.parametrize("library", ["sseclient", "requests"])
async def test_libraries_in_python(relay: RelayProcess, library: str) -> None:
    """They take text for Latin-1 unless the server names the charset."""
    channel = f"python-{library}"
    first = relay.xadd(channel, data="0")
    relay.xadd(channel, data=json.dumps(TEXT, ensure_ascii=False))
    relay.xadd(channel, data='"later"')
    url = f"{relay.url}/sse?channel={channel}&token={relay.token()}&last_event_id={first}"
    script = str(SUPPORT / "sse_python.py")
    done = await asyncio.to_thread(run, "sseclient-0.0.27", [script, library, url, "3"])
    assert done.returncode == 0, done.stderr
    opened, *events = json.loads(done.stdout)
    assert opened[0] == "relay:open"
    assert events == [["message", TEXT], ["message", "later"]]


async def test_a_proxy_that_compresses(relay: RelayProcess) -> None:
    """Without `no-transform` it would hold back even the head."""
    process = await asyncio.create_subprocess_exec(
        *(node(), str(SUPPORT / "compressing_proxy.cjs"), relay.url),
        env=await asyncio.to_thread(environment),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        url = f"http://127.0.0.1:{port}/sse?channel=compressed&token={relay.token()}"
        async with (
            asyncio.timeout(30),
            aiohttp.ClientSession() as http,
            http.get(url, headers={"Accept-Encoding": "gzip"}) as answer,
        ):
            lines = answer.content
            while not (await lines.readline()).startswith(b"event: relay:open"):
                pass
            relay.xadd("compressed", data="1")
            while await lines.readline() != b"data: 1\n":
                pass
    finally:
        process.kill()
        await process.wait()
