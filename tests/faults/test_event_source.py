"""A browser's EventSource while Redis is unreachable for some seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from tests.support.browser import chromium
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]
AWAY_S = 3.0
LIMIT_S = 20.0
OPEN = """
window.sources ??= [];
const source = new EventSource(`/sse?channel=${arguments[0]}&token=${arguments[1]}`);
source.got = [];
source.onmessage = (message) => source.got.push(message.data);
window.sources.push(source);
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, options=("--appendfsync", "always")).start()
    yield server
    server.kill()


@pytest.fixture
def relay(server: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(server).start()
    yield process
    process.kill()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    with chromium(tmp_path / "profile") as chrome:
        yield chrome


def until(browser: Chrome, source: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not browser.execute_script(f"return {source}"):
        states = browser.execute_script("return sources.map((each) => [each.readyState, each.got])")
        assert time.monotonic() < end, f"{source}: {states}"
        time.sleep(0.05)


def test_it_comes_back_by_itself(server: Server, relay: RelayProcess, browser: Chrome) -> None:
    browser.get(relay.url)
    browser.execute_script(OPEN, "news", relay.token())
    until(browser, "sources[0].readyState === EventSource.OPEN")
    server.kill()
    # New pages during the outage. A browser opens at most six connections to one host.
    for _ in range(4):
        browser.execute_script(OPEN, "news", relay.token())
        time.sleep(AWAY_S / 4)
    server.start()
    until(browser, "sources.every((each) => each.readyState === EventSource.OPEN)")
    end = time.monotonic() + LIMIT_S
    number = 0
    # A page whose first response was an empty stream follows from its reconnect on.
    while not browser.execute_script("return sources.every((each) => each.got.length)"):
        assert time.monotonic() < end
        number += 1
        relay.xadd("news", data=str(number))
        time.sleep(0.2)
