"""A page like Seahub's in a real browser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from selenium.webdriver import Chrome

from tests.support.browser import chromium
from tests.support.clients import native
from tests.support.relay import RelayProcess
from tests.support.seafile import KEY, Seafile, seafile
from tests.support.seafile_server import Library, StandIn, stand_in
from tests.support.valkey import Server

pytestmark = [pytest.mark.timeout(90), pytest.mark.redis]
LIMIT_S = 15.0


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=[f"protocol:seafile.key={KEY}"]).start()
    yield process
    process.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    profile: Path = tmp_path_factory.mktemp("chromium")
    with chromium(profile) as chrome:
        yield chrome


@dataclass(slots=True)
class Page:
    """The page in the browser."""

    browser: Chrome
    server: StandIn
    library: Library
    door: Seafile

    async def script(self, source: str) -> Any:
        """Run a script in the page."""
        return await asyncio.to_thread(self.browser.execute_script, source)

    async def shows(self, source: str, wanted: object) -> None:
        """Wait until the expression has this value."""
        async with asyncio.timeout(LIMIT_S):
            while await self.script(f"return {source}") != wanted:
                await asyncio.sleep(0.05)

    def lock_of(self, name: str) -> str:
        """Return the text of the row."""
        return f"document.querySelector('tr[data-name=\"{name}\"] .lock').textContent"


@asynccontextmanager
async def shown(relay: RelayProcess, browser: Chrome, token_s: int) -> AsyncIterator[Page]:
    async with stand_in() as (server, port), seafile(relay) as door:
        server.page_token_s = token_s
        library = server.library()
        library.commit(a_txt=b"a", b_txt=b"b")
        about = {"server": f"{door.url}/notification", "library": library.repo_id, "folder": ""}
        url = f"http://127.0.0.1:{port}/page#{quote(json.dumps(about))}"
        await asyncio.to_thread(browser.get, url)
        page = Page(browser, server, library, door)
        await page.shows("document.getElementById('state').textContent", "subscribed")
        async with native(relay) as clients:
            while await clients.metric("relay_followed_streams") < 1:
                await asyncio.sleep(0.05)
        yield page
        await page.script("leave()")
        await page.shows("document.getElementById('state').textContent", "closed")


async def test_a_lock_changes_its_row_without_a_reload(
    relay: RelayProcess, browser: Chrome
) -> None:
    async with shown(relay, browser, 3600) as page:
        loaded = await page.script("return log.loadedAt")
        await page.door.lock(page.library.repo_id, "a.txt")
        await page.shows(page.lock_of("a.txt"), "locked by bob@example.com")
        frozen = {
            "repo_id": page.library.repo_id,
            "path": "/b.txt",
            "change_event": "locked",
            "lock_user": "carol@example.com",
            "expire": -1,
        }
        await page.door.post("file-lock-changed", frozen)
        await page.shows(page.lock_of("b.txt"), "frozen by carol@example.com")
        await page.door.lock(page.library.repo_id, "a.txt", "unlocked")
        await page.shows(page.lock_of("a.txt"), "")
        await page.door.commit(page.library.repo_id, page.library.commit(c_txt=b"c"))
        await page.shows("document.querySelectorAll('tr').length", 3)
        assert await page.script("return log.loadedAt") == loaded


async def test_a_page_renews_its_token(relay: RelayProcess, browser: Chrome) -> None:
    async with shown(relay, browser, 2) as page:
        await page.shows("log.tokens >= 3", True)
        page.server.page_token_s = 3600
        before = await page.script("return log.tokens")
        # The new token is valid for an hour.
        await page.shows(f"log.tokens > {before}", True)
        shown_yet = f"return {page.lock_of('a.txt')}"
        async with asyncio.timeout(LIMIT_S):
            while await page.script(shown_yet) != "locked by bob@example.com":
                await page.door.lock(page.library.repo_id, "a.txt")
                await asyncio.sleep(0.2)
