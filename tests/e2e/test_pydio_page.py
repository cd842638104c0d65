"""Headless Chromium as Pydio's page: it enters a workspace, switches, and loses a right."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

from tests.support.browser import chromium
from tests.support.clients import redis
from tests.support.pydio import KEY, Pydio, publish, standing_in
from tests.support.relay import RelayProcess
from tests.support.valkey import Server


def diff(kind: str, path: str, **attributes: str) -> str:
    """Return a change of one file as PHP writes it."""
    more = "".join(f' {name}="{value}"' for name, value in attributes.items())
    return f'<tree><nodes_diff><{kind}><tree filename="{path}"{more}/></{kind}></nodes_diff></tree>'


async def ask(chrome: Chrome, script: str) -> Any:
    """Return the value of an expression in the page."""
    return await asyncio.to_thread(chrome.execute_script, f"return {script}")


async def seen(chrome: Chrome, script: str, wanted: object) -> None:
    """Wait until the expression has this value in the page."""
    found: object = None
    try:
        async with asyncio.timeout(30):
            while (found := await ask(chrome, script)) != wanted:
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"{script} is {found!r}, not {wanted!r}") from None


FILES = "[...document.querySelectorAll('#files li')].map((item) => item.textContent).sort()"
STATE = "document.getElementById('state').textContent"


async def enters(chrome: Chrome, relay: RelayProcess, repository: str) -> None:
    """Open a workspace, and wait until a file that PHP adds appears in it."""
    url = relay.url.replace("http", "ws") + "/public"
    await asyncio.to_thread(chrome.execute_script, f"enter('{repository}', '{url}')")
    probe = [{"REPO_ID": repository, "CONTENT": diff("add", "/probe")}]
    async with asyncio.timeout(30):
        while "/probe" not in await ask(chrome, FILES):
            await publish(relay.port, probe)
    await publish(
        relay.port,
        [
            {"REPO_ID": repository, "CONTENT": diff("remove", "/probe")},
            {"REPO_ID": repository, "CONTENT": diff("add", f"/in-{repository}")},
        ],
    )
    await seen(chrome, FILES, [f"/in-{repository}"])


@pytest.mark.redis
@pytest.mark.timeout(120)
async def test_a_page_follows_a_rename_a_switch_and_a_lost_right(
    tmp_path: Path, valkey: Server
) -> None:
    async with standing_in() as pydio:
        alice = pydio.login("alice", w_1="rw", w_2="rw")
        settings = {
            "key": KEY,
            "auth_url": pydio.auth_url,
            "allowed_origins": pydio.origin,
            "recheck_s": 1,
            "auth_cache_s": 0.2,
            "drain_s": 0.2,
        }
        relay = RelayProcess(
            valkey, settings=[f"protocol:pydio.{n}={v}" for n, v in settings.items()]
        )
        await asyncio.to_thread(relay.start)
        try:
            with chromium(tmp_path / "profile") as chrome:
                await live(chrome, relay, pydio, alice.acl)
        finally:
            relay.kill()


async def live(chrome: Chrome, relay: RelayProcess, pydio: Pydio, acl: dict[str, str]) -> None:
    """Run the steps of the test in the page."""
    await asyncio.to_thread(chrome.get, f"{pydio.origin}/page?user=alice")
    await enters(chrome, relay, "1")
    # PHP renames a file.
    rename = diff("update", "/Bericht – neu.txt", original_path="/in-1", text="Bericht – neu.txt")
    await publish(relay.port, [{"REPO_ID": "1", "CONTENT": rename}])
    await seen(chrome, FILES, ["/Bericht – neu.txt"])
    # Any producer may publish.
    redis(relay.server, "XADD", "relay:stream:{pydio:1}", "*", "data", diff("add", "/by-xadd"))
    await seen(chrome, FILES, ["/Bericht – neu.txt", "/by-xadd"])
    await enters(chrome, relay, "2")
    await publish(relay.port, [{"REPO_ID": "1", "CONTENT": diff("add", "/elsewhere")}])
    await publish(relay.port, [{"REPO_ID": "2", "CONTENT": diff("add", "/here")}])
    await seen(chrome, FILES, ["/here", "/in-2"])
    del acl["2"]
    await seen(chrome, STATE, "null")
    await publish(relay.port, [{"REPO_ID": "2", "CONTENT": diff("add", "/secret")}])
    await enters(chrome, relay, "1")
    log = await ask(chrome, "page.log.join()")
    assert "/secret" not in log
    assert "/elsewhere" not in log
    assert await ask(chrome, "page.polling") is False
    # After a stop the page polls until it is reloaded, as it does without a websocket server.
    await asyncio.to_thread(relay.stop)
    await seen(chrome, STATE, "polling")
