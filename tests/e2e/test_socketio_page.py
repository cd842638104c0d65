"""AcceleratXR's documented example in a real browser with socket.io-client 4.8."""

from __future__ import annotations

import asyncio
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import chromium
from tests.support.clients import redis, until
from tests.support.npm import node_modules
from tests.support.relay import RelayProcess
from tests.support.socketio import SECRET, axr_token, emitter
from tests.support.valkey import Server, running

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]

PAGE = """<!doctype html><meta charset="utf-8"><title>axr</title><script src="socket.io.js"></script>
<script>
const seen = window.seen = [];
const socket = window.socket = io("%(url)s/axr", { path: "/notifications", auth: { token: "%(token)s" } });
window.pings = 0;
socket.io.on("ping", () => window.pings++);
socket.on("connect", () => seen.push(["connect", socket.recovered]));
socket.on("disconnect", (reason) => seen.push(["disconnect", reason]));
socket.on("msg", (data) => seen.push(["msg", data instanceof ArrayBuffer ? data.byteLength : data]));
</script>
"""  # noqa: E501 - a page


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("services"), acl=False)
    with running(server):
        yield server


@pytest.fixture(scope="module")
def axr(valkey: Server, services: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(
        valkey,
        settings=[
            f"protocol:socketio.secret={SECRET}",
            "protocol:socketio.ping_interval_s=1",
            "protocol:socketio.ping_timeout_s=1",
            f"producer:socketio_emitter.redis_url=redis://127.0.0.1:{services.port}/0",
        ],
    ).start()
    yield process
    process.kill()


@pytest.fixture
def site(axr: RelayProcess, tmp_path: Path) -> Iterator[str]:
    """Serve the page on another origin than relay's, and yield its URL."""
    bundle = node_modules() / "socket.io-client" / "dist" / "socket.io.js"
    (tmp_path / "socket.io.js").write_bytes(bundle.read_bytes())
    page = PAGE % {"url": axr.url, "token": axr_token("page")}
    (tmp_path / "index.html").write_text(page)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, directory=str(tmp_path), **options)  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            """Write no log."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


async def test_the_documents_example_in_a_browser_from_another_origin(
    axr: RelayProcess, services: Server, site: str, tmp_path: Path
) -> None:
    def seen(count: int) -> list[list[object]]:
        found: list[list[object]] = []
        end = time.monotonic() + 20
        while time.monotonic() < end:
            found = browser.execute_script("return window.seen")
            if found and len(found) >= count:
                return found
        raise AssertionError(found)

    with chromium(tmp_path / "profile") as browser:
        browser.get(site)
        assert (await asyncio.to_thread(seen, 1)) == [["connect", False]]
        listening = "socket.io-request#/axr#"
        await until(lambda: redis(services, "PUBSUB", "NUMSUB", listening)[1])
        async with emitter("3", services.port) as io:
            await io.run('io.to("allusers").emit("msg", {hello: "world"});')
            await io.run('io.to("page").emit("msg", Buffer.from([1, 2, 3]));')
            both = (await asyncio.to_thread(seen, 3))[1:]
            assert sorted(map(str, both)) == ["['msg', 3]", "['msg', {'hello': 'world'}]"]
            # Kill the relay. The browser reconnects and receives the missed event.
            axr.kill()
            axr.server.client().xadd("relay:stream:{axr:page}", {"type": "msg", "data": '"missed"'})
            await asyncio.to_thread(axr.start)
            again = (await asyncio.to_thread(seen, 6))[3:]
        assert again[0][0] == "disconnect"
        assert again[1:3] == [["connect", True], ["msg", "missed"]]
        # The page stays connected during several pings of the server.
        script = "return window.pings"
        enough = browser.execute_script(script) + 3
        await until(lambda: browser.execute_script(script) >= enough)
        assert len(seen(6)) == 6
        assert browser.execute_script("return socket.io.engine.transport.name") == "websocket"
