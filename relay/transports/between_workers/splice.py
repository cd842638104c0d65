"""Copies bytes between a client's connection and a connection to the worker that has its session.

Used where the client's socket cannot be passed: the other worker runs on another host, or this
worker has the TLS state of the connection. TCP does flow control and order. After a complete answer
the client's connection returns to aiohttp, and the connection to the other worker is closed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from typing_extensions import override

from relay.transports.socket.http_connection import discard
from relay.transports.socket.take_over import factory_of, give_back, release

if TYPE_CHECKING:
    from aiohttp import web

    from relay.transports.socket.http_connection import HttpConnection, HttpFactory

_BUFFER_BYTES = 65536
_HEAD_END = b"\r\n\r\n"
_MAX_HEAD_BYTES = 65536
# Sent by the other worker before the answer: it has accepted the request.
ACCEPTED = b"\0"


class _End(asyncio.Protocol):
    """One of the two connections. The received data goes to the other one."""

    __slots__ = ("full", "other", "transport")

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _End | None = None
        self.full = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_BUFFER_BYTES)

    @override
    def pause_writing(self) -> None:
        self.full = True
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    @override
    def resume_writing(self) -> None:
        self.full = False
        if self.other is not None:
            self.other.read_on()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        other, self.other = self.other, None
        if other is not None:
            other.end()

    def write(self, data: bytes) -> None:
        """Send data."""
        if self.transport is not None:
            self.transport.write(data)

    def read_on(self) -> None:
        """Continue reading unless the other connection is full."""
        if self.transport is not None and not (self.other and self.other.full):
            self.transport.resume_reading()

    def end(self) -> None:
        """Close the connection, because the other one has ended."""
        self.other = None
        if self.transport is not None:
            self.transport.close()


class OwnerEnd(_End):
    """The connection to the worker that has the session.

    `accepted` is set once that worker has accepted the request; the result is False if it has not.
    """

    __slots__ = ("_answer", "_early", "accepted")

    def __init__(self, *, is_accepted: bool) -> None:
        super().__init__()
        self.accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if is_accepted:
            self.accepted.set_result(True)
        self._early = b""
        self._answer = Answer()

    @override
    def data_received(self, data: bytes) -> None:
        if not self.accepted.done():
            self.accepted.set_result(data[:1] == ACCEPTED)
            data = data[1:]
        client = self.other
        if not isinstance(client, ClientEnd):
            self._early += data
            if self.transport is not None:
                self.transport.pause_reading()
        elif self._answer.ends_with(data) and client.is_reusable:
            self.other = None
            client.give_back(data)
            self.end()
        else:
            client.write(data)

    def begin(self, client: ClientEnd) -> None:
        """Copy from now on, starting with what has been received already."""
        self.other = client
        early, self._early = self._early, b""
        if early:
            self.data_received(early)
        if self.transport is None:
            # Lost meanwhile.
            self.other = None
            client.end()
        else:
            self.read_on()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if not self.accepted.done():
            self.accepted.set_result(False)
        super().connection_lost(exc)

    def abort(self) -> None:
        """Close both connections now."""
        for end in (self, self.other):
            if end is not None and end.transport is not None:
                end.transport.abort()


class ClientEnd(_End):
    """The client's connection."""

    __slots__ = ("_early", "_factory", "_left", "_limits", "_on_end")

    def __init__(self, request: web.Request, left: float, on_end: Callable[[], None]) -> None:
        """`left` is the number of bytes of the request that have not been read yet."""
        super().__init__()
        connection = cast("HttpConnection", request.protocol)
        is_reusable = request.keep_alive and request.version >= (1, 1)
        self._factory: HttpFactory | None = factory_of(request) if is_reusable else None
        self._limits = connection.limits
        # Data behind these bytes belongs to the next request.
        self._left = left
        self._early = b""
        self._on_end = on_end

    @property
    def is_reusable(self) -> bool:
        """Whether the connection can be used for another request after the answer."""
        return self._factory is not None and self._left <= 0

    @override
    def data_received(self, data: bytes) -> None:
        if len(data) > self._left:
            cut = int(self._left)
            self._early += data[cut:]
            data = data[:cut]
            if len(self._early) > _BUFFER_BYTES and self.transport is not None:
                self.transport.abort()
        self._left -= len(data)
        if data and self.other is not None:
            self.other.write(data)

    def give_back(self, data: bytes) -> None:
        """Send the end of the answer and return the connection to aiohttp."""
        transport, self.transport = self.transport, None
        self.other = None
        self._on_end()
        if transport is not None and self._factory is not None:
            if not transport.is_closing():
                transport.resume_reading()
            give_back(self._factory, self, transport, data, self._early)

    @override
    def end(self) -> None:
        if self._left > 0 and self._left != math.inf and self.transport is not None:
            # The answer came before the end of the request; see `discard`.
            discard(self.transport, self._limits)
            self.connection_lost(None)
        else:
            super().end()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._on_end()
        super().connection_lost(exc)


class Answer:
    """Finds the end of the answer to one request."""

    __slots__ = ("_head", "_left")

    def __init__(self) -> None:
        self._head = b""
        self._left: float | None = None

    def ends_with(self, data: bytes) -> bool:
        """Return True if the answer is complete with `data`, and the connection stays open."""
        if self._left is None:
            self._head += data
            head, found, data = self._head.partition(_HEAD_END)
            if not found:
                if len(self._head) > _MAX_HEAD_BYTES:
                    self._left = math.inf
                return False
            self._head = b""
            self._left = _body_length(head)
        self._left -= len(data)
        return self._left <= 0


def _body_length(head: bytes) -> float:
    """Return the length of the answer's body, infinity if it ends with the connection."""
    lines = head.lower().split(b"\r\n")
    fields = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
    status = lines[0][9:12]
    if status == b"101" or fields.get(b"connection") == b"close":
        return math.inf
    if status in (b"204", b"304"):
        return 0
    return float(fields.get(b"content-length", b"inf"))


def splice(request: web.Request, client: ClientEnd, owner: OwnerEnd) -> web.StreamResponse:
    """Copy between the request's connection and `owner`. The aiohttp handler returns the result."""
    transport = request.transport
    was_full = request.protocol.writing_paused
    response = release(request, client)
    if transport is None:
        client.other = owner
        client.connection_lost(None)
        return response
    client.connection_made(transport)
    client.other = owner
    if was_full:
        client.pause_writing()
    client.read_on()
    # The answer may be complete already.
    owner.begin(client)
    return response
