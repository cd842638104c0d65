"""Pydio's npm server type, with Socket.IO clients of its time and of today."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.support.clients import LIMIT_S, redis
from tests.support.pydio import KEY, Pydio, publish, standing_in, tree
from tests.support.relay import RelayProcess
from tests.support.socketio import Driver, NpmClient, npm_clients
from tests.support.valkey import Server, free_port

# Starting Node and PHP takes time on a machine that runs other tests.
pytestmark = [pytest.mark.redis, pytest.mark.timeout(90)]

BOTH = ("socket.io-client-2", "socket.io-client")
RELOAD_FOLDER = '<tree><reload_instruction object="data" node="" file=""/></tree>'
RELOAD_WORKSPACES = '<tree><reload_instruction object="repository_list"/></tree>'


@pytest.fixture(scope="module")
def pydio_port() -> int:
    """Return the port of every test's Pydio, which the relay of all tests knows."""
    return free_port()


@pytest.fixture
async def pydio(pydio_port: int) -> AsyncIterator[Pydio]:
    async with standing_in(pydio_port) as server:
        server.login("alice", "/staff", w_1="rw", w_2="rw")
        yield server


@pytest.fixture
async def npm() -> AsyncIterator[Driver]:
    async with npm_clients() as driver:
        yield driver


@pytest.fixture(scope="module")
def shared_relay(valkey: Server, pydio_port: int) -> Iterator[RelayProcess]:
    process = made(valkey, Pydio(pydio_port)).start()
    yield process
    process.kill()


@pytest.fixture
def relay(shared_relay: RelayProcess, pydio: Pydio) -> RelayProcess:
    """Return a relay whose Pydio is running."""
    del pydio
    return shared_relay


def made(valkey: Server, pydio: Pydio, *flags: str, **settings: object) -> RelayProcess:
    values = {
        "key": KEY,
        "auth_url": pydio.auth_url,
        "recheck_s": 1,
        "auth_cache_s": 0.2,
        "drain_s": 0.2,
    }
    words = [f"protocol:pydio.{name}={value}" for name, value in (values | settings).items()]
    return RelayProcess(valkey, settings=words, flags=flags)


async def page(
    npm: Driver, relay: RelayProcess, cookie: str, package: str = "socket.io-client", **more: Any
) -> NpmClient:
    """Start a page of the npm type. It may not be connected yet."""
    headers = {"Cookie": f"AjaXplorer={cookie}", "Origin": relay.url}
    namespace = more.pop("namespace", "")
    return await npm.open(
        f"{relay.url}{namespace}", package=package, path="/public", extraHeaders=headers, **more
    )


async def asked(client: NpmClient, *words: str) -> object:
    """Emit an event and return the acknowledgement."""
    await client.do("ask", *words)
    return (await client.until("answer"))["args"][0]


async def said(relay: RelayProcess, repository: str, *texts: str, **members: object) -> list[str]:
    contents = [tree(text) for text in texts]
    messages = [{"REPO_ID": repository, "CONTENT": each} | members for each in contents]
    await publish(relay.port, messages)
    return contents


async def heard(client: NpmClient) -> str:
    """Return the next content."""
    name, content, *_ = await client.event()
    assert name == "message"
    return str(content)


@pytest.mark.parametrize("transports", [["polling", "websocket"], ["websocket"], ["polling"]])
@pytest.mark.parametrize("package", BOTH)
async def test_a_page_registers_and_switches(
    relay: RelayProcess, npm: Driver, package: str, transports: list[str]
) -> None:
    client = await page(npm, relay, "alice", package, transports=transports)
    await client.until("connect")
    assert await asked(client, "register", "1") == {"ok": True}
    contents = await said(relay, "1", "ü\n", "second")
    assert [await heard(client), await heard(client)] == contents
    assert await asked(client, "register", "3") == {"ok": False}
    assert await asked(client, "register", "2") == {"ok": True}
    await said(relay, "1", "unheard")
    assert await said(relay, "2", "x" * 160_000) == [await heard(client)]
    assert await said(relay, "2", "for me", USER_ID="alice") == [await heard(client)]
    await said(relay, "2", "unheard", USER_ID="bob")
    await said(relay, "2", "unheard", GROUP_PATH="/")
    assert await asked(client, "unregister") == {"ok": True}
    await said(relay, "2", "unheard")
    assert await said(relay, "*", "for all") == [await heard(client)]


async def test_a_client_of_socket_io_2_receives_only_the_content(
    relay: RelayProcess, npm: Driver
) -> None:
    client = await page(npm, relay, "alice", "socket.io-client-2")
    await client.until("connect")
    await asked(client, "register", "1")
    (content,) = await said(relay, "1", "x")
    assert await client.event() == ["message", content]


@pytest.mark.parametrize("package", BOTH)
async def test_a_client_without_a_pydio_session_is_rejected(
    relay: RelayProcess, npm: Driver, package: str
) -> None:
    client = await page(npm, relay, "mallory", package)
    refused = await client.until("error" if package == BOTH[0] else "connect_error")
    assert "unauthorized" in str(refused)
    foreign = await npm.open(
        relay.url,
        package=package,
        path="/public",
        extraHeaders={"Cookie": "AjaXplorer=alice", "Origin": "https://evil.example"},
    )
    refused = await foreign.until("error" if package == BOTH[0] else "connect_error")
    assert "forbidden" in str(refused)


async def test_token_and_hash_in_the_query_or_in_auth(
    relay: RelayProcess, npm: Driver, pydio: Pydio
) -> None:
    pydio.tokens["t", "n:h"] = pydio.sessions["alice"]
    proof = {"auth_token": "t", "auth_hash": "n:h"}
    for package, options in ((BOTH[0], {"query": proof}), (BOTH[1], {"auth": proof})):
        client = await npm.open(relay.url, package=package, path="/public", **options)
        await client.until("connect")
        assert await asked(client, "register", "1") == {"ok": True}


@pytest.mark.parametrize("transports", [["websocket"], ["polling"]])
async def test_a_4_x_client_receives_missed_events_after_a_cut(
    relay: RelayProcess, npm: Driver, transports: list[str]
) -> None:
    client = await page(npm, relay, "alice", transports=transports)
    await client.until("connect")
    await asked(client, "register", "1")
    assert await said(relay, "1", "before") == [await heard(client)]
    await client.do("cut")
    await client.until("disconnect")
    missed = await said(relay, "1", *(f"missed {number}" for number in range(5)))
    again = await client.until("connect")
    assert again["recovered"] is True
    contents = missed + await said(relay, "1", "after")
    assert [await heard(client) for _ in contents] == contents


@pytest.mark.parametrize("transports", [["websocket"], ["polling", "websocket"]])
async def test_repeated_cuts_lose_and_repeat_nothing(
    relay: RelayProcess, npm: Driver, transports: list[str]
) -> None:
    client = await page(npm, relay, "alice", transports=transports)
    await client.until("connect")
    await asked(client, "register", "1")
    contents = [tree(str(number)) for number in range(400)]

    async def produce() -> None:
        for content in contents:
            await asyncio.to_thread(
                redis, relay.server, "XADD", "relay:stream:{pydio:1}", "*", "data", content
            )

    async with asyncio.TaskGroup() as group:
        producing = group.create_task(produce())
        found: list[str] = []
        cuts = 0
        while len(found) < len(contents):
            # Cut after each tenth message, as long as events follow.
            if len(found) >= 10 * (cuts + 1) and not producing.done():
                cuts += 1
                await client.do("cut")
            seen = await client.next()
            # Relay must not reject a client that reconnects: it would not try again.
            assert seen["what"] != "connect_error", seen
            if seen["what"] == "event":
                found.append(seen["args"][1])
            elif seen["what"] == "connect":
                assert seen["recovered"] is True
    assert found == contents
    assert cuts > 1


async def test_recovers_a_client_that_had_received_nothing(
    relay: RelayProcess, npm: Driver
) -> None:
    client = await page(npm, relay, "alice", reconnectionDelay=500, reconnectionDelayMax=500)
    await client.until("connect")
    await asked(client, "register", "2")
    await client.do("cut")
    await client.until("disconnect")
    missed = await said(relay, "2", "missed")
    assert (await client.until("connect"))["recovered"] is True
    assert await heard(client) == missed[0]


async def test_a_2_5_client_reconnects_and_registers_again(
    relay: RelayProcess, npm: Driver
) -> None:
    client = await page(npm, relay, "alice", "socket.io-client-2")
    await client.until("connect")
    await asked(client, "register", "1")
    await client.do("cut")
    await client.until("disconnect")
    await client.until("connect")
    assert await asked(client, "register", "1") == {"ok": True}
    assert await said(relay, "1", "again") == [await heard(client)]


@pytest.mark.parametrize("package", BOTH)
async def test_polling_over_two_workers(
    valkey: Server, pydio: Pydio, npm: Driver, package: str
) -> None:
    relay = made(valkey, pydio, "--workers", "2")
    await asyncio.to_thread(relay.start)
    try:
        pages = [await page(npm, relay, "alice", package, transports=["polling"]) for _ in range(4)]
        for client in pages:
            await client.until("connect")
            assert await asked(client, "register", "1") == {"ok": True}
        (content,) = await said(relay, "1", "for all four")
        assert [await heard(client) for client in pages] == [content] * 4
    finally:
        await asyncio.to_thread(relay.kill)


async def test_another_user_cannot_resume_the_session(
    relay: RelayProcess, npm: Driver, pydio: Pydio
) -> None:
    bob = pydio.login("bob", w_2="r")
    delays: dict[str, Any] = {"reconnectionDelay": 1000, "reconnectionDelayMax": 1000}
    client = await page(npm, relay, "alice", **delays)
    await client.until("connect")
    await asked(client, "register", "1")
    await client.do("cut")
    await client.until("disconnect")
    # Another user logs in with the same browser meanwhile.
    pydio.sessions["alice"] = bob
    await said(relay, "1", "not for bob")
    again = await client.until("connect")
    assert again["recovered"] is False
    assert await asked(client, "register", "2") == {"ok": True}
    assert await said(relay, "2", "for bob") == [await heard(client)]


async def test_a_right_is_lost_while_the_client_is_disconnected(
    relay: RelayProcess, npm: Driver, pydio: Pydio
) -> None:
    client = await page(npm, relay, "alice")
    await client.until("connect")
    await asked(client, "register", "1")
    del pydio.sessions["alice"].acl["1"]
    assert await heard(client) == RELOAD_WORKSPACES
    await client.do("cut")
    await client.until("disconnect")
    await said(relay, "1", "not for alice")
    await client.until("connect")
    assert await asked(client, "register", "1") == {"ok": False}
    assert await said(relay, "*", "for all") == [await heard(client)]


async def test_a_logout_disconnects_the_page(
    relay: RelayProcess, npm: Driver, pydio: Pydio
) -> None:
    client = await page(npm, relay, "alice")
    await client.until("connect")
    del pydio.sessions["alice"]
    gone = await client.until("disconnect", LIMIT_S * 2)
    assert (gone["reason"], gone["active"]) == ("io server disconnect", False)


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_page_resumes_after_a_restart(relay: RelayProcess, npm: Driver, how: str) -> None:
    client = await page(npm, relay, "alice")
    await client.until("connect")
    await asked(client, "register", "1")
    assert await said(relay, "1", "before") == [await heard(client)]
    await asyncio.to_thread(getattr(relay, how))
    # The page misses what any producer appends meanwhile.
    redis(relay.server, "XADD", "relay:stream:{pydio:1}", "*", "data", tree("meanwhile"))
    await asyncio.to_thread(relay.start)
    again = await client.until("connect", LIMIT_S * 2)
    assert again["recovered"] is True
    assert await heard(client) == tree("meanwhile")
    assert await said(relay, "1", "after") == [await heard(client)]


async def test_a_separate_namespace(valkey: Server, pydio: Pydio, npm: Driver) -> None:
    relay = made(valkey, pydio, npm_namespace="/pydio", public_path="/ws/pydio")
    await asyncio.to_thread(relay.start)
    try:
        headers = {"Cookie": "AjaXplorer=alice", "Origin": relay.url}
        for package in BOTH:
            client = await npm.open(
                f"{relay.url}/pydio", package=package, path="/ws/pydio", extraHeaders=headers
            )
            await client.until("connect")
            assert await asked(client, "register", "1") == {"ok": True}
            assert await said(relay, "1", package) == [await heard(client)]
    finally:
        await asyncio.to_thread(relay.kill)
