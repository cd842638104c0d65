"""Takes connections over from aiohttp after their request has been read, and returns them.

aiohttp has a task, a parser and buffers for each connection. A client that waits for events needs
none of these. After a polling request has been answered, its connection returns to aiohttp.

Only this module and `http_connection` depend on aiohttp's internals
(`aiohttp.web_protocol.RequestHandler`, tested with 3.14.5). Their tests fail if these change.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from aiohttp import web
from typing_extensions import override

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.typedefs import Handler
    from aiohttp.web_request import BaseRequest

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
    client.bodies = cast("HttpConnection", handler).limits.bodies
    transport.set_protocol(client)
    # Without a transport the handler cannot write or close. `connection_lost` makes it stop its
    # timer, unregister from the server and end its task when it gets the response.
    handler.transport = None
    handler._message_tail = b""
    handler.connection_lost(None)
    client.connection_made(transport)
    if head:
        transport.write(head)
    if tail:
        client.data_received(tail)
    # aiohttp may have paused reading because the client has sent much data.
    if not transport.is_closing():
        transport.resume_reading()
    return response


def hand_on(
    request: web.Request, give: Callable[[socket.socket, bytes], bool]
) -> web.StreamResponse | None:
    """Pass the request's connection to another process.

    `give` receives the connection and the data read from it. It returns True if the other process
    has accepted the connection; the aiohttp handler must then return the result immediately. Return
    None if the connection was not passed on, as always with TLS, whose state cannot be passed on.
    Don't call this for requests with a body.
    """
    handler = request.protocol
    transport = handler.transport
    if transport is None or transport.is_closing() or transport.get_extra_info("sslcontext"):
        return None
    lines = [f"{request.method} {request.raw_path} HTTP/1.1".encode()]
    lines += [name + b": " + value for name, value in request.raw_headers]
    early = b"\r\n".join(lines) + b"\r\n\r\n" + handler._message_tail
    if not give(transport.get_extra_info("socket"), early):
        return None
    response = TakenOver(status=101)
    response.force_close()
    transport.set_protocol(asyncio.Protocol())
    handler.transport = None
    handler._message_tail = b""
    handler.connection_lost(None)
    # This closes the descriptor of this process only.
    transport.abort()
    return response


@web.middleware
async def end_rejected_upgrade(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Close the connection after the answer to an upgrade that was not accepted.

    The data after such a request is not HTTP: Pydio's PHP client sends eight random bytes, others
    send their first frames. aiohttp would parse it as the next request and log an error.
    """
    try:
        return await handler(request)
    finally:
        protocol = request.protocol
        # After `take_over` and `hand_on` there is no transport.
        if protocol._upgraded and protocol.transport is not None:
            protocol._message_tail = b""
            protocol.close()


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


def give_back(
    factory: HttpFactory, transport: asyncio.Transport, answer: bytes, early: bytes
) -> None:
    """Write the answer to a request and return the connection to aiohttp for the next request.

    `early` is the data of the next request that has already arrived.
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
    if early:
        handler.data_received(early)
