"""HTTP connections: aiohttp's request handler with limits on what an unknown peer can hold open.

Time limits, the same on every listener:

- complete headers within `HEAD_TIMEOUT_S`, counted from the connection's start or from the first
  byte of a later request;
- `BODY_TIMEOUT_S` for a body (`relay.transports.socket.bodies`);
- `WRITE_TIMEOUT_S` for a client that does not receive any of its answer;
- `KEEPALIVE_S` between two requests.

Connections taken over for WebSocket, SSE and polling leave aiohttp, and these limits with it.
Together with `take_over` the only file that depends on aiohttp's internals
(`aiohttp.web_protocol.RequestHandler`, tested with 3.14.5).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from typing_extensions import override

from relay.core.client_address import TrustedProxies
from relay.core.connection import ConnectionInfo
from relay.transports.socket.bodies import Bodies, BodyRejected
from relay.transports.socket.deadlines import Deadlines
from relay.transports.socket.handshakes import (
    Handshakes,
    Source,
    begins_client,
    forwarded_for,
    rejection,
    source_of,
)
from relay.transports.socket.read_pace import LARGE_READ_BYTES, read_later
from relay.transports.socket.request_pace import RequestPace

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from aiohttp.streams import StreamReader
    from aiohttp.web_request import BaseRequest
    from aiohttp.web_response import StreamResponse

_log = logging.getLogger(__name__)

HEAD_TIMEOUT_S = 15.0
WRITE_TIMEOUT_S = 30.0
# At 30 kB/s, a phone's slow link, the largest answers of the protocols take this long.
_LONGEST_WRITE_S = 300.0
# Header of error answers, and of answers that begin a client's connection.
REQUEST_ID = "X-Request-Id"
# Longer than a proxy keeps idle connections (nginx: 60 s), so that the proxy closes them first and
# no request arrives at a connection that is being closed.
KEEPALIVE_S = 75.0
# A cursor over many channels comes back in one header line (native/README.md, "Cursor").
MAX_LINE_BYTES = 65536
_HEAD_END = b"\r\n\r\n"
_MAX_HEAD_BYTES = 2 * MAX_LINE_BYTES
# Heads up to this size are recognized as those of new clients if they arrive in several parts.
_MAX_HANDSHAKE_BYTES = 16384
# After an early answer: for the client to read it before the connection is closed.
_DISCARD_S = 5.0
_DISCARD_BYTES = 32 * 1024 * 1024
# A burst of real clients sends its requests at once. Younger connections are not closed early.
_MIN_AGE_S = 0.5
_SHED_AT_ONCE = 16


# Gets the connection, the route, the status and the text of an error answer.
OnRejected = Callable[[ConnectionInfo, str, int, str], None]
# Unknown paths and methods: scanners of the internet ask for them all the time.
_NOT_REJECTED = frozenset({404, 405, 426})
_REASON_CHARS, _REASON_BYTES = 200, 2_000


class ConnectionLimits:
    """The limits that all listeners of a worker share."""

    def __init__(
        self,
        *,
        head_timeout_s: float = HEAD_TIMEOUT_S,
        handshakes: Handshakes | None = None,
        on_rejected: OnRejected = lambda *_: None,
        proxies: TrustedProxies | None = None,
    ) -> None:
        """`on_rejected` is called for each error answer, except those to unknown paths."""
        self.proxies = proxies or TrustedProxies()
        self.on_rejected = on_rejected
        self.bodies = Bodies()
        self.handshakes = Handshakes() if handshakes is None else handshakes
        self.pace = RequestPace()
        # Connections from which no complete request head has been received.
        self.heads: Deadlines[HttpConnection] = Deadlines(head_timeout_s, HttpConnection.expire)
        self.writes: Deadlines[HttpConnection] = Deadlines(
            WRITE_TIMEOUT_S,
            HttpConnection.abort,
            carrier=lambda connection: connection.transport,
            longest_s=_LONGEST_WRITE_S,
        )
        self.discards: Deadlines[_Discard] = Deadlines(_DISCARD_S, _Discard.abort)
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        # The rest of the descriptors is for clients that have sent a request.
        self._max_heads = float("inf") if files == resource.RLIM_INFINITY else max(8, files // 4)

    def opened(self, connection: HttpConnection) -> None:
        """Start the time limit of a new connection, and close old ones if there are too many."""
        self.heads.add(connection)
        for _ in range(_SHED_AT_ONCE):
            if len(self.heads) <= self._max_heads or not self.shed_half_open():
                break

    def shed_half_open(self) -> bool:
        """Close the oldest connection without a complete request; return whether there was one."""
        oldest = self.heads.oldest(min_age_s=_MIN_AGE_S)
        if oldest is None:
            return False
        _log.warning(
            "Closed the oldest connections that have not sent a complete request: there are too"
            " many for the limit of open files"
        )
        oldest.abort()
        return True


class HttpConnection(RequestHandler):
    """One client's connection while aiohttp reads its requests."""

    __slots__ = (
        "_ends_early",
        "_handshake",
        "_head",
        "_head_bytes",
        "_info",
        "_is_behind",
        "_later",
        "_payload",
        "_reads_later",
        "factory",
        "hops",
        "limits",
    )

    def __init__(self, factory: HttpFactory, manager: web.Server, **settings: Any) -> None:
        """`settings` are those of the aiohttp runner. `factory` makes this connection's successor
        after a polling request."""
        fixed = {
            # Compressed bodies are rejected without decompressing them.
            "auto_decompress": False,
            # aiohttp would read and parse the rest of a rejected body; see `_discard`.
            "lingering_time": 0.0,
            "max_line_size": MAX_LINE_BYTES,
            "max_field_size": MAX_LINE_BYTES,
        }
        super().__init__(manager, loop=asyncio.get_running_loop(), **{**settings, **fixed})
        self.factory = factory
        self.limits = factory.limits
        # How often other workers have passed on the request that is being handled.
        self.hops = 0
        self._head_bytes = 0
        # Describes the request that is being handled, once that is needed.
        self._info: ConnectionInfo | None = None
        # Body of the latest request, until its answer is complete.
        self._payload: StreamReader | None = None
        # The last answer is being sent, and the rest of its request is not read.
        self._ends_early = False
        # Reading is paused until it is this connection's turn (see `read_pace`).
        self._reads_later = False
        # The request of a new client that waits for its turn (see `handshakes`).
        self._handshake = b""
        # Another request, or a part of its head, that waits for its turn (see `request_pace`).
        self._later = b""
        # The next request had already been parsed when the answer to this one was complete.
        self._is_behind = False
        # The first part of an incomplete head.
        self._head = b""

    # ---- time limits ------------------------------------------------------------------------

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.limits.opened(self)

    def adopted(self, hops: int, peer: str) -> None:
        """Another worker has passed on the connection; `peer` is set if it is spliced."""
        self.hops = hops
        if peer:
            self._cache["peername"] = (peer, 0)

    def reused(self) -> None:
        """Start the keep-alive timeout, because the connection has served a request before."""
        self.limits.heads.remove(self)

    @override
    def connection_lost(self, exc: BaseException | None) -> None:
        if self._manager is None:
            return
        self.limits.heads.remove(self)
        self.limits.writes.remove(self)
        self.limits.handshakes.leave(self)
        self.limits.pace.leave(self)
        make_request = self._request_factory
        super().connection_lost(exc)
        # aiohttp's task may be about to start a request that has just been read, and calls both.
        self._request_factory = make_request
        self._request_handler = _reject_lost

    @override
    async def start(self) -> None:
        if self._manager is not None:
            await super().start()

    @override
    def data_received(self, data: bytes) -> None:
        if self._ends_early:
            self._pause_transport_reading()
            return
        if self._handshake:
            # Clients wait for the answer before they send more.
            self._handshake += data
            self._pause_transport_reading()
            if len(self._handshake) > _MAX_HANDSHAKE_BYTES:
                self._end(431)
                return
            retry_s = self.limits.handshakes.extend(self, len(data))
            if retry_s is not None:
                self.turn_away(retry_s)
            return
        if self._later:
            self._later += data
            return
        if self._expects_request:
            if self._head or not self._head_bytes:
                head = self._head + data
                if begins_client(head):
                    self._enter(head, data)
                    return
                is_complete = _HEAD_END in head or len(head) > _MAX_HANDSHAKE_BYTES
                self._head = b"" if is_complete else head
            if data and not self.limits.pace.enter(self):
                self._later = data
                if _HEAD_END in data:
                    self.limits.heads.remove(self)
                # The rest of a head must not arrive before this part is parsed.
                self._pause_transport_reading()
                return
        self._receive(data)

    def begin(self) -> None:
        """Handle the data that has waited for its turn."""
        data, self._later = self._later, b""
        self._resume_transport_reading()
        self._receive(data)

    def _enter(self, head: bytes, data: bytes) -> None:
        """Handle the request of a new client in its turn, or reject it.

        `data` is the end of the `head`. The rest has already been parsed and is `_head`.
        """
        self._handshake = data
        self.limits.heads.remove(self)
        retry_s = self.limits.handshakes.enter(self, len(head))
        if retry_s is not None:
            self.turn_away(retry_s)

    def source(self) -> Source:
        """Return where the request that waits comes from."""
        peer = self.peername
        address = str(peer[0]) if isinstance(peer, list | tuple) else ""
        listed = forwarded_for(self._head + self._handshake)
        return source_of(address, listed, self.limits.proxies)

    def turn_away(self, retry_s: float) -> None:
        """Reject the request that has waited for its turn, or should wait."""
        head, self._handshake, self._head = self._head + self._handshake, b"", b""
        if self.transport is not None:
            self.transport.write(rejection(head, retry_s))
            self.transport.close()

    def proceed(self) -> None:
        """Handle the request that has waited for its turn."""
        data, self._handshake, self._head = self._handshake, b"", b""
        self._resume_transport_reading()
        self._receive(data)

    def _receive(self, data: bytes) -> None:
        if len(data) >= LARGE_READ_BYTES and not self._reads_later:
            self._reads_later = True
            self._pause_transport_reading()
            read_later(self._read_on)
        incoming = self._payload if self._payload and not self._payload.is_eof() else None
        arrived = incoming.total_bytes if incoming else 0
        requests = self._request_count
        super().data_received(data)
        if self.transport is None:
            return
        if self._request_count != requests:
            self._payload = self._messages[-1][1]
            self._head_bytes = 0
            self.limits.heads.remove(self)
            if not self._ends_with_request(data, self._payload):
                self.limits.heads.add(self)
        elif self._upgraded:
            # Frames behind a handshake, which aiohttp keeps for `take_over`.
            pass
        elif incoming is None:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._end(431)
            elif data and self not in self.limits.heads:
                self.limits.heads.add(self)
        elif self._has_more_than_body(data, incoming, arrived):
            self.limits.heads.add(self)

    @override
    def _resume_transport_reading(self) -> None:
        if not (self._reads_later or self._handshake or self._later):
            super()._resume_transport_reading()

    def _read_on(self) -> None:
        self._reads_later = False
        if not (self._reading_paused or self._buffer_paused or self._ends_early):
            self._resume_transport_reading()

    @staticmethod
    def _has_more_than_body(data: bytes, payload: StreamReader, arrived: int) -> bool:
        """Return whether another request begins in `data` behind the end of a body."""
        if not payload.is_eof() or len(data) <= payload.total_bytes - arrived:
            return False
        # The last chunk of a chunked body ends like a complete head.
        return not data.endswith(_HEAD_END)

    def _ends_with_request(self, data: bytes, payload: StreamReader) -> bool:
        """Return False if a part of another request has arrived behind a complete one."""
        if self._upgraded or not payload.is_eof() or len(data) < len(_HEAD_END):
            return True
        if data.endswith(_HEAD_END):
            return True
        if payload is EMPTY_PAYLOAD:
            return False
        return len(data) <= data.find(_HEAD_END) + len(_HEAD_END) + payload.total_bytes

    def expire(self) -> None:
        """Close the connection: the request head is not complete in time."""
        if not self.is_idle:
            # An earlier request is still being handled.
            self.limits.heads.add(self)
        elif self._head_bytes:
            self._end(408)
        else:
            self.abort()

    def abort(self) -> None:
        """Close the connection without an answer."""
        self.limits.heads.remove(self)
        transport = self.transport
        self.force_close()
        if transport is not None:
            transport.abort()

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self.limits.writes.add(self)

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self.limits.writes.remove(self)

    def info(self, request: BaseRequest) -> ConnectionInfo:
        """Return the description of the request that is being handled, with its ID."""
        if self._info is None:
            peer, proxies = request.remote or "", self.limits.proxies
            listed = _forwarded_for(request)
            self._info = ConnectionInfo(proxies.client(peer, listed), request.headers)
            if not proxies.is_empty:
                # The address is that of the client. The header may contain what a client has sent.
                self._info.forwarded_for = ""
        return self._info

    def is_secure(self, request: BaseRequest) -> bool:
        """Return True if the client uses TLS, to this listener or to a trusted proxy."""
        if request.secure or not self.limits.proxies.trust(request.remote or ""):
            return request.secure
        return request.headers.get("X-Forwarded-Proto", "").partition(",")[0].strip() == "https"

    @property
    def is_idle(self) -> bool:
        """Whether the connection waits for its next request."""
        if self._handshake or self._later:
            return False
        return self._waiter is not None and not self._waiter.done()

    @property
    def _expects_request(self) -> bool:
        return self.is_idle or not self._request_count

    # ---- requests ---------------------------------------------------------------------------

    @override
    async def _handle_request(
        self,
        request: BaseRequest,
        start_time: float | None,
        request_handler: Callable[[BaseRequest], Awaitable[StreamResponse]],
    ) -> tuple[StreamResponse, bool]:
        if self._is_behind:
            await self.limits.pace.wait()
            if self.transport is None:
                request_handler = _reject_lost
        if "Sec-WebSocket-Key" in request.headers and "Upgrade" not in request.headers:
            _log.warning(
                "A proxy at %s removes the header Upgrade from WebSocket requests, so they are"
                " rejected; it must pass on Upgrade and Connection over HTTP/1.1; see"
                " 'Troubleshooting' in docs/operators.md",
                request.remote,
            )
        if request.headers.get("Expect", "100-continue").lower() != "100-continue":
            # aiohttp would put the header's value into the answer, and fail if it is not UTF-8.
            request_handler = _reject_expectation
        try:
            return await super()._handle_request(request, start_time, request_handler)
        finally:
            self._is_behind = bool(self._messages)
            self.hops = 0
            self._info = None
            self.limits.bodies.release(self)
            if self._payload is request.content:
                self._payload = None

    @override
    async def finish_response(
        self, request: BaseRequest, resp: StreamResponse, start_time: float | None
    ) -> tuple[StreamResponse, bool]:
        # After `take_over` and `release` there is no transport.
        if self._upgraded and self.transport is not None:
            # The upgrade was not accepted, and the data after the request is not HTTP: Pydio's PHP
            # client sends eight random bytes, others send their first frames. aiohttp would parse
            # it as the next request and log an error.
            self._message_tail = b""
            self.close()
        if not request.content.is_eof():
            self._ends_early = True
            resp.force_close()
        if not resp.prepared:
            # Instead of the versions of Python and aiohttp.
            resp.headers["Server"] = "relay"
            if resp.status >= 400:
                resp.headers[REQUEST_ID] = self.info(request).id
                if resp.status not in _NOT_REJECTED:
                    self.limits.on_rejected(self.info(request), _route(request), *_reason(resp))
        if self.factory.is_stopping:
            # The client's next request may begin a session, which another worker should have.
            resp.force_close()
        result = await super().finish_response(request, resp, start_time)
        if self._ends_early:
            self._discard()
        return result

    @override
    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> StreamResponse:
        if isinstance(exc, ConnectionError) or request.remote is None:
            _log.debug("A client disconnected before its request was answered")
            return _answer(400)
        if isinstance(exc, HttpProcessingError | RequestPayloadError):
            # Don't log the text or the traceback: they contain the client's data, perhaps a token.
            address = self.info(request).address
            _log.warning("Rejected a malformed HTTP request of %s", address)
            _log.debug("The malformed HTTP request was a case of %s", type(exc).__name__)
            return _answer(431 if isinstance(exc, LineTooLong) else 400)
        if isinstance(exc, BodyRejected):
            return _answer(exc.status, str(exc))
        return super().handle_error(request, status, exc, message)

    def _end(self, status: int) -> None:
        """Answer a request whose head is incomplete, and close the connection."""
        if self.transport is not None and not self.transport.is_closing():
            answer = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            answer += f"{REQUEST_ID}: {ConnectionInfo().id}\r\n"
            self.transport.write(f"{answer}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
            self._discard()

    def _discard(self) -> None:
        """Close the connection after the client has had a few seconds to read its answer.

        If it were closed immediately, unread data of the request would make the kernel reset it,
        and the client might lose the answer.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        self.transport = None
        self.connection_lost(None)
        discard(transport, self.limits)


def is_overloaded(request: web.Request) -> bool:
    """Return whether the worker may be too busy for a new client (see `has_turn`)."""
    return cast("HttpConnection", request.protocol).limits.handshakes.is_overloaded


async def has_turn(request: web.Request) -> bool:
    """Wait for the turn of a new client. Return False if it is rejected.

    This is for requests that are not recognized as those of new clients before they are parsed.
    """
    limits = cast("HttpConnection", request.protocol).limits
    turn = _Turn(source_of(request.remote or "", _forwarded_for(request), limits.proxies))
    if limits.handshakes.enter(turn) is not None:
        return False
    try:
        return await turn.is_accepted
    finally:
        limits.handshakes.leave(turn)


class _Turn:
    """A parsed request that waits for its turn."""

    def __init__(self, source: Source) -> None:
        self.is_accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._source = source

    def source(self) -> Source:
        return self._source

    def proceed(self) -> None:
        self._decide(True)

    def turn_away(self, retry_s: float) -> None:
        del retry_s
        self._decide(False)

    def _decide(self, is_accepted: bool) -> None:
        if not self.is_accepted.done():
            self.is_accepted.set_result(is_accepted)


def _forwarded_for(request: BaseRequest) -> Sequence[str]:
    # A malformed request has an ordinary dict.
    headers = request.headers
    return headers.getall("X-Forwarded-For", ()) if headers else ()


def discard(transport: asyncio.Transport, limits: ConnectionLimits) -> None:
    """Close the connection once the client has had time to read its answer.

    What it still sends is dropped.
    """
    rest = _Discard(limits)
    transport.set_protocol(rest)
    rest.connection_made(transport)


class _Discard(asyncio.Protocol):
    """Drops what a client still sends after the last answer of a connection."""

    __slots__ = ("_left", "_limits", "_transport")

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._left = _DISCARD_BYTES
        self._transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = opened = cast("asyncio.Transport", transport)
        self._limits.discards.add(self)
        if opened.can_write_eof():
            opened.write_eof()
        opened.resume_reading()

    @override
    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            self.abort()
        elif self._transport is not None and len(data) >= LARGE_READ_BYTES:
            self._transport.pause_reading()
            read_later(self._read_on)

    def _read_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None
        self._limits.discards.remove(self)

    def abort(self) -> None:
        """Close the connection now."""
        if self._transport is not None:
            self._transport.abort()


class HttpFactory:
    """Makes the connections of one listener. `server` is that of the aiohttp runner."""

    def __init__(self, server: web.Server, limits: ConnectionLimits, listener: object) -> None:
        """`listener` is the one that accepts the connections."""
        self.limits = limits
        self.listener = listener
        # Connections are closed after the next answer.
        self.is_stopping = False
        self._server = server

    def __call__(self) -> HttpConnection:
        """Return the protocol for a new connection."""
        return HttpConnection(self, self._server, **self._server._kwargs)

    def shed(self) -> bool:
        """Close one connection to make room for a new one; return whether that was possible.

        Connections that have not sent a request go first, then those between two requests. Only
        the oldest of each are closed.
        """
        if self.limits.shed_half_open():
            return True
        for each in self._server._connections:
            connection = cast("HttpConnection", each)
            if connection.is_idle and connection not in self.limits.heads:
                connection.abort()
                return True
        return False


def _route(request: BaseRequest) -> str:
    """Return the route's pattern: the path itself may contain a session's ID."""
    # None if the request was rejected before its route was looked up.
    found = request._match_info if isinstance(request, web.Request) else None
    resource = found.route.resource if found is not None else None
    return resource.canonical if resource is not None else ""


def _reason(response: StreamResponse) -> tuple[int, str]:
    """Return the status and the text of an error answer."""
    body = response.body if isinstance(response, web.Response) else None
    if not isinstance(body, bytes):
        return response.status, ""
    if len(body) <= _REASON_BYTES and body.startswith(b"{"):
        with contextlib.suppress(ValueError):
            found = orjson.loads(body)
            error = found.get("error")
            text = error.get("message") if isinstance(error, dict) else found.get("message")
            if isinstance(text, str):
                return response.status, text
    return response.status, body[:_REASON_CHARS].decode(errors="replace").strip()


async def _reject_expectation(_request: BaseRequest) -> StreamResponse:
    return _answer(417)


async def _reject_lost(_request: BaseRequest) -> StreamResponse:
    raise ConnectionResetError("the client has disconnected")


def _answer(status: int, text: str = "") -> web.Response:
    answer = web.Response(status=status, text=f"{text or HTTPStatus(status).phrase}\n")
    answer.force_close()
    return answer
