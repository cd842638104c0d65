"""Takes connections over from aiohttp after their request has been read, and returns them.

aiohttp has a task, a parser and buffers for each connection. A client that waits for events needs
none of these. After a polling request has been answered, its connection returns to aiohttp.

Only this module and `http_connection` depend on aiohttp's internals
(`aiohttp.web_protocol.RequestHandler`, tested with 3.14.5). Their tests fail if these change.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol, cast

from aiohttp import web
from typing_extensions import override

from relay.transports.socket.bodies import BodyRejected, read_body

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.web_request import BaseRequest

    from relay.core.connection import ConnectionInfo
    from relay.transports.socket.client_socket import ClientSocket
    from relay.transports.socket.http_connection import HttpConnection, HttpFactory


class TakenOver(web.StreamResponse):
    """Response of a handler after `take_over`. aiohttp logs its status and writes nothing."""

    @override
    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        return None

    @override
    async def write_eof(self, data: bytes = b"") -> None:
        pass


def take_over(request: web.Request, head: bytes, client: ClientSocket) -> web.StreamResponse:
    """Pass the request's transport to `client`, write `head`, and release aiohttp's handler.

    The aiohttp handler must return the result immediately. `client` receives data that has already
    arrived after the request. If the connection has closed, its `on_closed` is called.
    """
    response = TakenOver(status=int(head[9:12]) if head else 200)
    response.force_close()
    handler = request.protocol
    transport = handler.transport
    if transport is None or transport.is_closing():
        client.connection_lost(None)
        return response
    # Data after the head of an upgrade request that has already arrived.
    tail = handler._message_tail
    connection = cast("HttpConnection", handler)
    client.bodies = connection.limits.bodies
    client.info = info = connection.info(request)
    transport.set_protocol(client)
    # Without a transport the handler cannot write or close. `connection_lost` makes it stop its
    # timer, unregister from the server and end its task when it gets the response.
    handler.transport = None
    handler._message_tail = b""
    handler.connection_lost(None)
    client.connection_made(transport)
    if handler.writing_paused:
        # An earlier answer is still being sent.
        client.pause_writing()
    if head:
        status, _, rest = head.partition(b"\r\n")
        if b" 101 " not in status:
            # With the ID, a user's report and the operator's journal can be matched. Programs
            # cannot read the headers of a WebSocket handshake in a browser.
            head = b"%s\r\nX-Request-Id: %s\r\n%s" % (status, info.id.encode(), rest)
        transport.write(head)
    if tail:
        client.data_received(tail)
    # aiohttp may have paused reading because the client has sent much data.
    if not transport.is_closing():
        transport.resume_reading()
    return response


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A request as another process has to receive it: its head and the data behind it.

    `left` is the number of bytes of the body that are still in the socket, infinity if the rest of
    the connection belongs to the request.
    """

    data: bytes
    left: float


async def read_raw(request: web.Request, limit_bytes: int) -> RawRequest:
    """Return the part of a request that has been read. Stop reading from the connection.

    Only a chunked body is read completely, because the position within its chunks would be lost. If
    it exceeds `limit_bytes`, its length is announced without it, so that the other process rejects
    it. Raise BodyRejected as `read_body` does.
    """
    handler = request.protocol
    headers = list(request.raw_headers)
    length = request.content_length or 0
    if request.headers.get("Transfer-Encoding"):
        try:
            body = await read_body(request, limit_bytes)
            length = len(body)
        except BodyRejected as exc:
            if exc.status != HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                raise
            body, length = b"", limit_bytes + 1
        headers = _without(headers, b"transfer-encoding", b"content-length")
        headers.append((b"Content-Length", b"%d" % length))
    else:
        # One call returns the buffered data and may read on.
        body = b"".join(iter(request.content.read_nowait, b""))
    is_last = bool(handler._messages) or cast("HttpConnection", handler).factory.is_stopping
    if is_last and not handler._upgraded:
        # A further request may have been parsed already. The client sends it again.
        headers = [*_without(headers, b"connection"), (b"Connection", b"close")]
    if request.transport is not None:
        handler._pause_reading_for_buffer()
    # aiohttp has answered "Expect: 100-continue".
    headers = _without(headers, b"expect")
    version = f"HTTP/{request.version.major}.{request.version.minor}"
    lines = [f"{request.method} {request.raw_path} {version}".encode()]
    lines += [name + b": " + value for name, value in headers]
    data = b"\r\n".join(lines) + b"\r\n\r\n" + body + handler._message_tail
    return RawRequest(data, math.inf if handler._upgraded else length - len(body))


def read_on(request: web.Request) -> None:
    """Continue reading from the request's connection after `read_raw`."""
    if request.transport is not None:
        request.protocol._resume_reading_for_buffer()


def _without(headers: list[tuple[bytes, bytes]], *names: bytes) -> list[tuple[bytes, bytes]]:
    return [each for each in headers if each[0].lower() not in names]


def release(request: web.Request, successor: asyncio.Protocol) -> web.StreamResponse:
    """Give the request's transport to `successor` and end aiohttp's handler of the connection.

    The aiohttp handler must return the result immediately. `successor.connection_made` is not
    called.
    """
    response = TakenOver(status=101)
    response.force_close()
    handler = request.protocol
    transport = handler.transport
    if transport is not None:
        transport.set_protocol(successor)
        handler.transport = None
        handler._message_tail = b""
        handler.connection_lost(None)
    return response


def connection_of(request: web.Request) -> ConnectionInfo:
    """Return the description of the request's connection."""
    return cast("HttpConnection", request.protocol).info(request)


def is_secure(request: web.Request) -> bool:
    """Return True if the client uses TLS, to relay or to a trusted proxy."""
    return cast("HttpConnection", request.protocol).is_secure(request)


def drop(request: web.Request) -> web.StreamResponse:
    """Close the request's connection without an answer.

    The aiohttp handler must return the result immediately. EventSource clients and proxies then
    retry, as if the connection had been refused. EventSource does not retry after a 5xx status.
    """
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=503)


def factory_of(request: web.Request) -> HttpFactory | None:
    """Return the factory for `give_back`. Call this before `take_over`.

    Return None if the client has already sent its next request, which would be lost with aiohttp's
    handler.
    """
    handler = request.protocol
    return None if handler._messages else cast("HttpConnection", handler).factory


class PausableWriter(Protocol):
    """The asyncio protocol that has the connection before `give_back`."""

    @property
    def full(self) -> bool:
        """Whether the transport has called `pause_writing`."""


def give_back(
    factory: HttpFactory,
    client: PausableWriter,
    transport: asyncio.Transport,
    answer: bytes,
    early: bytes,
) -> None:
    """Write the answer to a request and return the connection to aiohttp for the next request.

    `client` has the connection now. `early` is the data of the next request that has already
    arrived.
    """
    if transport.is_closing():
        # aiohttp's handler fails if its connection ends before its task has started. The current
        # protocol receives `connection_lost`.
        return
    transport.write(answer)
    handler = factory()
    transport.set_write_buffer_limits()
    transport.set_protocol(handler)
    handler.connection_made(transport)
    handler.reused()
    if client.full:
        # The transport will call `resume_writing` once the client has received the answer.
        handler.pause_writing()
    if early:
        handler.data_received(early)
