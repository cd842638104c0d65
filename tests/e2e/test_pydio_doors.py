"""Events of Pydio's PHP reach clients of all protocols that may read the workspace.

Events of any producer reach Pydio's browsers.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.browser import chromium
from tests.support.centrifuge_js import running_node
from tests.support.clients import native, redis
from tests.support.nginx import nginx, recipes
from tests.support.npm import node_modules
from tests.support.pydio import KEY, browse, publish, seen_by, standing_in, tree
from tests.support.relay import RelayProcess
from tests.support.socketio import npm_clients
from tests.support.valkey import Server

# Starting Node, PHP and Chromium takes time on a machine that runs other tests.
pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]
SECRET = "a secret of the application"
RENAME = (
    '<tree><nodes_diff><update><tree filename="/neu – ü.txt" text="neu" is_file="true"'
    ' original_path="/alt.txt"/></update></nodes_diff></tree>'
)


async def test_a_rename_by_php_reaches_clients_of_all_protocols(valkey: Server) -> None:
    async with (
        standing_in() as pydio,
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http,
        npm_clients() as npm,
        running_node(SECRET) as node,
    ):
        pydio.login("alice", w_1="r")
        words = {
            "pydio.key": KEY,
            "pydio.auth_url": pydio.auth_url,
            "pydio.drain_s": 0.2,
            "centrifugo.secret": SECRET,
        }
        settings = [f"protocol:{name}={value}" for name, value in words.items()]
        relay = RelayProcess(valkey, settings=settings)
        await asyncio.to_thread(relay.start)
        try:
            # Clients of other protocols have the right by a token or by the rights hash.
            redis(valkey, "HSET", "relay:rights:{pydio:1}", "carl", "r")
            async with native(relay) as clients:
                stream = await clients.sse("pydio:1", token=relay.token("alice", ["pydio:1"]))
                url = f"ws://127.0.0.1:{relay.port}/connection/websocket"
                carl = await node.client(url, user="carl").connected()
                await carl.subscribed("pydio:1")
                headers = {"Cookie": "AjaXplorer=alice", "Origin": relay.url}
                socket = await npm.open(relay.url, path="/public", extraHeaders=headers)
                await socket.until("connect")
                await socket.do("ask", "register", "1")
                assert (await socket.until("answer"))["args"] == [{"ok": True}]
                page = await browse(http, relay, "alice")
                await seen_by(page, relay, "1")

                async def heard() -> list[Any]:
                    found: list[Any] = [await page.next()]
                    for read in (
                        lambda: stream.next(),
                        lambda: socket.event(),
                        lambda: carl.next("message"),
                    ):
                        while "probe" in str(said := await read()):
                            pass
                        found.append(said)
                    return found

                await publish(relay.port, [{"REPO_ID": "1", "CONTENT": RENAME}])
                by_page, block, event, message = await heard()
                assert by_page == RENAME
                assert block.data == RENAME
                assert event[:2] == ["message", RENAME]
                assert message["data"] == RENAME

                # Any producer may publish, and a right of a user applies in all protocols.
                redis(valkey, "XADD", "relay:stream:{pydio:1}", "*", "data", tree("by XADD"))
                by_page, block, event, message = await heard()
                assert by_page == tree("by XADD")
                assert block.data == tree("by XADD")
                assert event[1] == tree("by XADD")
                assert message["data"] == tree("by XADD")
                await publish(
                    relay.port,
                    [
                        {"REPO_ID": "1", "CONTENT": tree("alice"), "USER_ID": "alice"},
                        {"REPO_ID": "1", "CONTENT": tree("end")},
                    ],
                )
                assert await page.next() == (await stream.next()).data == tree("alice")
                assert (await socket.event())[1] == tree("alice")
                assert (await carl.next("message"))["data"] == tree("end")
        finally:
            await asyncio.to_thread(relay.kill)


async def test_the_documented_page_works(tmp_path: Path, valkey: Server) -> None:
    async with standing_in() as pydio:
        pydio.login("alice", w_1="r")
        pydio.scripts = node_modules() / "socket.io-client" / "dist"
        words = {
            "key": KEY,
            "auth_url": pydio.auth_url,
            "allowed_origins": pydio.origin,
            "drain_s": 0.2,
        }
        settings = [f"protocol:pydio.{name}={value}" for name, value in words.items()]
        relay = RelayProcess(valkey, settings=settings)
        await asyncio.to_thread(relay.start)
        try:
            with chromium(tmp_path / "profile") as chrome:

                async def until(script: str, wanted: object) -> None:
                    async with asyncio.timeout(30):
                        while (
                            await asyncio.to_thread(chrome.execute_script, f"return {script}")
                            != wanted
                        ):
                            await asyncio.sleep(0.05)

                state = "document.getElementById('state').textContent"
                files = "[...files].sort()"
                url = f"{pydio.origin}/example?user=alice&relay={relay.url}"
                await asyncio.to_thread(chrome.get, url)
                await until(state, "connected")
                await asyncio.to_thread(chrome.execute_script, "enter('2')")
                await until(state, "not allowed")
                await asyncio.to_thread(chrome.execute_script, "enter('1')")
                await until(state, "in 1")
                add = '<tree><nodes_diff><add><tree filename="/alt.txt"/></add></nodes_diff></tree>'
                await publish(relay.port, [{"REPO_ID": "1", "CONTENT": add}])
                await until(files, ["/alt.txt"])
                await asyncio.to_thread(relay.kill)
                await until(state, "offline")
                redis(valkey, "XADD", "relay:stream:{pydio:1}", "*", "data", RENAME)
                await asyncio.to_thread(relay.start)
                await until(state, "in 1, nothing missed")
                await until(files, ["/neu – ü.txt"])
                log = await asyncio.to_thread(chrome.get_log, "browser")
                assert not [line for line in log if "Uncaught" in json.dumps(line)]
        finally:
            await asyncio.to_thread(relay.kill)


async def test_behind_the_documented_nginx(tmp_path: Path, valkey: Server) -> None:
    async with (
        standing_in() as pydio,
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http,
        npm_clients() as npm,
    ):
        pydio.login("alice", w_1="r")
        words = {"key": KEY, "auth_url": pydio.auth_url, "drain_s": 0.2}
        settings = [f"protocol:pydio.{name}={value}" for name, value in words.items()]
        relay = RelayProcess(valkey, settings=settings)
        await asyncio.to_thread(relay.start)
        recipe = recipes("docs/pydio.md")["Deploy behind nginx"]
        recipe = recipe.replace(":8090;", f":{relay.port};")
        try:
            with nginx(tmp_path, recipe, {}) as front:
                page = await browse(http, relay, "alice", base=front)
                await seen_by(page, relay, "1")
                pages = []
                for package in ("socket.io-client-2", "socket.io-client"):
                    for transport in ("polling", "websocket"):
                        headers = {"Cookie": "AjaXplorer=alice", "Origin": front}
                        client = await npm.open(
                            front,
                            package=package,
                            path="/public",
                            extraHeaders=headers,
                            transports=[transport],
                        )
                        await client.until("connect")
                        await client.do("ask", "register", "1")
                        assert (await client.until("answer"))["args"] == [{"ok": True}]
                        pages.append(client)
                await publish(relay.port, [{"REPO_ID": "1", "CONTENT": RENAME}])
                assert await page.next() == RENAME
                for client in pages:
                    assert (await client.event())[1] == RENAME
                # The private channel is not reachable from outside, even with the key.
                port = int(front.rpartition(":")[2])
                message = {"REPO_ID": "1", "CONTENT": tree("x")}
                assert await publish(port, [message]) == ["HTTP/1.1 404 Not Found"]
        finally:
            await asyncio.to_thread(relay.kill)
