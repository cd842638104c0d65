"""The Socket.IO protocol with the real clients of all versions: authentication and delivery."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest

from relay.cli import access
from relay.config.settings import RedisSettings
from relay.core.model import Channel
from tests.support.clients import native, until
from tests.support.relay import RelayProcess
from tests.support.socketio import (
    CLIENTS,
    SECRET,
    Driver,
    axr_token,
    connect_options,
    npm_clients,
)
from tests.support.valkey import Server

pytestmark = pytest.mark.redis
TRANSPORTS = (["polling"], ["websocket"], ["polling", "websocket"])
OLD, NEW = "socket.io-client-2", "socket.io-client"


@pytest.fixture(scope="module")
def axr(valkey: Server) -> Iterator[RelayProcess]:
    """Run a relay that serves AcceleratXR's Socket.IO protocol."""
    process = RelayProcess(valkey, settings=[f"protocol:socketio.secret={SECRET}"]).start()
    yield process
    process.kill()


@pytest.fixture
async def npm() -> AsyncIterator[Driver]:
    async with npm_clients() as driver:
        yield driver


def without_offset(package: str, args: list[Any]) -> list[Any]:
    """Return the application's arguments, without the cursor of a client that can recover."""
    if package == "socket.io-client" and isinstance(args[-1], str) and args[-1].startswith("c1."):
        return args[:-1]
    return args


@pytest.mark.parametrize("transports", TRANSPORTS, ids="+".join)
@pytest.mark.parametrize("package", CLIENTS)
@pytest.mark.parametrize("path", ["/notifications", "/socket.io"])
async def test_every_generation_gets_its_rooms_events_over_every_transport(
    axr: RelayProcess, npm: Driver, package: str, transports: list[str], path: str
) -> None:
    uid = f"u-{package}-{'-'.join(transports)}{path.replace('/', '-')}"
    client = await npm.open(
        f"{axr.url}/axr",
        package=package,
        path=path,
        transports=transports,
        **connect_options(package, axr_token(uid)),
    )
    connected = await client.until("connect")
    assert connected["id"]
    axr.xadd("axr:allusers", data='{"hello":"world"}', type="msg")
    assert without_offset(package, await client.event()) == ["msg", {"hello": "world"}]
    axr.xadd(f"axr:{uid}", data="[1,2]", type="ü😀")
    assert without_offset(package, await client.event()) == ["ü😀", [1, 2]]
    # The client must not receive events of other rooms, or with names that client libraries
    # reserve.
    axr.xadd("axr:other", data="1")
    axr.xadd(f"axr:{uid}", data="1", type="disconnect")
    axr.xadd(f"axr:{uid}", data="plain text")
    assert without_offset(package, await client.event()) == ["message", "plain text"]


@pytest.mark.parametrize("package", CLIENTS)
async def test_entries_that_are_no_events_do_not_harm_a_client(
    axr: RelayProcess, npm: Driver, package: str
) -> None:
    uid = f"hand-{package}"
    options = connect_options(package, axr_token(uid))
    client = await npm.open(f"{axr.url}/axr", package=package, **options)
    await client.until("connect")
    packets = ('["connect",1]', '["disconnect"]', "[]", "[1]", '[{"a":1}]', "{}", "null")
    for packet in packets:
        axr.xadd(f"axr:{uid}", data='"x"', type="hand", packet=packet)
    place = '{"_placeholder":true,"num":%d}'
    axr.xadd(f"axr:{uid}", data="[%s]" % (place % 3), type="hand", **{"binary.0": "x"})
    axr.xadd(f"axr:{uid}", data='"end"', type="end")
    seen: list[dict[str, Any]] = []
    while not seen or seen[-1]["args"][0] != "end":
        found = await client.next()
        if found["what"] not in ("upgrade", "offset"):
            assert found["what"] == "event"
            seen.append(found)
    # Two packets are ignored because client libraries reserve their names. For the other invalid
    # packets, relay delivers `data`.
    assert len(seen) == len(packets) - 2 + 1 + 1
    assert {tuple(map(str, each["args"][:2])) for each in seen[:-2]} == {("hand", "x")}


async def test_session_ids_do_not_reveal_the_host(axr: RelayProcess, npm: Driver) -> None:
    async with aiohttp.ClientSession() as http:
        url = f"{axr.url}/socket.io/?EIO=4&transport=polling"
        async with http.get(url) as answer:
            engine_id = json.loads((await answer.text())[1:])["sid"]
    client = await npm.open(f"{axr.url}/axr", **connect_options(NEW, axr_token("ids")))
    connected = await client.until("connect")
    old = await npm.open(f"{axr.url}/axr", package=OLD, **connect_options(OLD, axr_token("ids")))
    name = f"{socket.gethostname()}-{axr.port}"
    for sid in (engine_id, connected["id"], (await old.until("connect"))["id"]):
        parts = [part + "=" * (-len(part) % 4) for part in re.split("[~.#]", sid)]
        shown = [sid, *(urlsafe_b64decode(part).decode(errors="replace") for part in parts)]
        assert not any(word in each for each in shown for word in (name, str(axr.port)))


@pytest.mark.parametrize("package", CLIENTS[:2])
@pytest.mark.parametrize("transports", TRANSPORTS, ids="+".join)
async def test_clients_that_cannot_recover_get_no_further_argument(
    axr: RelayProcess, npm: Driver, package: str, transports: list[str]
) -> None:
    options = connect_options(package, axr_token("plain"))
    client = await npm.open(f"{axr.url}/axr", package=package, transports=transports, **options)
    await client.until("connect")
    for number in range(3):
        axr.xadd("axr:plain", data=f'"{number}"', type="text")
    seen = [await client.event() for _ in range(3)]
    assert seen == [["text", "0"], ["text", "1"], ["text", "2"]]


@pytest.mark.parametrize("mark", ["", "&t=1764230000"], ids=["without", "seconds"])
async def test_other_clients_of_engine_io_4_get_no_cursor_in_their_events(
    axr: RelayProcess, mark: str
) -> None:
    """The C++ client sends the time as `t`."""
    uid = f"other{mark[1:2]}"
    url = f"{axr.url}/socket.io/?EIO=4&transport=websocket{mark}"
    async with aiohttp.ClientSession() as http, http.ws_connect(url) as socket:
        await socket.receive_str()
        await socket.send_str("40/axr," + json.dumps({"token": axr_token(uid)}))
        assert (await socket.receive_str()).startswith("40/axr,{")
        axr.xadd(f"axr:{uid}", data="[]", type="nothing", args="0")
        assert await socket.receive_str() == '42/axr,["nothing"]'
        assert (await socket.receive_str()).startswith('42/axr,["relay:offset","c1.')


@pytest.mark.parametrize("package", CLIENTS)
async def test_the_main_namespace_exists_and_has_no_events(
    axr: RelayProcess, npm: Driver, package: str
) -> None:
    """Many clients connect to it first. It needs no token, and one can leave it again."""
    main = await npm.open(axr.url, package=package)
    await main.until("connect")
    options = connect_options(package, axr_token(f"main-{package}"))
    client = await npm.open(f"{axr.url}/axr", package=package, **options)
    await client.until("connect")
    axr.xadd("axr:allusers", data='"for /axr"', type="msg")
    assert without_offset(package, await client.event()) == ["msg", "for /axr"]
    await main.do("emit", "hello", 1)
    await main.do("close")
    assert (await main.until("disconnect"))["reason"] == "io client disconnect"
    assert main.events == []


async def test_a_client_of_two_namespaces_keeps_the_other(axr: RelayProcess) -> None:
    url = f"{axr.url}/socket.io/?EIO=4&transport=websocket"
    connect = "40/axr," + json.dumps({"token": axr_token("both")})
    async with aiohttp.ClientSession() as http, http.ws_connect(url) as socket:
        await socket.receive_str()
        await socket.send_str("40")
        assert (await socket.receive_str()).startswith('40{"sid":')
        for _ in range(2):
            await socket.send_str(connect)
            assert (await socket.receive_str()).startswith("40/axr,{")
            await socket.send_str("41/axr,")


async def test_the_clients_script_is_not_served(axr: RelayProcess) -> None:
    async with aiohttp.ClientSession() as http:
        for path in ("notifications/socket.io.js", "socket.io/socket.io.min.js"):
            async with http.get(f"{axr.url}/{path}") as answer:
                assert answer.status == 404
                assert "from your own server or a CDN" in await answer.text()


@pytest.mark.parametrize("package", CLIENTS)
@pytest.mark.parametrize("transports", TRANSPORTS[:2], ids="+".join)
@pytest.mark.parametrize("token", ["", "nonsense", "expired", "other", "profileless"])
async def test_without_a_good_token_clients_are_told_put_out_and_get_nothing(
    axr: RelayProcess, npm: Driver, package: str, transports: list[str], token: str
) -> None:
    given = {
        "expired": axr_token(exp=time.time() - 1),
        "other": axr_token(secret="the secret of another site altogether"),
        "profileless": axr_token(profile={"name": "no uid"}),
    }.get(token, token)
    options = connect_options(package, given)
    client = await npm.open(f"{axr.url}/axr", package=package, transports=transports, **options)
    refused = await client.next()
    if package == OLD:
        assert refused["what"] == "error"
    else:
        assert refused["what"] == "connect_error"
        assert "token" in refused["message"]
    if package != "socket.io-client":
        gone = await client.until("disconnect")
        assert (gone["reason"], gone["again"]) == ("io server disconnect", False)
    assert not client.events


@pytest.mark.parametrize("package", CLIENTS)
async def test_a_grant_brings_the_client_back_to_its_room(
    axr: RelayProcess, npm: Driver, package: str
) -> None:
    uid = f"granted-{package}"
    options = connect_options(package, axr_token(uid))
    client = await npm.open(f"{axr.url}/axr", package=package, transports=["websocket"], **options)
    await client.until("connect")
    settings = RedisSettings(url=axr.server.url("maintenance"))
    await access.revoke(settings, Channel(f"axr:{uid}"), uid)
    axr.xadd(f"axr:{uid}", data='"secret"', type="text")
    axr.xadd("axr:allusers", data='"all"', type="text")
    assert without_offset(package, await client.event()) == ["text", "all"]
    assert await access.grant(settings, Channel(f"axr:{uid}"), uid)
    # The protocol has no message for a new room, so relay cuts the connection and the client
    # reconnects.
    await client.until("disconnect")
    await client.until("connect")
    axr.xadd(f"axr:{uid}", data='"again"', type="text")
    assert without_offset(package, await client.event()) == ["text", "again"]


@pytest.mark.parametrize("package", CLIENTS)
async def test_an_unknown_namespace_is_refused_in_the_clients_words(
    axr: RelayProcess, npm: Driver, package: str
) -> None:
    options = connect_options(package, axr_token())
    client = await npm.open(f"{axr.url}/nope", package=package, **options)
    refused = await client.next()
    message = refused["args"][0] if package == OLD else refused["message"]
    assert message == "Invalid namespace"


async def test_tokens_are_found_wherever_the_documents_put_them(
    axr: RelayProcess, npm: Driver
) -> None:
    token = axr_token("places", as_text=True)
    places: list[dict[str, Any]] = [
        {"query": {"jwt_token": token}},
        {"auth": {"jwt_token": token}},
        {"auth": {"token": f"Bearer {token}"}},
        {"extraHeaders": {"Authorization": f"JWT {token}"}},
        {"extraHeaders": {"Authorization": f"bearer {token}"}},
        {"extraHeaders": {"Cookie": f"a=b; jwt={token}", "Origin": axr.url}},
    ]
    for options in places:
        client = await npm.open(f"{axr.url}/axr", **options)
        assert (await client.next())["what"] == "connect", options
    foreign = {"Cookie": f"jwt={token}", "Origin": "https://evil.example"}
    client = await npm.open(f"{axr.url}/axr", extraHeaders=foreign)
    refused = await client.next()
    assert refused["what"] == "connect_error"
    assert refused["message"] == (
        "Origin 'https://evil.example' is not allowed;"
        " add it to [protocol:socketio] allowed_origins"
    )


@pytest.mark.timeout(60)
async def test_the_end_of_the_token_ends_the_connection(axr: RelayProcess, npm: Driver) -> None:
    # Long enough for all of them to connect on a busy machine.
    ends = time.time() + 12
    clients = []
    for package in CLIENTS:
        for transports in TRANSPORTS[:2]:
            options = connect_options(package, axr_token("brief", exp=ends))
            clients.append(
                await npm.open(f"{axr.url}/axr", package=package, transports=transports, **options)
            )
    for client in clients:
        await client.until("connect")
    for client in clients:
        gone = await client.until("disconnect")
        assert (gone["reason"], gone["again"]) == ("io server disconnect", False)


async def test_an_entry_reaches_clients_of_every_door_that_may_read_it(
    axr: RelayProcess, npm: Driver
) -> None:
    options = connect_options("socket.io-client", axr_token("both"))
    client = await npm.open(f"{axr.url}/axr", **options)
    await client.until("connect")
    async with native(axr, channels=["axr:both"]) as door:
        stream = await door.sse("axr:both")
        axr.xadd("axr:both", data='{"n":1}', type="msg")
        block = await stream.next()
        assert (block.event, block.json()) == ("msg", {"n": 1})
    assert (await client.event())[:2] == ["msg", {"n": 1}]


# ---- errors of Engine.IO, as captured from engine.io 6.6 ----------------------------------------


@pytest.mark.parametrize(
    ("method", "query", "status", "code", "message"),
    [
        ("GET", "EIO=4&transport=carrier-pigeon", 400, 0, "Transport unknown"),
        ("GET", "EIO=4&transport=polling&sid=unknown", 400, 1, "Session ID unknown"),
        ("POST", "EIO=4&transport=polling", 400, 2, "Bad handshake method"),
        ("GET", "EIO=4&transport=websocket", 400, 3, "Bad request"),
        ("GET", "EIO=5&transport=polling", 400, 5, "Unsupported protocol version"),
        ("GET", "EIO=2&transport=polling", 400, 5, "Unsupported protocol version"),
    ],
)
async def test_errors_are_those_of_engine_io(
    axr: RelayProcess, method: str, query: str, status: int, code: int, message: str
) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"{axr.url}/notifications/?{query}") as answer,
    ):
        assert answer.status == status
        assert json.loads(await answer.read()) == {"code": code, "message": message}


async def test_a_websocket_of_an_unsupported_version_is_refused_before_the_upgrade(
    axr: RelayProcess,
) -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect(f"{axr.url}/socket.io/?EIO=2&transport=websocket")
        assert refused.value.status == 400


@pytest.mark.parametrize("body", [b"nonsense", b"42/axr,[]", b'42/axr,["early"]', b"4\xff", b"2"])
async def test_garbage_closes_its_own_connection_and_no_other(
    axr: RelayProcess, npm: Driver, body: bytes
) -> None:
    options = connect_options("socket.io-client", axr_token("calm"))
    calm = await npm.open(f"{axr.url}/axr", **options)
    await calm.until("connect")
    url = f"{axr.url}/notifications/?EIO=4&transport=polling"
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as answer:
            sid = json.loads((await answer.text())[1:])["sid"]
        async with session.post(f"{url}&sid={sid}", data=body) as answer:
            assert answer.status in (200, 400)

        async def unknown() -> bool:
            async with session.get(f"{url}&sid={sid}") as answer:
                return answer.status == 400

        async with asyncio.timeout(30):
            while not await unknown():
                pass
    axr.xadd("axr:calm", data="1", type="msg")
    assert (await calm.event())[:2] == ["msg", 1]


async def test_a_body_that_is_too_large_is_refused_and_ends_the_session(axr: RelayProcess) -> None:
    url = f"{axr.url}/notifications/?EIO=4&transport=polling"
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as answer:
            handshake = json.loads((await answer.text())[1:])
        assert handshake["maxPayload"] == 1_000_000
        mine = f"{url}&sid={handshake['sid']}"
        async with session.post(mine, data=b"4" * 1_000_001) as answer:
            assert answer.status == 413
        async with session.get(mine) as answer:
            assert answer.status == 400


async def test_a_repeated_poll_ends_the_session(axr: RelayProcess) -> None:
    # A proxy repeats a GET request if its connection was lost, and the answer with it.
    async with aiohttp.ClientSession() as session:

        async def open_session(stamp: str) -> str:
            url = f"{axr.url}/notifications/?EIO=4&transport=polling"
            async with session.get(url + stamp) as answer:
                sid: str = json.loads((await answer.text())[1:])["sid"]
            url = f"{url}&sid={sid}"
            connect = "40/axr," + json.dumps({"token": axr_token("repeats")})
            async with session.post(url, data=connect.encode()) as answer:
                assert answer.status == 200
            return url

        async def poll(url: str) -> int:
            # The answer to CONNECT, or an event.
            await asyncio.to_thread(axr.xadd, "axr:repeats", data="1", type="msg")
            async with session.get(url) as answer:
                return answer.status

        url = await open_session("&t=a")
        assert [await poll(f"{url}&t={stamp}") for stamp in "bcbd"] == [200] * 4
        assert await poll(f"{url}&t=d") == 400
        # The session has ended.
        assert await poll(f"{url}&t=e") == 400
        for same in ("", "&t=constant"):
            url = await open_session(same)
            assert [await poll(url + same) for _ in range(4)] == [200] * 4
        # Seconds: several polls of one second have the same.
        url = await open_session("&t=1764230000")
        for seconds in (1764230000, 1764230001, 1764230001, 1764230002, 1764230002):
            assert await poll(f"{url}&t={seconds}") == 200


async def test_shut_without_a_secret(valkey: Server) -> None:
    relay = RelayProcess(valkey)
    await asyncio.to_thread(relay.start)
    try:
        async with aiohttp.ClientSession() as session:
            url = f"{relay.url}/notifications/?EIO=4&transport=polling"
            async with session.get(url) as answer:
                assert answer.status == 404
        assert await until(lambda: "Protocol socketio is disabled" in "\n".join(relay.log))
    finally:
        await asyncio.to_thread(relay.stop)
