"""One request and its answer, wherever the request was read.

A polling transport's session lives in one worker, and its requests are read by any. What handles
them is written against `Exchange`: the answer is given at once, or later (`hold`), or the rest of
the connection is taken (`take`). Here is the exchange whose request this worker has read itself;
`relay.transports.between_workers.handover` has the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web
from multidict import CIMultiDict, MultiMapping
from yarl import URL

from relay.transports.socket.client_socket import ClientSocket
from relay.transports.socket.take_over import factory_of, give_back, take_over

if TYPE_CHECKING:
    import asyncio

    from relay.transports.socket.reaper import Reaper

# Kept while an answer is awaited: a client that sends its next request before it has the answer to
# this one. No browser does; what is more than this is no HTTP client.
_EARLY_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """A request as it was read.

    `target` is the path with the query as on the request line, `route` the variable parts of the
    path, decoded; `body` is None where it is larger than the door reads. `reusable` says whether
    the connection may serve another request after a whole answer.
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
        """The query's fields, decoded."""
        return URL(self.target, encoded=True).query

    def encode(self) -> bytes:
        """For another worker."""
        # ASCII JSON: a header that is not UTF-8 has lone surrogates, which orjson refuses.
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
        """What `encode` made; ValueError otherwise."""
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
    """A whole answer. Its length is added; names and values of headers are the door's own."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def raw(self, *, reusable: bool) -> bytes:
        """As bytes of HTTP/1.1."""
        # RFC 9110 section 8.6: 204 and 304 have no body and no length.
        extra = [] if self.status in (204, 304) else [f"Content-Length: {len(self.body)}"]
        if not reusable:
            extra.append("Connection: close")
        return self._lines(extra) + self.body

    def streamed(self, length_bytes: int | None) -> bytes:
        """As the beginning of a response for `Exchange.take`.

        `length_bytes` is the size of what follows, or None if the response ends with its
        connection.
        """
        # nginx would otherwise hold back what follows until its buffer is full.
        extra = ["X-Accel-Buffering: no", "Connection: close"]
        if length_bytes is not None:
            extra.append(f"Content-Length: {len(self.body) + length_bytes}")
        return self._lines(extra) + self.body

    def _lines(self, extra: list[str]) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return ("\r\n".join([*lines, *extra]) + "\r\n\r\n").encode("latin-1")

    def encode(self) -> bytes:
        """For another worker."""
        return json.dumps([self.status, dict(self.headers)]).encode() + b"\n" + self.body

    @classmethod
    def decode(cls, data: bytes) -> HttpAnswer:
        """What `encode` made; ValueError otherwise."""
        head, _, body = data.partition(b"\n")
        status, headers = json.loads(head)
        return cls(status, body, headers)


GiveBack = Callable[["asyncio.Transport", bytes, bytes], None]


class HeldRequest(ClientSocket):
    """A request whose answer comes later: no task waits for it.

    `on_closed` means that the client went away before `finish`; after it no callback comes. The
    connection then serves further requests, unless the client wants it closed.
    """

    __slots__ = ("_early", "_give_back")

    def __init__(self, *, buffer_bytes: int, reaper: Reaper) -> None:
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper)
        self._early = b""
        # Takes transport, answer and what came early; None: close after the answer.
        self._give_back: GiveBack | None = None

    def returns(self, give_back: GiveBack | None) -> None:
        """How the connection goes on after the answer. Called by the exchange."""
        self._give_back = give_back

    def finish(self, answer: HttpAnswer) -> None:
        """Send the answer and be done; swallowed if the client is gone."""
        self.finish_raw(answer.raw(reusable=self._give_back is not None))

    def finish_raw(self, raw: bytes) -> None:
        """As `finish`, with the answer's bytes."""
        if self.closing:
            return
        self._let_go()
        transport = self._transport
        if self._give_back is None or transport is None:
            self.close(raw)
            return
        self.closing = True
        self._transport = None
        back, self._give_back = self._give_back, None
        back(transport, raw, self._early)

    def data_received(self, data: bytes) -> None:
        """The beginning of the next request, kept for whoever reads it."""
        if self.closing:
            return
        self._early += data
        if len(self._early) > _EARLY_BYTES:
            self.abort()


class Exchange:
    """A request for whoever has the session. Its handler calls exactly one of the three methods
    before it returns, unless it returns that the session is not here."""

    asked: HttpRequest

    def answer(self, answer: HttpAnswer) -> None:
        """The whole answer, at once."""
        raise NotImplementedError

    def hold(self, held: HeldRequest) -> None:
        """The answer comes by `held.finish`; its callbacks have been set."""
        raise NotImplementedError

    def take(self, head: bytes, client: ClientSocket, *, duplex: bool = False) -> None:
        """Write `head`; the rest of the connection is `client`'s, whose callbacks have been set.

        With `duplex` what the browser sends from now on is for `client` too (a websocket).
        """
        raise NotImplementedError


class LocalExchange(Exchange):
    """The request was read here. `response` is what its aiohttp handler returns."""

    def __init__(self, request: web.Request, asked: HttpRequest) -> None:
        self.asked = asked
        self._request = request
        self.response: web.StreamResponse | None = None

    def answer(self, answer: HttpAnswer) -> None:
        """See `Exchange`."""
        self.response = as_response(answer)

    def hold(self, held: HeldRequest) -> None:
        """See `Exchange`."""
        hold(self._request, self.asked, held)
        self.response = take_over(self._request, b"", held)

    def take(self, head: bytes, client: ClientSocket, *, duplex: bool = False) -> None:
        """See `Exchange`."""
        del duplex
        self.response = take_over(self._request, head, client)


def hold(request: web.Request, asked: HttpRequest, held: HeldRequest) -> None:
    """Before the take-over: tell `held` how the connection returns to aiohttp."""
    factory = factory_of(request) if asked.reusable else None
    if factory is not None:
        # Bound now: the request, and aiohttp's part of the connection with it, goes.
        held.returns(lambda transport, raw, early: give_back(factory, transport, raw, early))


def as_response(answer: HttpAnswer) -> web.Response:
    """For aiohttp to send."""
    # aiohttp names a type of its own for a body without one, and none where there is no body.
    return web.Response(
        status=answer.status, body=answer.body or None, headers=dict(answer.headers)
    )


def http_request(request: web.Request, body: bytes | None) -> HttpRequest:
    """The request and its body as a value."""
    return HttpRequest(
        method=request.method,
        target=str(request.rel_url),
        headers=request.headers,
        body=body,
        route=dict(request.match_info),
        peer=request.remote or "",
        version=(request.version.major, request.version.minor),
        # Before HTTP/1.1 a connection that goes on must be agreed on: not worth it.
        reusable=request.keep_alive and request.version >= (1, 1),
    )
