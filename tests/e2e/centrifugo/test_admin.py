"""Centrifugo v1's admin socket, `/auth/`, `watch` and `/debug/`, as its web page uses them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest

from tests.support.centrifugo_client import SECRET, Centrifugo, centrifugo
from tests.support.relay import RelayProcess
from tests.support.valkey import Server, free_port

pytestmark = pytest.mark.redis
PASSWORD = "a password"
RULES = [
    f"protocol:centrifugo.secret={SECRET}",
    "protocol:centrifugo.web=true",
    f"protocol:centrifugo.admin_password={PASSWORD}",
    "protocol:centrifugo.admin_secret=a secret for tokens",
    "protocol:centrifugo:seen.watch=true",
    "protocol:centrifugo:seen.publish=true",
    "protocol:centrifugo:seen.history_size=5",
    "protocol:centrifugo:seen.history_lifetime=60",
    "protocol:centrifugo:unseen.publish=true",
]
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture(scope="module")
def relay(valkey: Server) -> Iterator[RelayProcess]:
    process = RelayProcess(valkey, settings=RULES).start()
    yield process
    process.kill()


class Admin:
    """An admin socket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def frame(self) -> Any:
        message = await self.socket.receive(8)
        assert message.type is aiohttp.WSMsgType.TEXT, message
        return json.loads(message.data)

    async def ask(self, method: str, **params: Any) -> Any:
        await self.socket.send_json({"uid": "9", "method": method, "params": params})
        (reply,) = await self.frame()
        return reply

    async def closed(self) -> tuple[int | None, Any]:
        message = await self.socket.receive(8)
        assert message.type is aiohttp.WSMsgType.CLOSE, message
        return message.data, json.loads(message.extra or "null")


class Admins:
    """Opens admin sockets."""

    def __init__(self, session: aiohttp.ClientSession, site: Centrifugo) -> None:
        self._session = session
        self.site = site

    async def open(self, url: str = "", path: str = "/socket") -> Admin:
        return Admin(await self._session.ws_connect((url or self.site.url) + path))

    async def token(self, url: str = "") -> str:
        answer = await self.site.request(b"password=a+password", FORM, url=url, path="/auth/")
        assert answer.status == 200
        assert answer.body.endswith(b"\n")
        token: str = json.loads(answer.body)["token"]
        return token


@pytest.fixture
async def admins(relay: RelayProcess) -> AsyncIterator[Admins]:
    async with centrifugo(relay.url) as site, aiohttp.ClientSession() as session:
        yield Admins(session, site)


async def test_only_the_password_returns_a_token(admins: Admins, valkey: Server) -> None:
    for body in (b"password=wrong", b"", b"password="):
        answer = await admins.site.request(body, FORM, path="/auth/")
        assert (answer.status, answer.body) == (400, b"Bad Request\n")
    answer = await admins.site.request(b"", {}, path="/auth/?password=a%20password", method="GET")
    assert answer.status == 200
    assert await admins.token() != ""
    # Guesses are limited as at the login of the console, which has the same password.
    try:
        guess = b"password=wrong"
        found = [(await admins.site.request(guess, FORM, path="/auth/")).status for _ in range(20)]
        assert set(found) == {400, 429}
    finally:
        valkey.client("admin").delete("relay:store:console:attempts")


async def test_replies_are_arrays_with_and_without_watch(admins: Admins) -> None:
    admin = await admins.open()
    reply = await admin.ask("connect", token=await admins.token())
    wanted = {"uid": "9", "method": "connect", "error": None, "body": True}
    assert (reply, list(reply)) == (wanted, list(wanted))
    assert (await admin.ask("ping"))["body"] == "pong"
    await admin.socket.send_str("[]")
    await admin.socket.send_json(
        [
            {"uid": "1", "method": "publish", "params": {"channel": "seen:a", "data": {"n": 1}}},
            {"uid": "2", "method": "history", "params": {"channel": "seen:a"}},
        ]
    )
    published, history = await admin.frame()
    assert published == {"uid": "1", "method": "publish", "error": None, "body": None}
    assert [each["data"] for each in history["body"]["data"]] == [{"n": 1}]
    info = (await admin.ask("info"))["body"]["data"]
    assert (info["version"], info["config"]["node_ping_interval"]) == ("1.8.0", 3_000_000_000)
    text = json.dumps(info)
    assert not [each for each in (SECRET, PASSWORD, "a secret for tokens") if each in text]
    assert (await admin.ask("stats"))["body"]["data"]["nodes"]
    assert (await admin.ask("presence", channel="seen:a"))["error"] == "not available"


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        ('{"method":"ping"}', "unauthorized"),
        ('{"method":"connect","params":{"token":"no","watch":true}}', "unauthorized"),
        ('{"method":"connect","params":{}}', "unauthorized"),
        ("garbage", "invalid message"),
        (' {"method":"ping"}', "invalid message"),
        ('{"method":"connect"}', "invalid message"),
    ],
)
async def test_a_rejected_administrator_receives_the_reason(
    admins: Admins, frame: str, reason: str
) -> None:
    admin = await admins.open()
    await admin.socket.send_str(frame)
    assert await admin.closed() == (3000, {"reason": reason, "reconnect": True})


async def test_long_messages_need_a_password(admins: Admins) -> None:
    long = json.dumps({"uid": "1", "method": "ping", "params": {"x": "x" * 100_000}})
    stranger = await admins.open()
    await stranger.socket.send_str(long)
    message = await stranger.socket.receive(8)
    assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1009)
    known = await admins.open()
    await known.ask("connect", token=await admins.token())
    await known.socket.send_str(long)
    assert (await known.frame())[0]["body"] == "pong"


async def test_later_errors_close_too(admins: Admins) -> None:
    for frame, reason in (
        ('{"method":"sing","params":{}}', "method not found"),
        ("1", "invalid message"),
    ):
        admin = await admins.open()
        await admin.ask("connect", token=await admins.token())
        await admin.socket.send_str(frame)
        assert await admin.closed() == (3000, {"reason": reason, "reconnect": True})


async def test_an_admin_socket_that_does_not_authenticate_is_closed(valkey: Server) -> None:
    settings = [*RULES, "protocol:centrifugo.stale_connection_close_delay=0.5"]
    process = RelayProcess(valkey, settings=settings).start()
    try:
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{process.port}"
            silent = Admin(await session.ws_connect(f"{url}/socket"))
            async with session.post(f"{url}/auth/", data={"password": PASSWORD}) as answer:
                token = (await answer.json())["token"]
            known = Admin(await session.ws_connect(f"{url}/socket"))
            assert (await known.ask("connect", token=token))["error"] is None
            code, reason = await silent.closed()
            assert (code, reason["reason"]) == (3000, "unauthorized")
            # The other connections stay open.
            assert (await known.ask("ping"))["body"] == "pong"
    finally:
        process.stop()


async def test_a_plain_request_is_rejected(admins: Admins) -> None:
    answer = await admins.site.request(b"", {}, path="/socket", method="GET")
    assert (answer.status, answer.body) == (400, b"Bad Request\n")


@pytest.mark.timeout(60)
async def test_watch_shows_publications_of_all_workers(valkey: Server) -> None:
    hosts = [
        RelayProcess(valkey, settings=RULES, flags=["--workers", "2"]),
        RelayProcess(valkey, settings=RULES),
    ]
    for host in hosts:
        await asyncio.to_thread(host.start)
    try:
        async with centrifugo(hosts[0].url) as site, aiohttp.ClientSession() as session:
            admins = Admins(session, site)
            # A token is valid on all hosts.
            token = await admins.token(hosts[1].url)
            watchers = [await admins.open() for _ in range(6)]
            for each in watchers:
                assert (await each.ask("connect", token=token, watch=True))["body"] is True
            # The subscription begins shortly after the reply.
            for each in watchers:
                reply = await each.ask("channels")
                assert reply["body"]["data"] == []
            client = await site.client("anna", url=hosts[1].url)
            await client.subscribe("seen:x")
            await client.subscribe("unseen:x")
            first = watchers[0]

            async def shown() -> bool:
                """Return True if all of them receive publications."""
                await site.api("publish", channel="seen:probe", data=0)
                return all([await probe(each) for each in watchers])

            async def probe(admin: Admin) -> bool:
                try:
                    message = await admin.socket.receive(0.3)
                except TimeoutError:
                    return False
                return bool(json.loads(message.data)["method"] == "message")

            async with asyncio.timeout(30):
                while not await shown():
                    pass
            await client.ask("publish", channel="unseen:x", data=1)
            await client.ask("publish", channel="seen:x", data={"n": [1.0, "<"]})
            await site.api("publish", channel="seen:y", data=2, client="c1")
            for each in watchers:
                found: list[Any] = []
                while len(found) < 2:
                    frame = await each.frame()
                    if frame["body"]["channel"] != "seen:probe":
                        found.append(frame)
                assert list(found[0]) == ["method", "error", "body"]
                assert list(found[0]["body"]) == ["uid", "channel", "data", "client", "info"]
                assert found[0]["body"]["info"] == {"user": "anna", "client": client.id}
                assert (found[0]["body"]["data"], found[1]["body"]["data"]) == (
                    {"n": [1.0, "<"]},
                    2,
                )
                assert found[1]["body"]["client"] == "c1"
                assert found[1]["error"] is None
            assert (await first.ask("ping"))["body"] == "pong"
            # Other clients do not receive them.
            await client.subscribe("relay.centrifugo.watch")
            await site.api("publish", channel="seen:y", data=3)
            assert (await first.frame())["body"]["data"] == 3
            await client.ask("ping")
            assert [each["body"]["channel"] for each in client.pushes] == ["unseen:x", "seen:x"]
    finally:
        for host in hosts:
            host.kill()


async def test_a_separate_port_without_a_password_and_debug(valkey: Server) -> None:
    port = free_port()
    own = ("web=false", "admin=true", "insecure_admin=true", "debug=true", f"admin_port={port}")
    settings = [*RULES, *(f"protocol:centrifugo.{each}" for each in own)]
    relay = RelayProcess(valkey, settings=settings)
    await asyncio.to_thread(relay.start)
    try:
        url = f"http://127.0.0.1:{port}"
        async with centrifugo(url) as site, aiohttp.ClientSession() as session:
            admin = await Admins(session, site).open()
            # The connection is counted at once.
            assert (await admin.ask("ping"))["body"] == "pong"
            assert (await admin.ask("connect", watch=True))["body"] is True
            answer = await site.request(b"", {}, path="/debug/", method="GET")
            text = answer.body.decode()
            assert answer.headers["Content-Type"].startswith("text/plain")
            for part in ("1 centrifugo admin", "node_memory_sys", "centrifugo node", "# tasks"):
                assert part in text
            assert (await site.request(b"", {}, path="/auth/", method="GET")).status == 404
            for path in ("/socket", "/debug/"):
                answer = await site.request(b"", {}, url=relay.url, path=path, method="GET")
                assert answer.status == 404
            await asyncio.to_thread(relay.stop)
            assert (await admin.closed())[1] == {"reason": "shutting down", "reconnect": True}
    finally:
        relay.kill()
