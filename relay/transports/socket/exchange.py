"""One HTTP request and its answer, in the worker that reads the request or in another one.

The session of a polling transport belongs to one worker, but any worker may read its requests. The
code that handles a request uses `Exchange`: it answers immediately (`answer`), later (`hold`), or
takes the rest of the connection (`take`). `LocalExchange` is for requests that this worker has read
itself. `relay.transports.between_workers.handover` implements the other case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web
from multidict import CIMultiDict, MultiMapping
from typing_extensions import override
from yarl import URL

from relay.transports.socket.client_socket import ClientSocket
from relay.transports.socket.take_over import factory_of, give_back, take_over

if TYPE_CHECKING:
    import asyncio

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
    version: tuple[int, int] = (1, 1)
    reusable: bool = True

    @property
    def query(self) -> MultiMapping[str]:
        """The decoded fields of the query."""
        return URL(self.target, encoded=True).query

    def encode(self) -> bytes:
        """Encode the request for another worker."""
        # Not orjson, which rejects the lone surrogates of headers that are not UTF-8.
        head = [
            self.method,
            self.target,
            list(self.headers.items()),
            self.body is not None,
            dict(self.route),
            self.peer,
            self.version,
            self.reusable,
        ]
        return json.dumps(head).encode() + b"\n" + (self.body or b"")

    @classmethod
    def decode(cls, data: bytes) -> HttpRequest:
        """Decode the result of `encode`. Raise ValueError if it is invalid."""
        head, _, body = data.partition(b"\n")
        method, target, headers, has_body, route, peer, version, reusable = json.loads(head)
        return cls(
            method=method,
            target=target,
            headers=CIMultiDict(headers),
            body=body if has_body else None,
            route=route,
            peer=peer,
            version=(version[0], version[1]),
            reusable=reusable,
        )


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A complete HTTP response. Content-Length is added to the protocol's headers."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def raw(self, *, reusable: bool) -> bytes:
        """Encode the response in HTTP/1.1."""
        # RFC 9110 section 8.6: 204 and 304 have no body and no length.
        extra = [] if self.status in (204, 304) else [f"Content-Length: {len(self.body)}"]
        if not reusable:
            extra.append("Connection: close")
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

    def encode(self) -> bytes:
        """Encode the answer for another worker."""
        return json.dumps([self.status, dict(self.headers)]).encode() + b"\n" + self.body

    @classmethod
    def decode(cls, data: bytes) -> HttpAnswer:
        """Decode the result of `encode`. Raise ValueError if it is invalid."""
        head, _, body = data.partition(b"\n")
        status, headers = json.loads(head)
        return cls(status, body, headers)


GiveBack = Callable[["asyncio.Transport", bytes, bytes], None]


class HeldRequest(ClientSocket):
    """A request that is answered later, without a waiting task.

    `on_closed` is called if the client disconnects before `finish`, and no callback follows
    `finish`. After the answer the connection can be used for other requests, unless the client has
    requested otherwise.
    """

    __slots__ = ("_early", "_give_back")

    def __init__(self, *, buffer_bytes: int, reaper: Reaper) -> None:
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper)
        self._early = b""
        # Receives the transport, the answer and early data. None: close after the answer.
        self._give_back: GiveBack | None = None

    def set_give_back(self, give_back: GiveBack | None) -> None:
        """Set the function that receives the connection after the answer."""
        self._give_back = give_back

    def finish(self, answer: HttpAnswer) -> None:
        """Send the answer. Do nothing if the client has disconnected."""
        self.finish_raw(answer.raw(reusable=self._give_back is not None))

    def finish_raw(self, raw: bytes) -> None:
        """Send an encoded answer. See `finish`."""
        if self.closing:
            return
        self._clear_callbacks()
        transport = self._transport
        if self._give_back is None or transport is None:
            self.close(raw)
            return
        self.closing = True
        self._transport = None
        back, self._give_back = self._give_back, None
        back(transport, raw, self._early)

    def data_received(self, data: bytes) -> None:
        """Keep the beginning of the next request."""
        if self.closing:
            return
        self._early += data
        if len(self._early) > _EARLY_BYTES:
            self.abort()


class Exchange:
    """A request to a session.

    The handler calls exactly one of the three methods before it returns, unless it reports that the
    session does not exist.
    """

    request: HttpRequest

    def answer(self, answer: HttpAnswer) -> None:
        """Answer immediately."""
        raise NotImplementedError

    def hold(self, held: HeldRequest) -> None:
        """Answer later with `held.finish`. The callbacks of `held` must be set."""
        raise NotImplementedError

    def take(self, head: bytes, client: ClientSocket, *, duplex: bool = False) -> None:
        """Write `head` and pass the connection to `client`, whose callbacks must be set.

        With `duplex`, `client` also receives what the browser sends (WebSocket).
        """
        raise NotImplementedError


class LocalExchange(Exchange):
    """An exchange for a request that this worker has read.

    The aiohttp handler returns `response`.
    """

    def __init__(self, aiohttp_request: web.Request, request: HttpRequest) -> None:
        self.request = request
        self._aiohttp_request = aiohttp_request
        self.response: web.StreamResponse | None = None

    @override
    def answer(self, answer: HttpAnswer) -> None:
        self.response = as_response(answer)

    @override
    def hold(self, held: HeldRequest) -> None:
        hold(self._aiohttp_request, self.request, held)
        self.response = take_over(self._aiohttp_request, b"", held)

    @override
    def take(self, head: bytes, client: ClientSocket, *, duplex: bool = False) -> None:
        del duplex
        self.response = take_over(self._aiohttp_request, head, client)


def hold(aiohttp_request: web.Request, request: HttpRequest, held: HeldRequest) -> None:
    """Prepare `held` to return the connection to aiohttp. Call this before `take_over`."""
    factory = factory_of(aiohttp_request) if request.reusable else None
    if factory is not None:
        # Bind the factory only, so that aiohttp's request and handler can be freed.
        held.set_give_back(lambda transport, raw, early: give_back(factory, transport, raw, early))


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
        version=(request.version.major, request.version.minor),
        # HTTP/1.0 keep-alive needs negotiation and is not supported.
        reusable=request.keep_alive and request.version >= (1, 1),
    )
