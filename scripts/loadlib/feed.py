"""Publishes events at a fixed rate, to a Redis stream (XADD) or to Nchan over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import cast

import hiredis
from typing_extensions import override

from scripts.loadlib.processes import LoadError

_PADDING = b"0" * 120


def payload() -> bytes:
    """Return JSON with the current time, in the form that wsink reads, and 120 bytes of padding."""
    return b'{"m":"T=%019d","p":"%b"}' % (time.time_ns(), _PADDING)


async def paced(rate: float, total: int, send: Callable[[int], Awaitable[None]]) -> float:
    """Call `send` `total` times at `rate` per second. Return the delay of the last call in seconds.

    The schedule follows the clock, not the replies. A delayed call is made at once.
    """
    started = time.monotonic()
    late_s = 0.0
    for number in range(total):
        late_s = time.monotonic() - (started + number / rate)
        # Yield to the event loop even when late, so that replies are read.
        await asyncio.sleep(max(0.0, -late_s))
        await send(number)
    return max(0.0, late_s)


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


class RedisFeed(asyncio.Protocol):
    """Appends to streams in a pipeline, without waiting for the reply to each command."""

    def __init__(self, prefix: bytes = b"relay:") -> None:
        self._prefix = prefix
        self._reader = hiredis.Reader()
        self._transport: asyncio.Transport | None = None
        self._unanswered = 0
        self._answered = asyncio.Event()
        self._answered.set()
        self._error: str | None = None

    @classmethod
    async def connect(cls, port: int) -> RedisFeed:
        """Connect to the server on this port of 127.0.0.1."""
        loop = asyncio.get_running_loop()
        _, feed = await loop.create_connection(cls, "127.0.0.1", port)
        return feed

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._unanswered:
            self._error = self._error or f"Redis closed the connection: {exc}"
        self._answered.set()

    @override
    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            if isinstance(reply, hiredis.ReplyError):
                self._error = str(reply)
            self._unanswered -= 1
        if not self._unanswered:
            self._answered.set()

    async def publish(self, channel: bytes, data: bytes) -> None:
        """Send one XADD. Raise LoadError if Redis has rejected an earlier one."""
        if self._error or self._transport is None:
            raise LoadError(f"Redis: {self._error}")
        self._transport.write(self._xadd(channel, data))
        self._unanswered += 1
        self._answered.clear()

    def _xadd(self, channel: bytes, data: bytes) -> bytes:
        key = self._prefix + b"stream:{" + channel + b"}"
        return _command(b"XADD", key, b"*", b"data", data)

    async def settle(self) -> None:
        """Wait for the replies to all commands. Raise LoadError if one of them is an error."""
        async with asyncio.timeout(60):
            await self._answered.wait()
        if self._error:
            raise LoadError(f"Redis: {self._error}")

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()


class EmitFeed(RedisFeed):
    """Appends entries like the emitter for Socket.IO's Redis Streams adapter.

    The name of a channel is `axr:` and the name of the room.
    """

    def _xadd(self, channel: bytes, data: bytes) -> bytes:
        room = channel.removeprefix(b"axr:")
        packet = b'{"type":2,"data":["msg",%b],"nsp":"/axr"}' % data
        text = b'{"packet":%b,"opts":{"rooms":["%b"],"flags":{},"except":[]}}' % (packet, room)
        fields = (b"uid", b"emitter", b"nsp", b"/axr", b"type", b"3", b"data", text)
        return _command(b"XADD", b"socket.io", b"MAXLEN", b"~", b"10000", b"*", *fields)


class NchanFeed:
    """Posts events one by one to Nchan's publisher location, over one keep-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, port: int) -> NchanFeed:
        """Connect to the server on this port of 127.0.0.1."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def publish(self, channel: bytes, data: bytes) -> None:
        """Post one event and wait for the response."""
        self._writer.write(
            b"POST /pub?channel=%b HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (channel, len(data), data)
        )
        async with asyncio.timeout(10):
            head = await self._reader.readuntil(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
            length = 0
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            await self._reader.readexactly(length)
        if not 200 <= status < 300:
            raise LoadError(f"Nchan rejected a publication with HTTP status {status}")

    async def settle(self) -> None:
        """Return at once: `publish` has already waited for each response."""

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()
