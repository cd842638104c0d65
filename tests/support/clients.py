"""Clients of the native protocol, and a function that waits for a condition.

They share no code with relay. They implement the protocol as its documentation describes it.
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

# Long, because a busy machine may delay anything. A test that waits in vain fails.
LIMIT_S = 30.0
_LINE_BYTES = 1 << 22


async def until(true: Callable[[], object], limit_s: float = LIMIT_S) -> Any:
    """Wait for the first true result. Blocking functions run in a thread."""
    async with asyncio.timeout(limit_s):
        while True:
            if answer := await asyncio.to_thread(true):
                return answer
            await asyncio.sleep(0.02)


async def publish_ephemeral(
    server: Server, channel: str, payload: str | bytes, *, receivers: int = 1
) -> None:
    """Publish an ephemeral event once this number of workers have subscribed to the channel.

    A reply to a client's subscription does not wait for the subscription in Redis.
    """
    name = f"relay:ephemeral:{{{channel}}}"
    await until(lambda: redis(server, "PUBSUB", "NUMSUB", name)[1] >= receivers)
    await asyncio.to_thread(redis, server, "PUBLISH", name, payload)


def stream_key(channel: str) -> str:
    """Return the key of the channel's stream."""
    return f"relay:stream:{{{channel}}}"


def rights_key(channel: str) -> str:
    """Return the key of the channel's rights hash."""
    return f"relay:rights:{{{channel}}}"


def redis(server: Server, *words: str | bytes | int) -> Any:
    """Run one command as the test's admin user."""
    return server.client().execute_command(*words)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, str]:
        """Return the error of a rejected request."""
        found: dict[str, str] = json.loads(self.body)["error"]
        return found


class Refused(Exception):
    """The request was rejected, and no stream began."""

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
        """Return the data that a browser passes to the page, or None if it passes nothing."""
        return "\n".join(self.lines) if self.lines else None

    def json(self) -> Any:
        """Return the parsed data."""
        return json.loads(self.data or "")


class SseClient:
    """An EventSource that does not reconnect. It stores the last ID as a browser does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.headers: dict[str, str] = {}
        self.last_id: str | None = None
        self.retry_ms: int | None = None
        self.opened = Block()

    @property
    def transport(self) -> asyncio.Transport:
        """Return the transport, for tests that stop reading or cut the connection."""
        transport = self._writer.transport
        assert isinstance(transport, asyncio.Transport)
        return transport

    async def begin(self, request: bytes) -> Answer | None:
        """Send the request. Return None if a stream begins, after reading its first block."""
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.strip().split("\r\n")
        self.headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if not self.headers.get("content-type", "").startswith("text/event-stream"):
            length = int(self.headers.get("content-length", "0"))
            body = await self._reader.readexactly(length)
            return Answer(int(status.split()[1]), self.headers, body)
        self.opened = await self.block()
        return None

    async def block(self, limit_s: float = LIMIT_S) -> Block:
        """Return the next block, including heartbeats. Raise EOFError at the end of the stream."""
        block = Block()
        async with asyncio.timeout(limit_s):
            while True:
                line = (await self._reader.readline()).decode()
                if not line:
                    if block.comment:
                        break
                    raise EOFError
                name, _, value = line.rstrip("\n").partition(":")
                value = value.removeprefix(" ")
                match name:
                    case "" if line == "\n":
                        break
                    case "":
                        block.comment = True
                        if block == Block(comment=True):
                            break
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
        """Return the next block with data."""
        while (block := await self.block(limit_s)).data is None:
            pass
        return block

    async def take(self, count: int, limit_s: float = LIMIT_S) -> list[Block]:
        """Return the next `count` blocks with data."""
        return [await self.next(limit_s) for _ in range(count)]

    async def ended(self, limit_s: float = LIMIT_S) -> list[Block]:
        """Return all blocks with data until the end of the stream."""
        found = []
        try:
            while True:
                found.append(await self.next(limit_s))
        except EOFError:
            return found

    async def quiet(self, seconds: float = 0.3) -> bool:
        """Return True if no data arrives for this time. Use it only if there is nothing to wait
        for."""
        try:
            await self.next(seconds)
        except TimeoutError:
            return True
        return False

    def drop(self) -> None:
        """Abort the connection."""
        self.transport.abort()


@dataclass(frozen=True, slots=True)
class Native:
    """Opens clients of one relay and closes them at the end of the test."""

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
        """Open a stream, or raise Refused.

        An empty `token` is not sent. `last` is sent in the query, `header` as Last-Event-ID.
        """
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
        """Open a WebSocket. No message has been read after the handshake."""
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
        """Send a GET request."""
        scheme = "https" if self.tls else "http"
        url = f"{scheme}://127.0.0.1:{self.port}{path}"
        async with self.session.get(url, headers=headers, ssl=self.tls or True) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def status(self, path: str) -> int:
        """Return the status of a GET request."""
        return (await self.get(path)).status

    async def metric(self, name: str) -> float:
        """Return a metric by its full name with labels, or 0 if it does not exist."""
        return (await self.metrics()).get(name, 0.0)

    async def metrics(self) -> dict[str, float]:
        """Return all metrics by their full names with labels."""
        text = (await self.get("/metrics")).body.decode()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        found = [line.rpartition(" ") for line in lines]
        return {sample: float(value) for sample, _, value in found}


class Closed(Exception):
    """The WebSocket was closed with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(str(code))
        self.code = code


class WsClient:
    """A WebSocket client with JSON messages."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def next(self, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """Return the next object, or raise Closed."""
        async with asyncio.timeout(limit_s):
            message = await self.socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise Closed(self.socket.close_code or 1006)
        found: dict[str, Any] = json.loads(message.data)
        return found

    async def take(self, count: int, limit_s: float = LIMIT_S) -> list[dict[str, Any]]:
        """Return the next `count` objects."""
        return [await self.next(limit_s) for _ in range(count)]

    async def send(self, **command: object) -> None:
        """Send one command."""
        await self.socket.send_str(json.dumps(command))

    async def ask(self, **command: object) -> dict[str, Any]:
        """Send one command and return its reply or error, which must be the next message."""
        await self.send(**command)
        return await self.next()

    async def closed(self, limit_s: float = LIMIT_S) -> tuple[list[dict[str, Any]], int]:
        """Return all messages until the close, and its code."""
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
    """Open clients of `relay` for one test. Their token grants `channels`."""
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
    """Await `answer` with a time limit."""
    async with asyncio.timeout(seconds):
        return await answer
