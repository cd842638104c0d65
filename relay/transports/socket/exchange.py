"""One HTTP request and its answer.

The code that handles a request of a polling transport uses `Exchange`: it answers immediately
(`answer`), later (`hold`), or takes the rest of the connection (`take`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web
from multidict import MultiMapping
from yarl import URL

from relay.transports.socket.client_socket import ClientSocket
from relay.transports.socket.take_over import (
    connection_of,
    factory_of,
    give_back,
    take_over,
)

if TYPE_CHECKING:
    import asyncio

    from relay.core.connection import ConnectionInfo
    from relay.transports.socket.http_connection import HttpFactory
    from relay.transports.socket.reaper import Reaper

# Limit of data that a client sends before it has the answer to its request. Browsers never do this.
_EARLY_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """An HTTP request.

    `target` is the path with the query as in the request line. `route` has the decoded variable
    parts of the path. `body` is None if it exceeded the protocol's limit. `reusable` is True if the
    connection can be used for another request after the answer.
    """

    method: str
    target: str
    headers: MultiMapping[str]
    body: bytes | None
    route: Mapping[str, str] = field(default_factory=dict)
    peer: str = ""
    info: ConnectionInfo | None = None
    version: tuple[int, int] = (1, 1)
    reusable: bool = True

    @property
    def query(self) -> MultiMapping[str]:
        """The decoded fields of the query."""
        return URL(self.target, encoded=True).query


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A complete HTTP response. Content-Length is added to the protocol's headers."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def raw(self, *, reusable: bool, info: ConnectionInfo | None = None) -> bytes:
        """Encode the response in HTTP/1.1. An error has the ID of `info`."""
        # RFC 9110 section 8.6: 204 and 304 have no body and no length.
        extra = [] if self.status in (204, 304) else [f"Content-Length: {len(self.body)}"]
        if not reusable:
            extra.append("Connection: close")
        if self.status >= 400 and info is not None:
            extra.append(f"X-Request-Id: {info.id}")
        return self._lines(extra) + self.body

    def streamed(self, length_bytes: int | None) -> bytes:
        """Encode the beginning of a response for `Exchange.take`.

        `length_bytes` is the size of what follows, or None if the response ends with its
        connection.
        """
        # Otherwise nginx would buffer the response.
        extra = ["X-Accel-Buffering: no", "Connection: close"]
        if length_bytes is not None:
            extra.append(f"Content-Length: {len(self.body) + length_bytes}")
        return self._lines(extra) + self.body

    def _lines(self, extra: list[str]) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return ("\r\n".join([*lines, *extra]) + "\r\n\r\n").encode("latin-1")


class HeldRequest(ClientSocket):
    """A request that is answered later, without a waiting task.

    `on_closed` is called if the client disconnects before `finish`, and no callback follows
    `finish`. After the answer the connection can be used for other requests, unless the client has
    requested otherwise.
    """

    __slots__ = ("_early", "_factory")

    def __init__(self, *, buffer_bytes: int, reaper: Reaper) -> None:
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper)
        self._early = b""
        # Makes the next owner of the connection. If None, it is closed after the answer.
        self._factory: HttpFactory | None = None

    def reuse(self, factory: HttpFactory | None) -> None:
        """Return the connection to aiohttp after the answer, if `factory` is not None."""
        self._factory = factory

    def finish(self, answer: HttpAnswer) -> None:
        """Send the answer. Do nothing if the client has disconnected."""
        if self.closing:
            return
        self._clear_callbacks()
        transport = self._transport
        factory, self._factory = self._factory, None
        if factory is None or factory.is_stopping or transport is None:
            self.close(answer.raw(reusable=False, info=self.info))
            return
        self.closing = True
        self._transport = None
        give_back(factory, self, transport, answer.raw(reusable=True, info=self.info), self._early)

    def data_received(self, data: bytes) -> None:
        """Keep the beginning of the next request."""
        if self.closing:
            return
        self._early += data
        if len(self._early) > _EARLY_BYTES:
            self.abort()


class Exchange:
    """A request to a session.

    The code that handles it calls exactly one of the three methods before it returns. The aiohttp
    handler returns `response`.
    """

    def __init__(self, aiohttp_request: web.Request, request: HttpRequest) -> None:
        self.request = request
        self._aiohttp_request = aiohttp_request
        self.response: web.StreamResponse | None = None

    @property
    def transport(self) -> asyncio.Transport | None:
        """The connection of the request."""
        return self._aiohttp_request.transport

    def answer(self, answer: HttpAnswer) -> None:
        """Answer immediately."""
        self.response = as_response(answer)

    def hold(self, held: HeldRequest) -> None:
        """Answer later with `held.finish`. The callbacks of `held` must be set."""
        held.reuse(factory_of(self._aiohttp_request) if self.request.reusable else None)
        self.response = take_over(self._aiohttp_request, b"", held)

    def take(self, head: bytes, client: ClientSocket) -> None:
        """Write `head` and pass the connection to `client`, whose callbacks must be set."""
        self.response = take_over(self._aiohttp_request, head, client)


def as_response(answer: HttpAnswer) -> web.Response:
    """Convert the answer to an aiohttp response."""
    # With an empty body, aiohttp would add a content type of its own.
    return web.Response(
        status=answer.status, body=answer.body or None, headers=dict(answer.headers)
    )


def http_request(request: web.Request, body: bytes | None) -> HttpRequest:
    """Convert an aiohttp request and its body."""
    return HttpRequest(
        method=request.method,
        target=str(request.rel_url),
        headers=request.headers,
        body=body,
        route=dict(request.match_info),
        peer=request.remote or "",
        info=connection_of(request),
        version=(request.version.major, request.version.minor),
        # HTTP/1.0 keep-alive needs negotiation and is not supported.
        reusable=request.keep_alive and request.version >= (1, 1),
    )
