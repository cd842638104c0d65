"""Clients of the native door as any language would write them, and a way to wait for what must
come true. They share no code with the relay: what they understand is the wire README.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp

from tests.support.relay import RelayProcess
from tests.support.valkey import Server

LIMIT_S = 8.0
_LINE_BYTES = 1 << 22


async def until(true: Callable[[], object], limit_s: float = LIMIT_S) -> Any:
    """The first true answer; blocking questions are asked in a thread."""
    async with asyncio.timeout(limit_s):
        while True:
            if answer := await asyncio.to_thread(true):
                return answer
            await asyncio.sleep(0.02)


def stream_key(channel: str) -> str:
    """Where the channel's events are."""
    return f"relay:stream:{{{channel}}}"


def rights_key(channel: str) -> str:
    """Where the application's rights are."""
    return f"relay:rights:{{{channel}}}"


def redis(server: Server, *words: str | bytes | int) -> Any:
    """One command as the test's own user."""
    return server.client().execute_command(*words)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, str]:
        """Of a refusal."""
        found: dict[str, str] = json.loads(self.body)["error"]
        return found


class Refused(Exception):
    """The stream did not begin."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"{answer.status} {answer.body!r}")
        self.answer = answer


@dataclass(slots=True)
class Block:
    """One block of an event stream, by field."""

    id: str | None = None
    event: str | None = None
    lines: list[str] = field(default_factory=list)
    retry: int | None = None
    comment: bool = False

    @property
    def data(self) -> str | None:
        """What a browser hands to the page; None where it hands over nothing."""
        return "\n".join(self.lines) if self.lines else None

    def json(self) -> Any:
        """The data, parsed."""
        return json.loads(self.data or "")


class SseClient:
    """An EventSource without the reconnecting; remembers the last ID as a browser does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.headers: dict[str, str] = {}
        self.last_id: str | None = None
        self.retry_ms: int | None = None
        self.opened = Block()

    @property
    def transport(self) -> asyncio.Transport:
        """For tests that stop reading or pull the plug."""
        transport = self._writer.transport
        assert isinstance(transport, asyncio.Transport)
        return transport

    async def begin(self, request: bytes) -> Answer | None:
        """Send the request; None if a stream begins, its first block read."""
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.strip().split("\r\n")
        self.headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if self.headers.get("content-type") != "text/event-stream":
            length = int(self.headers.get("content-length", "0"))
            body = await self._reader.readexactly(length)
            return Answer(int(status.split()[1]), self.headers, body)
        self.opened = await self.block()
        return None

    async def block(self, limit_s: float = LIMIT_S) -> Block:
        """The next one, heartbeats too; EOFError when the stream has ended."""
        block = Block()
        async with asyncio.timeout(limit_s):
            while True:
                line = (await self._reader.readline()).decode()
                if not line:
                    raise EOFError
                name, _, value = line.rstrip("\n").partition(":")
                value = value.removeprefix(" ")
                match name:
                    case "" if line == "\n":
                        break
                    case "":
                        block.comment = True
                    case "id":
                        block.id = self.last_id = value
                    case "event":
                        block.event = value
                    case "retry":
                        block.retry = self.retry_ms = int(value)
                    case "data":
                        block.lines.append(value)
                    case _:
                        raise ValueError(f"unknown field {name!r}")
        return block

    async def next(self, limit_s: float = LIMIT_S) -> Block:
        """The next block with data."""
        while (block := await self.block(limit_s)).data is None:
            pass
        return block

    async def take(self, count: int, limit_s: float = LIMIT_S) -> list[Block]:
        """The next `count` with data."""
        return [await self.next(limit_s) for _ in range(count)]

    async def ended(self, limit_s: float = LIMIT_S) -> list[Block]:
        """Everything with data until the end."""
        found = []
        try:
            while True:
                found.append(await self.next(limit_s))
        except EOFError:
            return found

    async def quiet(self, seconds: float = 0.3) -> bool:
        """Whether nothing with data comes for so long. Only where nothing can be waited for."""
        try:
            await self.next(seconds)
        except TimeoutError:
            return True
        return False

    def drop(self) -> None:
        """Pull the plug."""
        self.transport.abort()


@dataclass(frozen=True, slots=True)
class Native:
    """Opens clients of one relay; everything is closed with the test."""

    port: int
    token: str
    session: aiohttp.ClientSession
    streams: list[SseClient] = field(default_factory=list)
    sockets: list[WsClient] = field(default_factory=list)
    tls: ssl.SSLContext | None = None

    async def sse(
        self,
        *channels: str,
        token: str | None = None,
        last: str | None = None,
        header: str | None = None,
        headers: Mapping[str, str] | None = None,
        limit: int = _LINE_BYTES,
        **query: str,
    ) -> SseClient:
        """A stream that has begun, else Refused. `token` '' sends none; `last` goes into the
        query, `header` into Last-Event-ID."""
        words = [("channel", channel) for channel in channels] + list(query.items())
        if last is not None:
            words.append(("last_event_id", last))
        lines = [f"GET /sse?{urlencode(words)} HTTP/1.1", f"Host: 127.0.0.1:{self.port}"]
        credential = self.token if token is None else token
        if credential:
            lines.append(f"Authorization: Bearer {credential}")
        if header is not None:
            lines.append(f"Last-Event-ID: {header}")
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        async with asyncio.timeout(LIMIT_S * 2):
            pair = await asyncio.open_connection("127.0.0.1", self.port, limit=limit, ssl=self.tls)
            client = SseClient(*pair)
            self.streams.append(client)
            answer = await client.begin("\r\n".join([*lines, "", ""]).encode())
        if answer is not None:
            client.drop()
            raise Refused(answer)
        return client

    async def ws(
        self,
        *channels: str,
        token: str | None = None,
        last: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> WsClient:
        """A websocket whose handshake is done; nothing of what it says has been read."""
        words = [f"channel={quote(channel)}" for channel in channels]
        credential = self.token if token is None else token
        if credential:
            words.append(f"token={credential}")
        if last is not None:
            words.append(f"last_event_id={quote(last)}")
        scheme = "https" if self.tls else "http"
        url = f"{scheme}://127.0.0.1:{self.port}/ws?{'&'.join(words)}"
        socket = await self.session.ws_connect(
            url, headers=dict(headers or {}), ssl=self.tls or True, max_msg_size=0, **options
        )
        client = WsClient(socket)
        self.sockets.append(client)
        return client

    async def get(self, path: str, **headers: str) -> Answer:
        """A plain GET."""
        scheme = "https" if self.tls else "http"
        url = f"{scheme}://127.0.0.1:{self.port}{path}"
        async with self.session.get(url, headers=headers, ssl=self.tls or True) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def status(self, path: str) -> int:
        """Of a plain GET."""
        return (await self.get(path)).status

    async def metric(self, name: str) -> float:
        """One sample by its full name with labels; 0 where there is none."""
        text = (await self.get("/metrics")).body.decode()
        found = [line.rpartition(" ") for line in text.splitlines()]
        return next((float(value) for sample, _, value in found if sample == name), 0.0)


class Closed(Exception):
    """The websocket is closed, with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(str(code))
        self.code = code


class WsClient:
    """A plain JSON websocket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def next(self, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """The next object; Closed when there is none."""
        async with asyncio.timeout(limit_s):
            message = await self.socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise Closed(self.socket.close_code or 1006)
        found: dict[str, Any] = json.loads(message.data)
        return found

    async def take(self, count: int, limit_s: float = LIMIT_S) -> list[dict[str, Any]]:
        """The next `count`."""
        return [await self.next(limit_s) for _ in range(count)]

    async def send(self, **command: object) -> None:
        """One command."""
        await self.socket.send_str(json.dumps(command))

    async def ask(self, **command: object) -> dict[str, Any]:
        """One command and its reply or error; nothing else may come before."""
        await self.send(**command)
        return await self.next()

    async def closed(self, limit_s: float = LIMIT_S) -> tuple[list[dict[str, Any]], int]:
        """Everything until the close, and its code."""
        found = []
        try:
            while True:
                found.append(await self.next(limit_s))
        except Closed as exc:
            return found, exc.code


@asynccontextmanager
async def native(
    relay: RelayProcess,
    *,
    channels: Sequence[str] = ("*",),
    user: str = "alice",
    port: int | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Native]:
    """Clients of `relay` for one test; their token opens `channels`."""
    async with aiohttp.ClientSession() as session:
        token = relay.token(user, channels)
        clients = Native(port or relay.port, token, session, tls=tls)
        try:
            yield clients
        finally:
            for stream in clients.streams:
                stream.drop()
            for socket in clients.sockets:
                await socket.socket.close()


async def within(seconds: float, answer: Awaitable[Any]) -> Any:
    """`answer`, or TimeoutError."""
    async with asyncio.timeout(seconds):
        return await answer
