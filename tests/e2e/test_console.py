"""The operator console: its API, attacks on it, and its page in a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
import redis
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from tests.support.browser import chromium
from tests.support.cli import Cli
from tests.support.npm import node_modules
from tests.support.relay import RelayProcess
from tests.support.several import SITE
from tests.support.valkey import Server

pytestmark = [pytest.mark.timeout(120), pytest.mark.redis]
LIMIT_S = 30.0
PASSWORD = "a password of operators"
ATTEMPTS = "relay:store:console:attempts"
HOSTILE = "<img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    """Run two workers with the console."""
    settings = [
        f"console.password={PASSWORD}",
        f"console.redis_url={valkey.url('maintenance')}",
        "node.workers=2",
        "server.trusted_proxies=127.0.0.1",
    ]
    process = RelayProcess(valkey, settings=settings).start()
    yield process
    process.kill()


@pytest.fixture
def admin(valkey: Server) -> Iterator[redis.Redis]:
    """Return a client of Redis. Attempts to log in by other tests are forgotten."""
    client = valkey.client("admin")
    client.delete(ATTEMPTS)
    yield client
    client.close()


def add_letter(client: redis.Redis, **fields: str) -> str:
    """Add a dead letter and return its ID."""
    words = [part for pair in fields.items() for part in pair]
    added: bytes = client.execute_command("XADD", "relay:dead-letters", "*", *words)  # type: ignore[no-untyped-call]
    return added.decode()


class Api:
    """The admin API. Each request has its own connection, so that it reaches any worker."""

    def __init__(self, url: str, *, address: str = "127.0.0.1") -> None:
        """`address` is that of the client."""
        self.url = f"{url}/console/api/"
        self.address = address
        self.headers: dict[str, str] = {}
        self.cookies: dict[str, str] = {}

    async def ask(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, **options: Any
    ) -> tuple[int, Any, aiohttp.ClientResponse]:
        """Return status, JSON and response."""
        connector = aiohttp.TCPConnector(force_close=True, local_addr=(self.address, 0))
        async with (
            aiohttp.ClientSession(connector=connector, cookies=self.cookies) as http,
            http.request(
                method, self.url + path, headers=self.headers | (headers or {}), **options
            ) as response,
        ):
            text = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(text) if is_json else text, response

    async def get(self, path: str, **parameters: Any) -> Any:
        """Return the JSON of a successful request."""
        status, found, _ = await self.ask("GET", path, params=parameters)
        assert status == 200, found
        return found

    async def post(self, path: str, **body: Any) -> Any:
        """Return the JSON of a successful action."""
        status, found, _ = await self.ask("POST", path, json=body)
        assert status == 200, found
        return found

    async def login(self, password: str = PASSWORD) -> aiohttp.ClientResponse:
        """Log in, and keep cookie and token."""
        status, found, response = await self.ask("POST", "login", json={"password": password})
        if status == 200:
            self.headers = {"X-CSRF-Token": found["csrf"]}
            self.cookies = {"relay_console": response.cookies["relay_console"].value}
        return response


@asynccontextmanager
async def logged_in(relay: RelayProcess) -> AsyncIterator[Api]:
    api = Api(relay.url)
    assert (await api.login()).status == 200
    yield api


@pytest.fixture
async def api(relay: RelayProcess, admin: redis.Redis) -> AsyncIterator[Api]:
    """Return the API for somebody who has logged in."""
    async with logged_in(relay) as api:
        yield api


# ---- access -------------------------------------------------------------------------------------


async def test_nothing_is_answered_without_a_login(relay: RelayProcess) -> None:
    stranger = Api(relay.url)
    reads = ("session", "overview", "channels", "entries", "presence", "rights", "dead-letters")
    for path in reads:
        assert (await stranger.ask("GET", path))[0] == 401
    for path in ("publish", "trim", "delete", "revoke", "disconnect", "dead-letters/drop"):
        assert (await stranger.ask("POST", path, json={}))[0] == 401
    stranger.cookies = {"relay_console": "x" * 43}
    assert (await stranger.ask("GET", "overview"))[0] == 401


async def test_guesses_are_slowed_down_on_all_workers(
    relay: RelayProcess, admin: redis.Redis
) -> None:
    before = set(admin.keys("*"))
    guesser = Api(relay.url)
    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        guesses = [tasks.create_task(guesser.login(f"guess {n}")) for n in range(60)]
    responses = [guess.result() for guess in guesses]
    tried = [response.status for response in responses]
    assert set(tried) == {401, 429}
    # Five at once, and one more every 12 s.
    assert 5 <= tried.count(401) <= 6 + (time.monotonic() - began) / 12
    limited = [response for response in responses if response.status == 429]
    assert all(1 <= int(response.headers["Retry-After"]) <= 60 for response in limited)
    # The right password is not compared before its turn.
    assert (await guesser.login()).status == 429
    # Whatever addresses strangers have, Redis holds one hash with a limited number of fields.
    added: Any = set(admin.keys("*")) - before
    fresh = {key.replace(SITE, b"") for key in added if b"console" in key}
    assert fresh == {ATTEMPTS.encode()}
    assert admin.hlen(ATTEMPTS) == 2
    assert 0 < admin.ttl(ATTEMPTS) <= 600


async def test_a_session_is_valid_on_all_workers_until_the_logout(
    api: Api, relay: RelayProcess
) -> None:
    seen = {(await api.ask("GET", "session"))[0] for _ in range(20)}
    assert seen == {200}
    await api.post("logout")
    seen = {(await api.ask("GET", "session"))[0] for _ in range(20)}
    assert seen == {401}


async def test_the_cookie_is_for_relays_own_pages_only(
    relay: RelayProcess, admin: redis.Redis
) -> None:
    response = await Api(relay.url).login()
    cookie = response.cookies["relay_console"]
    assert cookie["httponly"] is True
    # Without a path, a browser sends it to the API only, also behind a proxy that removes a prefix.
    assert (cookie["samesite"], cookie["path"], cookie["secure"]) == ("Strict", "", "")
    # A proxy that ends TLS: the browser's Origin says so.
    host = relay.url.removeprefix("http://")
    status, _, response = await Api(relay.url).ask(
        "POST", "login", json={"password": PASSWORD}, headers={"Origin": f"https://{host}"}
    )
    assert (status, response.cookies["relay_console"]["secure"]) == (200, True)
    # Redis contains no usable cookie.
    keys = b" ".join(cast("list[bytes]", admin.keys("*console:session*")))
    assert keys
    assert response.cookies["relay_console"].value.encode() not in keys


async def test_headers_of_a_trusted_proxy_count(relay: RelayProcess, admin: redis.Redis) -> None:
    async def attempts(api: Api, *forwarded: str) -> list[int]:
        found = []
        for address in forwarded:
            api.headers = {"X-Forwarded-For": address}
            found.append((await api.login("a guess")).status)
        return found

    # The proxy at 127.0.0.1 appends the client's address. Clients can send any before it.
    proxy = Api(relay.url)
    guesser = [f"198.51.100.{n}, 203.0.113.9" for n in range(6)]
    assert await attempts(proxy, *guesser) == [401] * 5 + [429]
    # Addresses of one IPv6 host.
    guesser = [f"2001:db8::{n}" for n in range(6)]
    assert await attempts(proxy, *guesser) == [401] * 5 + [429]
    # Another address is not trusted.
    stranger = Api(relay.url, address="127.0.0.2")
    guesser = [f"198.51.100.{n}" for n in range(6)]
    assert await attempts(stranger, *guesser) == [401] * 5 + [429]
    assert any("wrong password from 203.0.113.9" in line for line in relay.log)

    async def is_secure(address: str, forwarded: str) -> bool:
        api = Api(relay.url, address=address)
        api.headers = {"X-Forwarded-For": forwarded, "X-Forwarded-Proto": "https"}
        response = await api.login()
        assert response.status == 200
        return bool(response.cookies["relay_console"]["secure"])

    # Programs send no Origin.
    assert await is_secure("127.0.0.1", "192.0.2.1")
    assert not await is_secure("127.0.0.3", "192.0.2.1")


async def test_requests_of_other_sites_are_rejected(api: Api) -> None:
    body = {"channel": "c:csrf", "data": "1"}
    for headers in (
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "null"},
        {"X-CSRF-Token": ""},
        {"X-CSRF-Token": "a" * 43},
    ):
        assert (await api.ask("POST", "publish", json=body, headers=headers))[0] == 403, headers
    # A form of another site cannot have the type of JSON.
    form = {"Content-Type": "text/plain"}
    assert (await api.ask("POST", "publish", data=json.dumps(body), headers=form))[0] == 400
    assert (await api.ask("GET", "publish"))[0] == 405
    assert (await api.get("channels", channel="c:csrf"))["channels"] == []
    own = {"Origin": api.url.removesuffix("/console/api/"), "Sec-Fetch-Site": "same-origin"}
    assert (await api.ask("POST", "publish", json=body, headers=own))[0] == 200


async def test_malformed_requests_are_rejected(api: Api) -> None:
    for path, parameters in (
        ("channels", {"cursor": "x"}),
        ("channels", {"count": "0"}),
        ("channels", {"channel": ""}),
        ("entries", {}),
        ("entries", {"channel": "c", "before": "x"}),
        ("entries", {"channel": "c", "count": "1000000"}),
        ("entries", {"channel": "c", "count": "0000000011000000"}),
        ("rights", {"channel": "c"}),
        ("dead-letter", {"id": "1-1"}),
    ):
        status, found, _ = await api.ask("GET", path, params=parameters)
        assert (status, "error" in found) == (400, True), path
    for path, body in (
        ("publish", {"channel": "c"}),
        ("publish", {"channel": "", "data": "1"}),
        ("publish", {"channel": "c", "data": "1", "unknown": 1}),
        ("trim", {"channel": "c"}),
        ("trim", {"channel": "c", "max_entries": -1}),
        ("trim", {"channel": "c:none", "max_entries": 1}),
        ("delete", {"channel": "c", "confirm": "d"}),
        ("disconnect", {"user": ""}),
        ("dead-letters/drop", {"ids": []}),
    ):
        status, found, _ = await api.ask("POST", path, json=body)
        assert (status, "error" in found) == (400, True), path


# ---- data ---------------------------------------------------------------------------------------


async def test_the_objects_are_those_of_the_command_line(
    api: Api, relay: RelayProcess, valkey: Server
) -> None:
    relay.xadd("c:same", data='{"n":12345678901234567890}', type="t", to="user:ann", uid="u")
    cli = Cli(valkey)
    (printed,) = (await cli.run("streams", "c:same", "--json")).stdout.splitlines()
    (found,) = (await api.get("channels", channel="c:same"))["channels"]
    assert found.pop("followers") == {}
    assert {**json.loads(printed), "age_ms": 0} == {**found, "age_ms": 0}
    printed_workers = (await cli.run("workers", "--json")).stdout.splitlines()
    overview = await api.get("overview")
    fixed = ("instance", "host", "pid", "version", "ready", "connections_by_protocol")
    assert [[json.loads(line)[name] for name in fixed] for line in printed_workers] == [
        [worker[name] for name in fixed] for worker in overview["workers"]
    ]
    assert len(overview["workers"]) == 2
    assert all(worker["memory_bytes"] > 1e7 for worker in overview["workers"])
    (server,) = overview["servers"]
    with valkey.client() as client:
        product = "Valkey" if "valkey_version" in client.info("server") else "Redis"
    assert (server["product"], server["role"], server["aof"]) == (product, "master", True)
    (entry,) = (await api.get("entries", channel="c:same"))["entries"]
    assert entry["data"] == {"n": 12345678901234567890}
    assert (entry["type"], entry["to"], entry["uid"]) == ("t", ["user:ann"], "u")


async def test_channels_are_listed_page_by_page(api: Api, admin: redis.Redis) -> None:
    """Every channel is found, and no request reads more than a part of the keys."""
    names = {f"c:page:{n}" for n in range(1200)}
    with admin.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.xadd(f"relay:stream:{{{name}}}", {"data": "1"})
        pipeline.execute()
    found: set[str] = set()
    cursor, pages = "", 0
    while pages == 0 or cursor:
        page = await api.get("channels", pattern="c:page:*", cursor=cursor, count=100)
        assert len(page["channels"]) <= 300
        found |= {stream["channel"] for stream in page["channels"]}
        cursor, pages = page["cursor"], pages + 1
    assert found == names
    assert pages >= 4


async def test_entries_are_read_in_both_directions(api: Api, relay: RelayProcess) -> None:
    ids = [relay.xadd("c:entries", data=str(n)) for n in range(45)]
    back: list[str] = []
    while True:
        before = {"before": back[-1]} if back else {}
        page = await api.get("entries", channel="c:entries", count=20, **before)
        if not page["entries"]:
            break
        back += [entry["id"] for entry in page["entries"]]
    assert back == ids[::-1]
    page = await api.get("entries", channel="c:entries", after=ids[40])
    assert [entry["id"] for entry in page["entries"]] == ids[41:]
    # Large data is shortened.
    relay.xadd("c:entries", data=json.dumps("x" * 500_000))
    page = await api.get("entries", channel="c:entries", count=1)
    (entry,) = page["entries"]
    assert (entry["data_bytes"], len(entry["data"])) == (500_002, 8192)


async def test_an_operator_acts(api: Api, relay: RelayProcess, admin: redis.Redis) -> None:
    done = await api.post("publish", channel="c:act", data='{"a":1}', type="t", to=["user:ann"])
    (entry,) = (await api.get("entries", channel="c:act"))["entries"]
    assert (entry["id"], entry["data"], entry["to"]) == (done["id"], {"a": 1}, ["user:ann"])
    await api.post("revoke", channel="c:act", user="ann")
    rights = await api.get("rights", channel="c:act", user="ann")
    assert (rights["hash"], "revoked" in rights["answer"]) == ("-", True)
    await api.post("grant", channel="c:act", user="ann")
    assert (await api.get("rights", channel="c:act", user="ann"))["hash"] is None
    assert (await api.post("trim", channel="c:act", max_entries=1))["removed"] == 2
    assert (await api.post("delete", channel="c:act", confirm="c:act"))["deleted"]
    assert not admin.exists("relay:stream:{c:act}")


async def test_clients_of_all_workers_are_found_and_disconnected(
    api: Api, relay: RelayProcess
) -> None:
    """Every request may reach a worker that has none of the clients."""
    async with aiohttp.ClientSession() as http, contextlib.AsyncExitStack() as stack:
        sockets = []
        for user, channel in (("ann", "c:one"), ("ann", "c:two"), ("bob", "c:two")):
            url = f"{relay.url}/ws?channel={channel}&token={relay.token(user)}"
            sockets.append(await stack.enter_async_context(http.ws_connect(url)))
            opened = await sockets[-1].receive_json()
            assert opened["reply"] == "subscribe"

        async def users(**filters: str) -> list[str]:
            page = await api.get("connections", **filters)
            assert (page["missing"], page["total"]) == ({}, len(page["connections"]))
            return sorted(each["user"] for each in page["connections"])

        assert await users(user="ann") == ["ann", "ann"]
        assert await users(channel="c:two") == ["ann", "bob"]
        assert await users(channel="c:*") == ["ann", "ann", "bob"]
        assert await users(protocol="native", address="127.0.0.1") == ["ann", "ann", "bob"]
        assert await users(protocol="socketio") == []
        first = await api.get("connections", channel="c:*", count=2)
        rest = await api.get("connections", channel="c:*", count=2, after=first["after"])
        pages = [*first["connections"], *rest["connections"]]
        assert (len({each["id"] for each in pages}), rest["after"]) == (3, "")
        (bob,) = (await api.get("connections", user="bob"))["connections"]
        found = await api.get("connection", id=bob["id"])
        assert [each["channel"] for each in found["subscriptions"]] == ["c:two"]
        relay.xadd("c:two", data="1")
        (stream,) = (await api.get("channels", channel="c:two"))["channels"]
        assert stream["followers"] == {"native": 2}
        (one,) = (await api.get("connections", channel="c:one"))["connections"]
        assert (await api.post("close", connection=one["id"]))["closed"] == 1
        assert await users(channel="c:*") == ["ann", "bob"]
        assert (await api.ask("POST", "close", json={"connection": one["id"]}))[0] == 400
        assert (await api.post("disconnect", user="ann"))["closed"] == 1
        assert await users(channel="c:*") == ["bob"]
        await api.post("unsubscribe", user="bob", channel="c:two")
        messages = [await sockets[2].receive_json(timeout=LIMIT_S) for _ in range(2)]
        assert [each.get("notice") for each in messages] == [None, "revoked"]


async def test_the_live_tap_shows_who_received_an_event_and_who_did_not(
    api: Api, relay: RelayProcess
) -> None:
    async def watched(watch: str, done: Callable[[list[Any]], bool], **filters: str) -> list[Any]:
        """Return records until there are enough of them."""
        records: list[Any] = []
        async with asyncio.timeout(LIMIT_S):
            while not done(records):
                answer = await api.get("tap", watch=watch, **filters)
                assert answer["missing"] == {}
                records += answer["records"]
        return records

    async def started(watch: str, **filters: str) -> None:
        assert (await api.get("tap", watch=watch, **filters))["records"] == []

    async with aiohttp.ClientSession() as http, contextlib.AsyncExitStack() as stack:
        await started("all")
        await started("eve", user="eve")
        for user in ("ann", "bob"):
            url = f"{relay.url}/ws?channel=c:tap&token={relay.token(user)}"
            socket = await stack.enter_async_context(http.ws_connect(url))
            assert (await socket.receive_json())["reply"] == "subscribe"
        url = f"{relay.url}/ws?channel=c:tap&token={relay.token('eve', ['c:other'])}"
        socket = await stack.enter_async_context(http.ws_connect(url))
        assert "error" in await socket.receive_json()
        relay.xadd("c:tap", data="1", to="user:ann", type="t")
        relay.xadd("c:tap", data="22")

        def received(records: list[Any]) -> list[Any]:
            return [each for each in records if each["event"] == "received"]

        def delivered(records: list[Any]) -> int:
            return sum(each["delivered"] for each in received(records))

        records = await watched("all", lambda found: delivered(found) == 3)
        first = [each for each in received(records) if each["bytes"] == 1]
        assert sum(each["delivered"] for each in first) == 1
        assert sum(each["not_addressed"] for each in first) == 1
        named = [client for each in first for client in each["clients"]]
        assert [(each["user"], each["outcome"]) for each in named] == [("bob", "not addressed")]
        assert {(each["type"], *each["to"]) for each in first} == {("t", "user:ann")}
        kinds = {each["event"] for each in records}
        assert kinds >= {"connected", "subscribed", "rejected", "received"}
        # The journal has it afterwards.
        async with asyncio.timeout(LIMIT_S):
            while not (found := (await api.get("events", user="eve", event="rejected"))["events"]):
                await asyncio.sleep(0.1)
        assert found[0]["channel"] == "c:tap"
        # Only what concerns one user.
        records = await watched("eve", lambda found: "rejected" in [e["event"] for e in found])
        assert {each["user"] for each in records} == {"eve"}
        (rejected,) = [each for each in records if each["event"] == "rejected"]
        assert (rejected["channel"], rejected["reason"]) == ("c:tap", "forbidden")
        assert "sources" in rejected["rule"]


async def test_an_event_is_explained(api: Api, relay: RelayProcess) -> None:
    """The answer is that of `relay explain`."""
    await api.post("revoke", channel="c:why", user="ann")
    entry_id = relay.xadd("c:why", data="1")
    found = await api.get("explain", channel="c:why", user="ann", id=entry_id)
    assert (found["outcome"], found["id"]) == ("no_right", entry_id)
    assert "revoked" in found["sentence"]
    status, _, _ = await api.ask("GET", "explain", params={"channel": "c:why", "user": "ann"})
    assert status == 400


async def test_the_findings_of_the_doctor_are_shown(api: Api) -> None:
    found = await api.get("doctor")
    assert "redis.maxmemory" in {each["name"] for each in found["findings"]}


async def test_dead_letters_are_requeued_and_dropped(
    api: Api, relay: RelayProcess, admin: redis.Redis
) -> None:
    letters = []
    for n in range(3):
        fields = {"stream": "relay:stream:{c:dead}", "id": f"{n + 1}-0", "reason": f"reason {n}"}
        fields["fields"] = json.dumps([["data", f'{{"n":{n}}}']])
        letters.append(add_letter(admin, **fields))
    page = await api.get("dead-letters")
    assert [letter["id"] for letter in page["letters"]] == letters
    assert (await api.get("dead-letter", id=letters[1]))["fields"] == [["data", '{"n":1}']]
    done = await api.post("dead-letters/requeue", ids=[letters[0], "1-1"])
    assert [each["letter"] for each in done["requeued"]] == letters[:1]
    assert [each["letter"] for each in done["failed"]] == ["1-1"]
    (entry,) = (await api.get("entries", channel="c:dead"))["entries"]
    assert entry["data"] == {"n": 0}
    assert (await api.post("dead-letters/drop", ids=letters))["dropped"] == 2
    assert (await api.get("dead-letters"))["total"] == 0


# ---- page ---------------------------------------------------------------------------------------


class Page:
    """The console in the browser."""

    def __init__(self, browser: Chrome, relay: RelayProcess) -> None:
        self.browser = browser
        self.url = f"{relay.url}/console/"

    def open(self, view: str) -> None:
        """Load a view."""
        self.browser.get("about:blank")
        self.browser.get(f"{self.url}#/{view}")

    def script(self, source: str, *arguments: object) -> Any:
        """Run a script in the page."""
        return self.browser.execute_script(source, *arguments)

    def text(self, css: str = "body") -> str:
        """Return the visible text, '' without such an element."""
        found = self.script("return document.querySelector(arguments[0])?.innerText ?? ''", css)
        return str(found)

    def until(self, true: Callable[[], object], what: str) -> None:
        """Wait for a condition. A failure contains the text of the page."""
        end = time.monotonic() + LIMIT_S
        while not true():
            if time.monotonic() > end:
                pytest.fail(f"not {what}: {self.text()}")
            time.sleep(0.05)

    def until_text(self, css: str, part: str) -> None:
        """Wait for a text."""
        self.until(lambda: part in self.text(css), f"{part!r} in {css}")

    def button(self, name: str) -> None:
        """Press the button with this text by keyboard."""
        path = f"(//dialog[@open]//button|//button[not(ancestor::dialog)])[.='{name}']"
        found = self.browser.find_elements(By.XPATH, path)[0]
        self.script("arguments[0].focus()", found)
        ActionChains(self.browser).send_keys(Keys.ENTER).perform()

    def follows(self, css: str, address: str) -> bool:
        """Press a link by keyboard if there is one. Return True if it led to this address."""
        script = "document.querySelector(arguments[0])?.focus(); return location.hash"
        if str(self.script(script, css)).startswith(address):
            return True
        ActionChains(self.browser).send_keys(Keys.ENTER).perform()
        return False

    def type(self, name: str, text: str) -> None:
        """Type into the field with this ID."""
        self.browser.find_element(By.ID, name).send_keys(text)

    def ask(self, path: str) -> str:
        """Return the response of the API to the browser."""
        return str(
            self.browser.execute_async_script(
                "fetch('api/' + arguments[0]).then((response) => response.text())"
                ".then(arguments[1])",
                path,
            )
        )

    def violations(self) -> list[str]:
        """Return what axe-core objects to."""
        source = (node_modules() / "axe-core" / "axe.min.js").read_text()
        # Not as a script of the page: its policy forbids others than its own.
        self.browser.execute_cdp_cmd("Runtime.evaluate", {"expression": source})
        found: list[str] = self.browser.execute_async_script(
            "const done = arguments[0];"
            "axe.run({resultTypes: ['violations']}).then(({violations}) =>"
            " done(violations.flatMap(({id, nodes}) => nodes.map(({html}) => `${id}: ${html}`))))"
        )
        return found

    def is_too_wide(self) -> bool:
        """Return True if the page must be scrolled sideways."""
        return bool(
            self.script("return document.documentElement.scrollWidth > window.innerWidth + 1")
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Run one browser for all tests of the file."""
    profile: Path = tmp_path_factory.mktemp("chromium")
    with chromium(profile) as chrome:
        yield chrome


@pytest.fixture
def page(browser: Chrome, relay: RelayProcess, admin: redis.Redis) -> Iterator[Page]:
    """Log in by keyboard. The page must not violate its policy or throw."""
    # The cookie is for the API, whose address is below that of the page.
    browser.execute_cdp_cmd("Network.clearBrowserCookies", {})
    page = Page(browser, relay)
    page.open("overview")
    page.until_text("h2", "Log in")
    page.type("password", PASSWORD + Keys.ENTER)
    page.until_text("#workers", "ready")
    browser.get_log("browser")  # type: ignore[no-untyped-call]
    yield page
    console: list[dict[str, str]] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    bad = [line["message"] for line in console if "Failed to load resource" not in line["message"]]
    assert bad == []


def _shows_new(page: Page, relay: RelayProcess, name: str, css: str, part: str) -> bool:
    return bool(relay.xadd(name, data="1")) and part in page.text(css)


@pytest.mark.timeout(300)
def test_every_view_is_accessible_on_desktop_and_phone(page: Page, relay: RelayProcess) -> None:
    """In light and dark. Names and data of strangers are shown as text."""
    name = HOSTILE.replace(" ", "%20")
    relay.xadd(name, data=json.dumps({"html": f"<script>window.hacked=1</script>{HOSTILE}"}))
    client = cast("redis.Redis", relay.redis())
    letter = {"stream": f"relay:stream:{{{name}}}", "id": "1-0", "reason": HOSTILE, "node": HOSTILE}
    letter["fields"] = json.dumps([[HOSTILE, HOSTILE]])
    letter_id = add_letter(client, **letter)
    quoted = urllib.parse.quote(HOSTILE)
    # A client with a hostile user and User-Agent.
    url = f"{relay.url}/sse?channel={quoted}&token={relay.token(HOSTILE)}"
    request = urllib.request.Request(url, headers={"User-Agent": HOSTILE})  # noqa: S310
    opened = urllib.request.urlopen(request, timeout=LIMIT_S)  # noqa: S310
    api = json.loads(page.ask(f"connections?user={urllib.parse.quote(HOSTILE)}"))
    views = {
        "overview": ("#findings", "redis.maxmemory"),
        "clients": ("#clients", HOSTILE),
        f"client/{api['connections'][0]['id']}": ("#view", HOSTILE),
        "channels?pattern=img": ("#channels", HOSTILE),
        f"channel/{quoted}": ("#entries", "<script>"),
        f"tap?user={quoted}": ("#tap", "delivered to 1 of 1 follower"),
        f"explain?user={quoted}&channel={quoted}&id=1-1": ("#answer", HOSTILE),
        "dead-letters": ("#letters", HOSTILE),
    }
    command = page.browser.execute_cdp_cmd
    for scheme, width in (("light", 1280), ("dark", 390)):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        command("Emulation.setEmulatedMedia", {"features": [feature]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        command("Emulation.setDeviceMetricsOverride", size)
        for view, (css, part) in views.items():
            page.open(view)
            if view.startswith("tap"):
                # Events are shown from the first answer on.
                page.until(partial(_shows_new, page, relay, name, css, part), part)
            page.until_text(css, part)
            assert "[object" not in page.text()
            # The colours differ, and these views have all of them.
            if scheme == "light" or view in ("overview", "dead-letters"):
                assert page.violations() == [], view
            assert not page.is_too_wide(), view
    page.button("Show")
    page.until_text("dialog", HOSTILE)
    assert page.violations() == []
    assert page.script("return window.hacked") is None
    command("Emulation.clearDeviceMetricsOverride", {})
    command("Emulation.setEmulatedMedia", {"features": []})
    client.xdel("relay:dead-letters", letter_id)
    opened.close()


def test_an_operator_works_with_a_channel_by_keyboard(page: Page, relay: RelayProcess) -> None:
    for n in range(30):
        relay.xadd("c:work", data=json.dumps({"n": n}))
    page.open("channels")
    page.until_text("#view", "Search channels")
    page.type("pattern", "c:wo" + Keys.ENTER)
    # The search replaces the list, and with it the link that had the focus.
    page.until(lambda: page.follows("#channels a[href$='c%3Awork']", "#/channel/"), "opened")
    page.until_text("#entries", '{"n":10}')
    assert '{"n":9}' not in page.text("#entries")
    page.button("Older entries")
    page.until_text("#entries", '{"n":0}')
    page.script("document.getElementById('live').focus()")
    ActionChains(page.browser).send_keys(Keys.SPACE).perform()
    relay.xadd("c:work", data='{"live":12345678901234567890}')
    page.until_text("#entries tbody tr:first-child", '{"live":12345678901234567890}')
    page.type("publish-data", '{"from":"the console"}')
    page.button("Publish")
    page.until_text("#entries tbody tr:first-child", '{"from":"the console"}')
    page.type("rights-user", "ann")
    page.button("Revoke")
    page.until_text("#view", "The right is revoked.")
    page.type("keep", "1")
    page.button("Trim")
    page.until_text("dialog", "Trim the stream?")
    ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    page.until(lambda: not page.text("dialog"), "closed")
    page.button("Delete the stream")
    page.until_text("dialog", "Delete the stream?")
    page.type("confirm-text", "c:work" + Keys.ENTER)
    page.until_text("#view", "This channel has no stream.")
    page.button("Log out")
    page.until_text("h2", "Log in")
    page.open("channels")
    page.until_text("h2", "Log in")
