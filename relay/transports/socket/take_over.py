"""Takes a connection away from aiohttp, which has read and checked its request.

aiohttp keeps a task, a parser and buffers for each connection, and frames what it writes itself;
a client that waits for events needs none of that; one that waited for an answer can go back to
aiohttp with its next request. Together with `http_connection` the only file that depends on
aiohttp's internals (`aiohttp.web_protocol.RequestHandler`, tested with 3.14.5): their tests fail if
these change.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from aiohttp import web

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.typedefs import Handler
    from aiohttp.web_request import BaseRequest

    from relay.transports.socket.client_socket import ClientSocket
    from relay.transports.socket.http_connection import HttpConnection, HttpFactory


class TakenOver(web.StreamResponse):
    """What a handler returns after `take_over`: aiohttp logs its status and writes nothing."""

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:  # noqa: ARG002 - aiohttp's signature
        """Nothing: the head has been written."""
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing: the connection goes on without aiohttp."""


def take_over(request: web.Request, head: bytes, client: ClientSocket) -> web.StreamResponse:
    """Give `client` the request's transport, write `head` if there is one, and release aiohttp's
    part.

    The handler returns the result at once. Before this returns `client` has been given what came
    after the request; if the connection has closed in the meantime, `on_closed` has been called.
    """
    response = TakenOver(status=int(head[9:12]) if head else 200)
    response.force_close()
    handler = request.protocol
    transport = handler.transport
    if transport is None or transport.is_closing():
        client.connection_lost(None)
        return response
    # What arrived behind an upgrade's head, in the same segment or before the handler ran.
    tail = handler._message_tail
    transport.set_protocol(client)
    # With its transport gone the handler has nothing to write to or to close; told of the loss, it
    # stops its timer, leaves the server's list and ends its task when the response comes back.
    handler.transport = None
    handler._message_tail = b""
    handler.connection_lost(None)
    client.connection_made(transport)
    if head:
        transport.write(head)
    if tail:
        client.data_received(tail)
    # aiohttp pauses a client that sends much before its handler is done; does nothing otherwise.
    if not transport.is_closing():
        transport.resume_reading()
    return response


def hand_on(
    request: web.Request, give: Callable[[socket.socket, bytes], bool]
) -> web.StreamResponse | None:
    """Let another process answer the request; the handler returns the result at once.

    `give` gets the connection and all that was read of it, and says whether the other process has
    it now. None if not, and nothing has happened then. Not with TLS, whose keys are here, and not
    for a request with a body.
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
    # Only this process's descriptor: the other one has its own.
    transport.abort()
    return response


@web.middleware
async def end_rejected_upgrade(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Close the connection after the answer to an upgrade that was not accepted.

    What follows such a request is not HTTP: Pydio's PHP sends eight random bytes, others their
    first frames. aiohttp would parse it as the next request, answer it and log the error.
    """
    try:
        return await handler(request)
    finally:
        protocol = request.protocol
        # `take_over` and `hand_on` leave no transport.
        if protocol._upgraded and protocol.transport is not None:
            protocol._message_tail = b""
            protocol.close()


def drop(request: web.Request) -> web.StreamResponse:
    """Close the request's connection without an answer; the handler returns the result at once.

    A browser's EventSource and a proxy then try again elsewhere, as if the connection had been
    refused. After a status of 5xx an EventSource would give up.
    """
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=503)


def factory_of(request: web.Request) -> HttpFactory | None:
    """Return what makes the successor of the request's connection; call this before `take_over`.

    Return None if the client has sent its next request already: aiohttp's handler, which has read
    it, is released.
    """
    handler = request.protocol
    return None if handler._messages else cast("HttpConnection", handler).factory


def give_back(
    factory: HttpFactory, transport: asyncio.Transport, answer: bytes, early: bytes
) -> None:
    """Write the answer to the request that was taken over, and let aiohttp read the next one.

    `early` is what has come of that already.
    """
    if transport.is_closing():
        # aiohttp's handler must not get a connection that ends before its task has begun. The
        # protocol that waited for the answer is told of the end.
        return
    transport.write(answer)
    handler = factory()
    transport.set_write_buffer_limits()
    transport.set_protocol(handler)
    handler.connection_made(transport)
    handler.reused()
    if early:
        handler.data_received(early)
