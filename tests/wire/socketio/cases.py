"""Cases of Engine.IO 3 and 4 and of Socket.IO, from the protocols' documents.

A server under test echoes each Engine.IO message at /engine.io/. At /socket.io/ it sends the event
`auth` with the `auth` object in the namespaces `/` and `/custom`, answers the event `message` with
`message-back` and the same arguments, and acknowledges `message-with-ack` with its arguments. It
pings every 0.5 s and waits 1.5 s for the pong, and closes a client that joins no namespace within
2 s. `reference.cjs` is such a server. By hand:

    python -m tests.wire.socketio.cases http://127.0.0.1:PORT ["engine.io 3"]
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp

LIMIT_S = 5.0
# One interval and timeout, and some time for a busy machine.
SILENCE_S = 8.0
Case = Callable[["Server"], Awaitable[None]]
SUITES: dict[str, list[Case]] = {"engine.io 3": [], "engine.io 4": [], "socket.io": []}


class Server:
    """A server under test."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.http = http

    async def request(
        self,
        method: str,
        query: str,
        body: bytes | None = None,
        path: str = "/engine.io/",
        **headers: str,
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Send a request and return status, body and headers."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            named.setdefault("Content-Type", "text/plain;charset=UTF-8")
        url = f"{self.url}{path}?{query}"
        async with (
            asyncio.timeout(LIMIT_S),
            self.http.request(method, url, data=body, headers=named) as answer,
        ):
            return answer.status, await answer.read(), answer.headers

    @asynccontextmanager
    async def socket(self, query: str, path: str = "/engine.io/") -> AsyncIterator[Socket]:
        """Open a WebSocket."""
        async with self.http.ws_connect(f"{self.url}{path}?{query}", autoping=False) as socket:
            yield Socket(socket)

    async def is_refused(self, query: str) -> bool:
        """Return True if no WebSocket opens, or if it is closed at once."""
        try:
            async with self.socket(query) as socket:
                return await socket.closed()
        except aiohttp.ClientError:
            return True


class Socket:
    """A WebSocket of a case."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    async def send(self, *packets: str | bytes) -> None:
        """Send text and binary frames."""
        for packet in packets:
            if isinstance(packet, str):
                await self._socket.send_str(packet)
            else:
                await self._socket.send_bytes(packet)

    async def next(self) -> str | bytes:
        """Return the next frame other than a ping, or "closed"."""
        while (found := await self.any()) == "2":
            await self.send("3")
        return found

    async def any(self) -> str | bytes:
        """Return the next frame, or "closed"."""
        async with asyncio.timeout(LIMIT_S):
            found = await self._socket.receive()
        if found.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            data: str | bytes = found.data
            return data
        return "closed"

    async def closed(self, *, answers: bool = True) -> bool:
        """Return True when the server closes. `answers`: answer its pings."""
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(SILENCE_S):
                while (await (self.next() if answers else self.any())) != "closed":
                    pass
                return True
        return False


def case(
    *suites: str,
) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., Awaitable[None]]]:
    """Add a case to suites. A case of both versions of Engine.IO takes the version."""

    def add(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        for suite in suites:
            SUITES[suite].append(_bound(test, suite))
        return test

    return add


def _bound(test: Callable[..., Awaitable[None]], suite: str) -> Case:
    async def run(server: Server) -> None:
        if suite == "socket.io":
            await test(server)
        else:
            await test(server, Engine(server, int(suite[-1])))

    run.__name__ = test.__name__
    return run


class Engine:
    """One version of Engine.IO at the server."""

    def __init__(self, server: Server, version: int, path: str = "/engine.io/") -> None:
        self.server = server
        self.version = version
        self._path = path

    def query(self, transport: str, sid: str = "", more: str = "") -> str:
        """Return the query of a request."""
        return f"EIO={self.version}&transport={transport}" + (f"&sid={sid}" if sid else "") + more

    async def open(self, more: str = "") -> str:
        """Open a session over polling and return its ID."""
        status, body, _ = await self.get(more=more)
        assert status == 200, body
        sid: str = json.loads(self.packets(body)[0][1:])["sid"]
        return sid

    async def get(self, sid: str = "", more: str = "") -> tuple[int, bytes, Mapping[str, str]]:
        """Poll."""
        return await self.server.request("GET", self.query("polling", sid, more), path=self._path)

    async def post(self, sid: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        """Send a body, and return status and answer."""
        query = self.query("polling", sid)
        found = await self.server.request("POST", query, body, self._path, **headers)
        return found[0], found[1]

    async def poll(self, sid: str) -> list[str]:
        """Return the packets of the next poll other than pings, which are answered."""
        while True:
            status, body, _ = await self.get(sid)
            assert status == 200, (status, body)
            packets = self.packets(body)
            found = [packet for packet in packets if packet != "2"]
            if len(found) < len(packets):
                assert (await self.post(sid, self.body("3")))[0] == 200
            if found:
                return found

    def packets(self, body: bytes) -> list[str]:
        """Return the packets of a text body."""
        text, found = body.decode(), []
        if self.version == 4:
            return text.split("\x1e")
        while text:
            length, _, text = text.partition(":")
            found.append(text[: int(length)])
            text = text[int(length) :]
        return found

    def body(self, *packets: str) -> bytes:
        """Return a text body with these packets."""
        if self.version == 4:
            return "\x1e".join(packets).encode()
        return "".join(f"{len(each)}:{each}" for each in packets).encode()


BOTH = ("engine.io 3", "engine.io 4")
UNKNOWN = 400


# ---- Engine.IO: handshake ----------------------------------------------------------------------


def check_handshake(text: str, upgrades: list[str]) -> None:
    """Check the packet OPEN."""
    assert text[0] == "0"
    values = json.loads(text[1:])
    assert isinstance(values["sid"], str)
    assert values["sid"]
    assert values["upgrades"] == upgrades
    assert (values["pingInterval"], values["pingTimeout"]) == (500, 1500)


@case(*BOTH)
async def a_session_opens_over_polling(_: Server, engine: Engine) -> None:
    status, body, headers = await engine.get()
    assert status == 200
    assert headers["Content-Type"].lower() == "text/plain; charset=utf-8"
    check_handshake(engine.packets(body)[0], ["websocket"])


@case("engine.io 4")
async def an_unknown_version_is_refused_over_polling(server: Server, _: Engine) -> None:
    for query in ("transport=polling", "EIO=abc&transport=polling"):
        assert (await server.request("GET", query))[0] == 400


@case(*BOTH)
async def an_unknown_transport_is_refused_over_polling(server: Server, engine: Engine) -> None:
    for query in (f"EIO={engine.version}", f"EIO={engine.version}&transport=abc"):
        assert (await server.request("GET", query))[0] == 400


@case(*BOTH)
async def a_session_opens_with_get_only(server: Server, engine: Engine) -> None:
    for method in ("POST", "PUT"):
        assert (await server.request(method, engine.query("polling"), b""))[0] == 400


@case(*BOTH)
async def a_session_opens_over_websocket(server: Server, engine: Engine) -> None:
    async with server.socket(engine.query("websocket")) as socket:
        check_handshake(str(await socket.next()), [])


@case("engine.io 4")
async def an_unknown_version_is_refused_over_websocket(server: Server, _: Engine) -> None:
    for query in ("transport=websocket", "EIO=abc&transport=websocket"):
        assert await server.is_refused(query)


@case(*BOTH)
async def an_unknown_transport_is_refused_over_websocket(server: Server, engine: Engine) -> None:
    for query in (f"EIO={engine.version}", f"EIO={engine.version}&transport=abc"):
        assert await server.is_refused(query)


# ---- Engine.IO: messages -----------------------------------------------------------------------


@case(*BOTH)
async def a_text_comes_back_over_polling(_: Server, engine: Engine) -> None:
    sid = await engine.open()
    assert await engine.post(sid, engine.body("4h\u00e9llo \u20ac")) == (200, b"ok")
    assert await engine.poll(sid) == ["4h\u00e9llo \u20ac"]


@case(*BOTH)
async def several_texts_come_back_over_polling(_: Server, engine: Engine) -> None:
    sid = await engine.open()
    texts = ["4test1", "4test2", "4test3"]
    assert (await engine.post(sid, engine.body(*texts)))[0] == 200
    found: list[str] = []
    while len(found) < 3:
        found += await engine.poll(sid)
    assert found == texts


@case("engine.io 4")
async def text_and_bytes_come_back_over_polling(_: Server, engine: Engine) -> None:
    sid = await engine.open()
    assert (await engine.post(sid, engine.body("4hello", "bAQIDBA==")))[0] == 200
    found: list[str] = []
    while len(found) < 2:
        found += await engine.poll(sid)
    assert found == ["4hello", "bAQIDBA=="]


@case("engine.io 3")
async def text_and_base64_come_back_over_polling(_: Server, engine: Engine) -> None:
    """The handshake asks for base64, later requests need not repeat it."""
    sid = await engine.open("&b64=1")
    assert (await engine.post(sid, engine.body("4hello", "b4AQIDBA==")))[0] == 200
    found: list[str] = []
    while len(found) < 2:
        found += await engine.poll(sid)
    assert found == ["4hello", "b4AQIDBA=="]


@case("engine.io 3")
async def text_and_bytes_come_back_over_polling_in_binary(_: Server, engine: Engine) -> None:
    sid = await engine.open()
    body = b"\x00\x06\xff4hello\x01\x05\xff\x04\x01\x02\x03\x04"
    headers = {"Content_Type": "application/octet-stream"}
    assert (await engine.post(sid, body, **headers))[0] == 200
    found = b""
    while b"\x04\x01\x02\x03\x04" not in found:
        status, part, headers_ = await engine.get(sid)
        assert status == 200
        if headers_["Content-Type"].startswith("application/octet-stream"):
            found += part
        else:
            # Text without binary data may come alone.
            assert engine.packets(part) == ["4hello"]
            found += b"\x00\x06\xff4hello"
    assert found == body


@case(*BOTH)
async def an_invalid_packet_ends_the_session_over_polling(_: Server, engine: Engine) -> None:
    sid = await engine.open()
    # engine.io says `ok`, relay 400.
    assert (await engine.post(sid, b"abc"))[0] in (200, 400)
    assert (await engine.get(sid))[0] == UNKNOWN


@case(*BOTH)
async def a_second_poll_ends_the_session(_: Server, engine: Engine) -> None:
    sid = await engine.open()
    async with asyncio.TaskGroup() as group:
        polls = [group.create_task(engine.get(sid)) for _ in range(2)]
    first, second = sorted((poll.result() for poll in polls), key=lambda each: each[0])
    assert (first[0], engine.packets(first[1])) == (200, ["1"])
    assert second[0] in (400, 500)
    assert (await engine.get(sid))[0] == UNKNOWN


@case(*BOTH)
async def a_text_comes_back_over_websocket(server: Server, engine: Engine) -> None:
    async with server.socket(engine.query("websocket")) as socket:
        await socket.next()
        await socket.send("4hello")
        assert await socket.next() == "4hello"


@case(*BOTH)
async def bytes_come_back_over_websocket(server: Server, engine: Engine) -> None:
    async with server.socket(engine.query("websocket")) as socket:
        await socket.next()
        packet = bytes((4, 1, 2, 3)) if engine.version == 3 else bytes((1, 2, 3))
        await socket.send(packet)
        assert await socket.next() == packet


@case(*BOTH)
async def an_invalid_packet_closes_a_websocket(server: Server, engine: Engine) -> None:
    async with server.socket(engine.query("websocket")) as socket:
        await socket.next()
        await socket.send("abc")
        assert await socket.closed()


# ---- Engine.IO: heartbeat ----------------------------------------------------------------------


@case(*BOTH)
async def pings_are_answered_over_polling(_: Server, engine: Engine) -> None:
    sid = await engine.open()
    for _turn in range(3):
        if engine.version == 3:
            assert (await engine.post(sid, engine.body("2")))[0] == 200
            assert await engine.poll(sid) == ["3"]
        else:
            status, body, _headers = await engine.get(sid)
            assert (status, body) == (200, b"2")
            assert (await engine.post(sid, b"3"))[0] == 200


@case(*BOTH)
async def silence_ends_the_session_over_polling(_: Server, engine: Engine) -> None:
    sid = await engine.open()
    # A poll is a sign of life.
    status = 0
    for _turn in range(3):
        await asyncio.sleep(2.5)
        status = (await engine.get(sid))[0]
        if status == UNKNOWN:
            break
    assert status == UNKNOWN


@case(*BOTH)
async def pings_are_answered_over_websocket(server: Server, engine: Engine) -> None:
    async with server.socket(engine.query("websocket")) as socket:
        await socket.any()
        for _ in range(3):
            if engine.version == 3:
                await socket.send("2")
                assert await socket.any() == "3"
            else:
                assert await socket.any() == "2"
                await socket.send("3")


@case(*BOTH)
async def silence_closes_a_websocket(server: Server, engine: Engine) -> None:
    async with server.socket(engine.query("websocket")) as socket:
        await socket.any()
        assert await socket.closed(answers=False)


# ---- Engine.IO: end and upgrade ----------------------------------------------------------------


@case(*BOTH)
async def a_client_ends_its_session_over_polling(_: Server, engine: Engine) -> None:
    answers, sid = ["2"], ""
    # On a busy machine a ping may answer the poll first.
    while answers == ["2"]:
        sid = await engine.open()
        async with asyncio.TaskGroup() as group:
            poll = group.create_task(engine.get(sid))
            await asyncio.sleep(0.05)
            assert (await engine.post(sid, engine.body("1")))[0] == 200
        status, body, _headers = poll.result()
        assert status == 200
        answers = engine.packets(body)
    assert answers == ["6"]
    assert (await engine.get(sid))[0] == UNKNOWN


@case(*BOTH)
async def a_client_ends_its_session_over_websocket(server: Server, engine: Engine) -> None:
    async with server.socket(engine.query("websocket")) as socket:
        await socket.next()
        await socket.send("1")
        # engine.io ignores this packet, and closes when its pings are not answered.
        assert await socket.closed(answers=False)


@asynccontextmanager
async def upgraded(server: Server, engine: Engine) -> AsyncIterator[tuple[str, Socket]]:
    """Open a session over polling and move it to a WebSocket."""
    sid = await engine.open()
    async with server.socket(engine.query("websocket", sid)) as socket:
        await socket.send("2probe")
        assert await socket.next() == "3probe"
        await socket.send("5")
        await socket.send("4hello")
        assert await socket.next() == "4hello"
        yield sid, socket


@case(*BOTH)
async def a_session_moves_to_a_websocket(server: Server, engine: Engine) -> None:
    async with upgraded(server, engine):
        pass


@case(*BOTH)
async def late_requests_do_not_harm_the_websocket(server: Server, engine: Engine) -> None:
    async with upgraded(server, engine) as (sid, socket):
        assert (await engine.get(sid))[0] == 400
        assert (await engine.post(sid, engine.body("4late")))[0] == 400
        await socket.send("4hello again")
        assert await socket.next() == "4hello again"


@case(*BOTH)
async def a_second_websocket_does_not_harm_the_first(server: Server, engine: Engine) -> None:
    async with upgraded(server, engine) as (sid, socket):
        assert await server.is_refused(engine.query("websocket", sid))
        await socket.send("4hello again")
        assert await socket.next() == "4hello again"


# ---- Socket.IO ---------------------------------------------------------------------------------


class Client:
    """A Socket.IO client over a WebSocket."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket

    async def connect(self, namespace: str = "/", auth: object = None) -> None:
        """Connect to a namespace, whose server sends `auth`."""
        head = "" if namespace == "/" else f"{namespace},"
        await self.socket.send(f"40{head}" + ("" if auth is None else json.dumps(auth)))
        answer = str(await self.socket.next())
        assert answer.startswith(f"40{head}{{"), answer
        assert json.loads(answer[len(f"40{head}") :])["sid"]
        assert await self.event(head) == ["auth", auth or {}]

    async def event(self, head: str = "") -> list[Any]:
        """Return the next event."""
        text = str(await self.socket.next())
        assert text.startswith(f"42{head}"), text
        found: list[Any] = json.loads(text[len(f"42{head}") :])
        return found


@asynccontextmanager
async def client(server: Server) -> AsyncIterator[Client]:
    """Open a WebSocket at /socket.io/."""
    async with server.socket("EIO=4&transport=websocket", "/socket.io/") as socket:
        check_handshake(str(await socket.next()), [])
        yield Client(socket)


def _socketio(test: Callable[[Client], Awaitable[None]]) -> Callable[[Client], Awaitable[None]]:
    async def run(server: Server) -> None:
        async with client(server) as opened:
            await test(opened)

    run.__name__ = test.__name__
    SUITES["socket.io"].append(run)
    return test


def _engine_at_socketio(test: Callable[..., Awaitable[None]], name: str) -> None:
    async def run(server: Server) -> None:
        await test(server, Engine(server, 4, "/socket.io/"))

    run.__name__ = f"{name}_below_socketio"
    SUITES["socket.io"].append(run)


# These cases do not depend on what the server does with messages.
for _name, _test in list(globals().items()):
    if _name in (
        "a_session_opens_over_polling",
        "an_unknown_transport_is_refused_over_polling",
        "a_session_opens_with_get_only",
        "an_invalid_packet_ends_the_session_over_polling",
        "a_second_poll_ends_the_session",
        "pings_are_answered_over_polling",
        "silence_ends_the_session_over_polling",
        "a_client_ends_its_session_over_polling",
    ):
        _engine_at_socketio(_test, _name)


@_socketio
async def the_main_namespace_connects(opened: Client) -> None:
    await opened.connect()


@_socketio
async def the_main_namespace_gets_the_payload(opened: Client) -> None:
    await opened.connect("/", {"token": "123"})


@_socketio
async def a_custom_namespace_connects(opened: Client) -> None:
    await opened.connect("/custom")


@_socketio
async def a_custom_namespace_gets_the_payload(opened: Client) -> None:
    await opened.connect("/custom", {"token": "abc"})


@_socketio
async def two_namespaces_share_a_connection(opened: Client) -> None:
    await opened.connect()
    await opened.connect("/custom")
    await opened.socket.send('42/custom,["message",1]', '42["message",2]')
    assert await opened.event("/custom,") == ["message-back", 1]
    assert await opened.event() == ["message-back", 2]


@_socketio
async def an_unknown_namespace_is_refused(opened: Client) -> None:
    await opened.socket.send("40/random")
    assert await opened.socket.next() == '44/random,{"message":"Invalid namespace"}'


@_socketio
async def an_invalid_handshake_closes(opened: Client) -> None:
    await opened.socket.send("4abc")
    assert await opened.socket.closed()


@_socketio
async def a_client_without_a_namespace_is_closed(opened: Client) -> None:
    assert await opened.socket.closed()


@_socketio
async def an_event_before_connect_closes(opened: Client) -> None:
    await opened.socket.send('42["message"]')
    assert await opened.socket.closed()


@_socketio
async def the_main_namespace_can_be_left(opened: Client) -> None:
    await opened.connect()
    await opened.connect("/custom")
    await opened.socket.send("41", '42/custom,["message","there"]')
    assert await opened.event("/custom,") == ["message-back", "there"]


@_socketio
async def a_custom_namespace_can_be_left(opened: Client) -> None:
    await opened.connect()
    await opened.connect("/custom")
    await opened.socket.send("41/custom,", '42["message","there"]')
    assert await opened.event() == ["message-back", "there"]


@_socketio
async def a_left_namespace_can_be_joined_again(opened: Client) -> None:
    await opened.connect()
    await opened.connect("/custom")
    # socket.io handles a DISCONNECT one turn later.
    await opened.socket.send("41/custom,", '42["message"]')
    assert await opened.event() == ["message-back"]
    await opened.connect("/custom")


@_socketio
async def events_come_back(opened: Client) -> None:
    await opened.connect()
    await opened.socket.send('42["message",1,"2",{"3":[true,null,"\u00e9"]}]')
    assert await opened.event() == ["message-back", 1, "2", {"3": [True, None, "\u00e9"]}]


@_socketio
async def events_are_acknowledged(opened: Client) -> None:
    await opened.connect()
    await opened.socket.send('42456["message-with-ack",1,"2",{"3":[false]}]')
    assert await opened.socket.next() == '43456[1,"2",{"3":[false]}]'


@_socketio
async def events_of_a_custom_namespace_are_acknowledged(opened: Client) -> None:
    await opened.connect("/custom")
    await opened.socket.send('42/custom,7["message-with-ack","x"]')
    assert await opened.socket.next() == '43/custom,7["x"]'


_BINARY = '["message",{"_placeholder":true,"num":0},{"_placeholder":true,"num":1}]'


@_socketio
async def bytes_come_back(opened: Client) -> None:
    await opened.connect()
    await opened.socket.send(f"452-{_BINARY}", b"\x01\x02\x03", b"\x04\x05\x06")
    assert await opened.socket.next() == f"452-{_BINARY}".replace('"message"', '"message-back"')
    assert [await opened.socket.next() for _ in range(2)] == [b"\x01\x02\x03", b"\x04\x05\x06"]


@_socketio
async def bytes_are_acknowledged(opened: Client) -> None:
    await opened.connect()
    event = '["message-with-ack",{"_placeholder":true,"num":0}]'
    await opened.socket.send(f"451-789{event}", b"\x01\x02\x03")
    assert await opened.socket.next() == '461-789[{"_placeholder":true,"num":0}]'
    assert await opened.socket.next() == b"\x01\x02\x03"


def _closes(name: str, *frames: str | bytes) -> None:
    async def run(opened: Client) -> None:
        await opened.connect()
        await opened.socket.send(*frames)
        assert await opened.socket.closed()

    run.__name__ = name
    _socketio(run)


_closes("an_unknown_type_closes", "4abc")
_closes("an_invalid_payload_closes", "42{}")
_closes("an_event_without_a_name_closes", "42[]")
_closes("text_that_is_no_json_closes", '42["message"')
_closes("bytes_without_a_packet_close", b"\x01")
_closes("a_packet_before_its_bytes_closes", f"452-{_BINARY}", '42["message"]')
_closes("an_error_from_a_client_closes", '44{"message":"x"}')


async def run_all(url: str, suites: Sequence[str] = tuple(SUITES)) -> dict[str, dict[str, str]]:
    """Run the suites, and return the error of each case that fails."""
    failed: dict[str, dict[str, str]] = {}
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http:
        server = Server(url, http)
        # With more at once, a ping may come before what a case expects.
        turns = asyncio.Semaphore(8)

        async def run(each: Case) -> str:
            try:
                async with turns:
                    await each(server)
            except (AssertionError, aiohttp.ClientError, OSError, ValueError) as exc:
                return repr(exc)
            return ""

        for suite in suites:
            cases = SUITES[suite]
            async with asyncio.TaskGroup() as group:
                tasks = [(each, group.create_task(run(each))) for each in cases]
            # On a busy machine a ping may come too early or a pong too late, so try again alone.
            again = [each for each, task in tasks if task.result()]
            failed[suite] = {each.__name__: error for each in again if (error := await run(each))}
    return failed


def main() -> None:
    """Run suites against the server at the URL of the command line, and print the totals."""
    url, *suites = sys.argv[1:]
    for suite, failed in asyncio.run(run_all(url, suites or tuple(SUITES))).items():
        total = len(SUITES[suite])
        sys.stdout.write(f"{suite}: {total - len(failed)} of {total}\n")
        for name, error in failed.items():
            sys.stdout.write(f"  {name}: {error[:200]}\n")


if __name__ == "__main__":
    main()
