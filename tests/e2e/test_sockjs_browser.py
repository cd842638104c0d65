"""SockJS in a real browser, with a page from another origin and browser-only transports."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from selenium.webdriver import Chrome
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.browser import chromium
from tests.support.npm import node_modules
from tests.support.sockjs import OPTIONS, EchoDoor, MemoryStore, serving

PAGE = """<!doctype html><meta charset="utf-8"><script src="/sockjs.min.js"></script>
<script>
const said = [];
for (let round = 0; round < 20; round++) said.push('<\\/script> é 😀 \\u2028 "\\\\" ' + round);
// Texts that a transport could change: sockjs-client un-escapes what comes over eventsource.
said.push('100% sure', '%41%42', '%u0041', '%', '\\0', '\\r\\n', '\\r', '\\u2029', '\\ufeff');
said.push('<!--', ']]>', '&amp;', '');
// Past the response limit, so that streams are opened again.
for (let round = 0; round < 20; round++) said.push('x'.repeat(1000) + round);
function talk(url, transport, report) {
  const heard = [], socket = new SockJS(url, null, {transports: [transport]});
  let spoken = null;
  socket.onopen = () => { spoken = socket.transport; said.forEach((each) => socket.send(each)); };
  socket.onmessage = (event) => {
    heard.push(event.data);
    if (heard.length === said.length) socket.send('close please');
  };
  socket.onclose = (event) => report({
    spoken, code: event.code, reason: event.reason,
    same: heard.length === said.length && heard.every((text, at) => text === said[at]),
  });
}
</script>"""

# In the order in which SockJS tries them. The iframe transports are for old browsers.
EVERYWHERE = [
    "websocket",
    "xhr-streaming",
    "eventsource",
    "xhr-polling",
    "jsonp-polling",
    "iframe-eventsource",
    "iframe-xhr-polling",
    "iframe-htmlfile",
]
SAME_ORIGIN = ["htmlfile"]


@pytest.mark.timeout(180)
async def test_every_transport_of_a_browser(tmp_path: Path) -> None:
    script = (node_modules() / "sockjs-client" / "dist" / "sockjs.min.js").read_bytes()

    async def page(request: web.Request) -> web.Response:
        return web.Response(text=PAGE, content_type="text/html")

    async def library(request: web.Request) -> web.Response:
        return web.Response(body=script, content_type="text/javascript")

    static = [web.get("/page", page), web.get("/sockjs.min.js", library)]
    door = EchoDoor("0000000a", MemoryStore(), replace(OPTIONS, heartbeat_s=2.0))
    async with serving([*static, *door.routes]) as here, serving([*static]) as elsewhere:
        results = await asyncio.to_thread(_browse, tmp_path, here, elsewhere)
    wanted = {"code": 3001, "reason": "as you wish", "same": True}
    assert results == {each: {"spoken": each, **wanted} for each in EVERYWHERE + SAME_ORIGIN}


def _browse(profile: Path, here: int, elsewhere: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with chromium(profile) as browser:
        for port, transports in ((elsewhere, EVERYWHERE), (here, SAME_ORIGIN)):
            browser.get(f"http://127.0.0.1:{port}/page")
            for transport in transports:
                results[transport] = _talk(browser, here, transport)
    return results


def _talk(browser: Chrome, port: int, transport: str) -> Any:
    browser.execute_script(
        "window.result = null; talk(arguments[0], arguments[1], (r) => { window.result = r; });",
        f"http://127.0.0.1:{port}/echo",
        transport,
    )
    found = WebDriverWait(browser, 20).until(
        lambda driver: (
            driver.execute_script("return JSON.stringify(window.result);") not in (None, "null")
            and driver.execute_script("return JSON.stringify(window.result);")
        )
    )
    return json.loads(found)
