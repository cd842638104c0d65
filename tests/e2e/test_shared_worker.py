"""The two files of docs/browser.md, unchanged, in two tabs of a real browser."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from selenium.webdriver import Chrome

from tests.support.browser import chromium
from tests.support.relay import ROOT, RelayProcess
from tests.support.valkey import Server, free_port

# A browser starts slowly while other tests use the machine.
pytestmark = [pytest.mark.timeout(120), pytest.mark.redis]
LIMIT_S = 30.0
WORKER, SCRIPT = re.findall(
    r"^```js\n(.*?)^```$", (ROOT / "docs" / "browser.md").read_text(), re.MULTILINE | re.DOTALL
)
PAGE = """<!doctype html><title>tab</title><script>
const given = JSON.parse(decodeURIComponent(location.hash.slice(1)));
const {TOKEN, USER, RELAY} = given;
window.shown = []; window.refused = 0; window.loaded = 0;
const show = (channel, data) => shown.push([channel, data.n]);
const renew = () => { refused += 1; };
const load = () => { loaded += 1; };
window.post = (token) => worker.port.postMessage(
  `${RELAY}/sse?${new URLSearchParams({channel: "news", envelope: 1, token})}`);
%s
</script>"""


@contextmanager
def pages(port: int) -> Iterator[str]:
    """Serve the page and the worker's file, and yield their URL."""
    files = {"/events.js": ("text/javascript", WORKER), "/": ("text/html", PAGE % SCRIPT)}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, text = files.get(self.path, ("text/plain", ""))
            self.send_response(200 if text else 404)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            """Write no log."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Tabs:
    """The tabs of one browser that show the page."""

    def __init__(self, browser: Chrome, site: str, relay: RelayProcess) -> None:
        self._browser = browser
        self._site = site
        self._relay = relay

    def open(self, user: str, token: str | None = None) -> str:
        """Open a tab that is logged in as `user`. Return its handle."""
        given = {
            "TOKEN": self._relay.token(user) if token is None else token,
            "USER": user,
            "RELAY": self._relay.url,
        }
        self._browser.switch_to.new_window("tab")
        self._browser.get(f"{self._site}/#{quote(json.dumps(given))}")
        return self._browser.current_window_handle

    def value(self, tab: str, script: str) -> Any:
        """Evaluate an expression in the tab and return its value."""
        self._browser.switch_to.window(tab)
        return self._browser.execute_script(f"return {script}")

    def close(self, tab: str) -> None:
        """Close the tab as a user does."""
        self._browser.switch_to.window(tab)
        self._browser.close()


@pytest.fixture(scope="module")
def site(valkey: Server) -> Iterator[tuple[str, RelayProcess]]:
    """Serve the page on one origin, and run a relay on another that allows it."""
    port = free_port()
    allowed = f"protocol:native.allowed_origins=http://127.0.0.1:{port}"
    relay = RelayProcess(valkey, settings=[allowed])
    relay.start()
    with pages(port) as address:
        yield address, relay
    relay.kill()


@pytest.fixture
def tabs(site: tuple[str, RelayProcess], tmp_path: Path) -> Iterator[Tabs]:
    """Start a new browser for each test, because workers may outlive their tabs."""
    with chromium(tmp_path / "profile") as browser:
        yield Tabs(browser, *site)


def until(is_so: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def connections(relay: RelayProcess) -> int:
    with urllib.request.urlopen(f"{relay.url}/metrics") as answer:  # noqa: S310
        text = answer.read().decode()
    found = re.search(
        r'^relay_connections\{[^}]*protocol="native"[^}]*\} (\d+)', text, re.MULTILINE
    )
    return int(found[1]) if found else 0


def test_two_tabs_share_one_connection_that_resumes(
    tabs: Tabs, site: tuple[str, RelayProcess]
) -> None:
    relay = site[1]
    one = tabs.open("ann")
    two = tabs.open("ann")

    def both_show(numbers: list[int]) -> None:
        expected = [["news", n] for n in numbers]
        for tab in (one, two):
            until(partial(tabs.value, tab, f"shown.length >= {len(numbers)}"), f"{numbers}")
            assert tabs.value(tab, "shown") == expected

    for tab in (one, two):
        until(partial(tabs.value, tab, "loaded == 1"), "open")
    relay.xadd("news", data='{"n":1}')
    both_show([1])
    assert connections(relay) == 1
    relay.stop()
    relay.xadd("news", data='{"n":2}')
    relay.start()
    both_show([1, 2])
    relay.xadd("news", data='{"n":3}')
    both_show([1, 2, 3])
    assert connections(relay) == 1
    tabs.close(one)
    relay.xadd("news", data='{"n":4}')
    until(lambda: tabs.value(two, "shown.length") == 4, "the event after a tab was closed")
    assert connections(relay) == 1
    # Another user has another worker, which opens another connection.
    other = tabs.open("bob")
    until(partial(tabs.value, other, "loaded == 1"), "open")
    assert connections(relay) == 2
    # The page did not reload its state, so no gap was reported.
    assert tabs.value(two, "loaded") == 1


def test_a_refused_connection_is_made_anew_with_another_token(
    tabs: Tabs, site: tuple[str, RelayProcess]
) -> None:
    relay = site[1]
    tab = tabs.open("eve", token="expired")
    until(lambda: tabs.value(tab, "refused") == 1, "the refusal")
    tabs.value(tab, f"post({json.dumps(relay.token('eve'))})")
    until(partial(tabs.value, tab, "loaded == 1"), "open")
    relay.xadd("news", data='{"n":9}')
    until(lambda: ["news", 9] in tabs.value(tab, "shown"), "the event")
