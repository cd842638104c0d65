"""Pydio's public channel: authentication, registration for workspaces, and delivery."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from relay.cli import access
from relay.config.settings import RedisSettings
from relay.core.model import Channel
from tests.support.clients import redis, until
from tests.support.pydio import (
    KEY,
    Browser,
    Pydio,
    Refused,
    browse,
    publish,
    seen_by,
    standing_in,
    tree,
)
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

# Starting PHP takes time on a machine that runs other tests.
pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
RELOAD_FOLDER = '<tree><reload_instruction object="data" node="" file=""/></tree>'
RELOAD_WORKSPACES = '<tree><reload_instruction object="repository_list"/></tree>'


@pytest.fixture
async def pydio() -> AsyncIterator[Pydio]:
    async with standing_in() as server:
        yield server


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session


Start = Callable[..., RelayProcess]


@pytest.fixture
async def start(valkey: Server, pydio: Pydio) -> AsyncIterator[Start]:
    """Start a relay for this Pydio, which is asked again after a second."""
    started: list[RelayProcess] = []

    def start_one(**settings: object) -> RelayProcess:
        values = {
            "key": KEY,
            "auth_url": pydio.auth_url,
            "allowed_origins": pydio.origin,
            "recheck_s": 1,
            "auth_cache_s": 0.2,
            "drain_s": 0.2,
        }
        pairs = (values | settings).items()
        process = RelayProcess(valkey, settings=[f"protocol:pydio.{n}={v}" for n, v in pairs])
        started.append(process)
        return process.start()

    yield start_one
    for process in started:
        await asyncio.to_thread(process.kill)


async def said(relay: RelayProcess, repository: str, text: str, **members: object) -> str:
    """Send one message from PHP, and return its content."""
    content = tree(text)
    message = {"REPO_ID": repository, "CONTENT": content} | members
    await publish(relay.port, [message])
    return content


async def entered(relay: RelayProcess, browser: Browser, repository: str) -> None:
    await seen_by(browser, relay, repository)


async def next_real(browser: Browser) -> str:
    """Return the next frame that is not a probe."""
    while "probe" in (text := await browser.next()):
        pass
    return text


async def test_a_browser_receives_unchanged_contents_of_its_workspace(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("alice", w_1="rw", w_2="r", w_3="w")
    relay = start()
    page = await browse(http, relay, "alice", origin=pydio.origin)
    await entered(relay, page, "1")
    content = '<tree>\n  <a b="ü&quot;"/>\r\n</tree>'
    await publish(relay.port, [{"REPO_ID": "1", "CONTENT": content}])
    assert await page.next() == content
    long = tree("é" * 80_000)
    await publish(relay.port, [{"REPO_ID": "1", "CONTENT": long}])
    assert await page.next() == long
    # A second registration replaces the first one.
    await entered(relay, page, "2")
    await said(relay, "1", "in the old one")
    assert await said(relay, "2", "in the new one") == await page.next()
    # Requests that are not allowed or malformed change nothing, and have no reply.
    for text in ("register:3", "register:nobody", "register:", "hello", "subscribe:1", ":", ""):
        await page.socket.send_str(text)
    assert await said(relay, "2", "still here") == await page.next()
    await page.socket.send_str("unregister:whatever")
    content = await said(relay, "AJXP_REPO_SCOPE_ALL", "for all")
    assert await page.next() == content
    await said(relay, "2", "unheard")
    assert await said(relay, "*", "for all again") == await page.next()


async def test_every_rule_about_recipients(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("alice", "/staff", w_1="rw", w_2="rw")
    pydio.login("bob", "/staff/ops", w_1="r", w_2="r")
    pydio.login("carol", "", w_1="r", w_2="r")
    relay = start()
    pages = {name: await browse(http, relay, name) for name in ("alice", "bob", "carol")}
    for name, repository in (("alice", "1"), ("bob", "1"), ("carol", "2")):
        await entered(relay, pages[name], repository)
    rules: list[tuple[str, dict[str, object], set[str]]] = [
        ("1", {}, {"alice", "bob"}),
        ("2", {}, {"carol"}),
        ("AJXP_REPO_SCOPE_ALL", {}, {"alice", "bob", "carol"}),
        ("*", {}, {"alice", "bob", "carol"}),
        ("1", {"USER_ID": "alice"}, {"alice"}),
        ("1", {"USER_ID": "carol"}, set()),
        ("1", {"USER_ID": "nobody"}, set()),
        ("*", {"USER_ID": "bob"}, {"bob"}),
        ("1", {"GROUP_PATH": "/staff"}, {"alice"}),
        ("1", {"GROUP_PATH": "/staff/ops"}, {"bob"}),
        ("1", {"GROUP_PATH": "/"}, set()),
        ("*", {"GROUP_PATH": "/staff"}, {"alice"}),
        ("1", {"NODE_PATHES": ["/a"]}, {"alice", "bob"}),
    ]
    expected: dict[str, list[str]] = {name: [] for name in pages}
    for number, (repository, members, readers) in enumerate(rules):
        content = await said(relay, repository, str(number), **members)
        for name in readers:
            expected[name].append(content)
    end = [await said(relay, repository, "end") for repository in ("1", "2")]
    for name, page in pages.items():
        found = []
        while (text := await next_real(page)) not in end:
            found.append(text)
        # There are two streams, one of them for broadcasts. Order is kept within each.
        assert sorted(found) == sorted(expected[name]), name


async def test_a_path_mask_hides_events_with_paths(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("bob", w_1="r", w_2="r").masked.add("1")
    relay = start()
    page = await browse(http, relay, "bob")
    await entered(relay, page, "1")
    await said(relay, "1", "secret name", NODE_PATHES=["/secret"])
    assert await page.next() == RELOAD_FOLDER
    assert await said(relay, "1", "names no path") == await page.next()
    await entered(relay, page, "2")
    assert await said(relay, "2", "no mask here", NODE_PATHES=["/a"]) == await page.next()
    # A mask that is added later applies too, and no event is missed.
    pydio.sessions["bob"].masked.add("2")

    async def masked() -> bool:
        content = await said(relay, "2", "secret name", NODE_PATHES=["/secret"])
        answer = await page.next()
        assert answer in (content, RELOAD_FOLDER)
        return answer == RELOAD_FOLDER

    async with asyncio.timeout(30):
        while not await masked():
            pass


async def test_rejects_browsers_that_are_not_logged_in(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("alice", w_1="r")
    relay = start()
    for cookie, origin, status in (
        ("", None, 401),
        ("mallory", None, 401),
        ("alice", "https://evil.example", 403),
        ("alice", "null", 403),
        ("alice", "", 403),
    ):
        with pytest.raises(Refused) as refused:
            await browse(http, relay, cookie, origin=origin)
        assert refused.value.args == (status,), (cookie, origin)
    # Pydio received no request without credentials, and no other cookie.
    assert pydio.cookies == ["AjaXplorer=mallory; AjaXplorerX"] or pydio.cookies == [
        "AjaXplorer=mallory"
    ]
    assert (await http.get(f"{relay.url}/public")).status == 426
    page = await browse(http, relay, "alice", origin=pydio.origin)
    await page.socket.close()


async def test_token_and_hash_of_6_5_need_no_origin(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("alice", w_1="r")
    pydio.tokens["tok en", "abc:0f"] = pydio.sessions["alice"]
    url = f"{pydio.origin}/pydio/api/pydio/ws_authenticate/"
    relay = start(auth_url=url)
    query = "?auth_token=tok%20en&auth_hash=abc%3A0f"
    page = await browse(http, relay, origin="https://app.example", path=f"/public{query}")
    await entered(relay, page, "1")
    with pytest.raises(Refused, match="401"):
        await browse(http, relay, path="/public?auth_token=tok%20en&auth_hash=wrong")


async def test_one_path_for_both_as_in_6_4_2(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("alice", w_1="r")
    relay = start(public_path="/pydio", private_path="/pydio")
    page = await browse(http, relay, "alice", path="/pydio")
    content = tree("shared")
    await page.register("1")
    async with asyncio.timeout(30):
        while True:
            answers = await publish(
                relay.port, [{"REPO_ID": "1", "CONTENT": content}], path="/pydio"
            )
            assert answers == ["HTTP/1.1 101 Switching Protocols"]
            try:
                assert await page.next(0.3) == content
            except TimeoutError:
                continue
            return


async def test_a_slow_response_for_one_user_does_not_delay_others(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("slow", w_1="r").slow_s = 3.0
    pydio.login("alice", w_1="r")
    relay = start()
    async with asyncio.TaskGroup() as group:
        slow = group.create_task(browse(http, relay, "slow"))
        await until(lambda: "slow" in pydio.asked)
        page = await browse(http, relay, "alice")
        await entered(relay, page, "1")
        assert not slow.done()
    await entered(relay, slow.result(), "1")


async def test_while_pydio_is_down_new_browsers_are_rejected_and_connected_ones_stay(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("alice", w_1="r")
    relay = start(hold_s=4)
    page = await browse(http, relay, "alice")
    await entered(relay, page, "1")
    last = time.monotonic()
    await pydio.stop()
    with pytest.raises(Refused, match="503"):
        await browse(http, relay, "bob")
    assert await said(relay, "1", "still here") == await page.next()
    assert await page.closed() == 1008
    # hold_s begins at the last response, which is at most recheck_s before the stop of Pydio.
    assert time.monotonic() - last > 2
    with pytest.raises(Refused, match="503"):
        await browse(http, relay, "alice")
    await pydio.start()
    page = await browse(http, relay, "alice")
    await entered(relay, page, "1")
    pydio.broken = "<h1>Fatal error</h1><br>"
    with pytest.raises(Refused, match="503"):
        await browse(http, relay, "bob")


async def test_a_lost_right_ends_the_registration(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    alice = pydio.login("alice", w_1="r", w_2="r")
    bob = pydio.login("bob", w_1="r")
    relay = start()
    page, other = await browse(http, relay, "alice"), await browse(http, relay, "bob")
    await entered(relay, page, "1")
    await entered(relay, other, "1")
    del alice.acl["1"]
    assert await next_real(page) == RELOAD_WORKSPACES
    content = await said(relay, "1", "not for alice")
    assert await next_real(other) == content
    await page.register("1")
    await entered(relay, page, "2")
    # A new right applies when the page requests the workspace, without a new connection.
    await page.register("1")
    alice.acl["1"] = "r"
    await entered(relay, page, "1")
    bob.acl["1"] = "w"
    assert await next_real(other) == RELOAD_WORKSPACES


@pytest.mark.parametrize("user", ["alice", None])
async def test_an_announced_change_applies_at_once(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession, user: str | None
) -> None:
    alice = pydio.login("alice", w_1="r", w_2="r")
    pydio.login("bob", w_1="r")
    relay = start(recheck_s=3000, hold_s=3000)
    page, other = await browse(http, relay, "alice"), await browse(http, relay, "bob")
    await entered(relay, page, "1")
    await entered(relay, other, "1")
    asked = pydio.asked.count("bob")
    del alice.acl["1"]
    whom = ("user", user) if user else ()
    redis(relay.server, "XADD", "relay:control", "*", "command", "drop-rights", *whom)
    assert await next_real(page) == RELOAD_WORKSPACES
    await entered(relay, page, "2")
    if user:
        assert pydio.asked.count("bob") == asked
    else:
        await until(lambda: pydio.asked.count("bob") == asked + 1)


async def test_a_revocation_takes_effect_at_its_position(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("eve", w_1="r")
    relay = start()
    page = await browse(http, relay, "eve")
    await entered(relay, page, "1")
    redis(relay.server, "HSET", "relay:rights:{pydio:1}", "eve", "-")
    redis(relay.server, "XADD", "relay:stream:{pydio:1}", "*", "revoke", "eve")
    await said(relay, "1", "not for eve")
    assert await next_real(page) == RELOAD_WORKSPACES
    assert await said(relay, "*", "for all") == await next_real(page)


async def test_a_grant_restores_the_registration(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("mia", w_1="r")
    relay = start()
    page = await browse(http, relay, "mia")
    await entered(relay, page, "1")
    settings = RedisSettings(url=relay.server.url("maintenance"))
    await access.revoke(settings, Channel("pydio:1"), "mia")
    await said(relay, "1", "not for mia")
    assert await next_real(page) == RELOAD_WORKSPACES
    # Two notices that change nothing: the request is kept after a rejection.
    for _ in range(2):
        redis(relay.server, "XADD", "relay:control", "*", "command", "drop-rights", "user", "mia")
        assert await said(relay, "*", "for all") == await next_real(page)
    assert await access.grant(settings, Channel("pydio:1"), "mia")
    assert await next_real(page) == RELOAD_FOLDER
    assert await said(relay, "1", "for mia") == await next_real(page)


async def test_a_logout_closes_the_page(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("alice", w_1="r")
    relay = start()
    page = await browse(http, relay, "alice")
    await entered(relay, page, "1")
    del pydio.sessions["alice"]
    assert await page.closed() == 1008


async def test_pages_stay_connected_and_served_until_the_drain_is_over(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("alice", w_1="r")
    relay = start(drain_s=3)
    page = await browse(http, relay, "alice")
    await entered(relay, page, "1")
    async with asyncio.TaskGroup() as group:
        stopping = group.create_task(asyncio.to_thread(relay.stop))
        await until(lambda: any("stopping" in line for line in relay.log))
        # PHP cannot connect any more at this time, so another producer publishes.
        redis(relay.server, "XADD", "relay:stream:{pydio:1}", "*", "data", tree("late"))
        assert await next_real(page) == tree("late")
        assert not stopping.done()
        assert await page.closed() == 1001
    assert stopping.result() == 0


async def test_messages_of_php_arrive_in_order_after_an_outage_of_redis(
    tmp_path: Path, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("alice", w_1="r")
    server = Server(tmp_path / "own")
    server.start()
    settings = {"key": KEY, "auth_url": pydio.auth_url, "drain_s": 0.2}
    relay = RelayProcess(server, settings=[f"protocol:pydio.{n}={v}" for n, v in settings.items()])
    try:
        relay.start()
        page = await browse(http, relay, "alice")
        await entered(relay, page, "1")
        server.kill()
        # Messages of PHP are kept in order until Redis is reachable again.
        contents = [tree(f"kept {number}") for number in range(20)]
        await publish(relay.port, [{"REPO_ID": "1", "CONTENT": each} for each in contents])
        server.start()
        found: list[str] = []
        while len(found) < len(contents):
            text = await next_real(page)
            if text != RELOAD_FOLDER:
                found.append(text)
        assert found == contents
    finally:
        relay.kill()
        server.kill()


async def test_a_page_that_registers_during_an_outage_of_redis_reloads_its_folder(
    tmp_path: Path, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("alice", w_1="r", w_2="r")
    server = Server(tmp_path / "own")
    server.start()
    settings = {"key": KEY, "auth_url": pydio.auth_url, "drain_s": 0.2}
    relay = RelayProcess(server, settings=[f"protocol:pydio.{n}={v}" for n, v in settings.items()])
    try:
        relay.start()
        page = await browse(http, relay, "alice")
        await entered(relay, page, "1")
        server.kill()
        async with asyncio.timeout(30):
            while (await http.get(f"{relay.url}/readyz")).status == 200:
                await asyncio.sleep(0.05)
        await page.register("2")
        # Wait longer than _LATE_S. No event marks this time.
        await asyncio.sleep(1.5)
        server.start()
        assert await next_real(page) == RELOAD_FOLDER
        await entered(relay, page, "2")
    finally:
        relay.kill()
        server.kill()


async def test_a_new_key_applies_after_a_reload(
    tmp_path: Path, valkey: Server, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("alice", w_1="r")
    key = tmp_path / "key"
    key.write_text("the old one")
    words = {"key_file": key, "auth_url": pydio.auth_url, "drain_s": 0.2}
    relay = RelayProcess(valkey, settings=[f"protocol:pydio.{n}={v}" for n, v in words.items()])
    try:
        relay.start()
        with pytest.raises(Refused, match="401"):
            await browse(http, relay, "alice")
        key.write_text(KEY)
        relay.send(signal.SIGHUP)
        await until(lambda: any("reloaded" in line for line in relay.log))
        page = await browse(http, relay, "alice")
        await entered(relay, page, "1")
        message = {"REPO_ID": "1", "CONTENT": tree("x")}
        answers = await publish(relay.port, [message], key="the old one")
        assert answers == ["HTTP/1.1 403 Forbidden"]
    finally:
        relay.kill()


async def test_a_page_that_sends_too_fast_is_closed(
    start: Start, pydio: Pydio, http: aiohttp.ClientSession
) -> None:
    pydio.login("alice", w_1="r", w_2="r")
    relay = start()
    page = await browse(http, relay, "alice")
    for number in range(200):
        if page.socket.closed:
            break
        await page.socket.send_str(f"register:{number % 2 + 1}")
    assert await page.closed() == 1008
