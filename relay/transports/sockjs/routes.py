"""SockJS endpoint of a protocol, with all transports. Any worker accepts any session's requests.

    sockjs = SockJs(
        door="centrifugo", prefix="/connection", options=SockJsOptions(sockjs_url=...),
        accept=accept, address=context.bus.address, store=context.store, forward=context.forward,
        spawn=context.spawn,
    )
    routes += sockjs.routes

    def accept(session: SockJsSession, request: HttpRequest) -> None:
        # A new client. Set the callbacks and attach the session, as for a WebSocket.
        session.on_text = ...
        session.on_full, session.on_drained = hub_session.pause, hub_session.resume
        session.on_closed = ...
        hub_session.attach(session)

The protocol's encoder makes one `frames.element(payload)` per event for `session.write`. Several
elements can be joined. `session.close_with(code, reason)` closes the session.

`session.on_oversized` is called for a request larger than `max_request_bytes`. This limit should be
several times the size of a message, because a request has escaped messages, and often several.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from aiohttp import web

from relay.core.errors import RelayError, WorkerUnreachable
from relay.transports.between_workers.forwarder import Forward, was_forwarded
from relay.transports.socket.bodies import BodyRejected, read_body
from relay.transports.socket.exchange import (
    Exchange,
    HttpAnswer,
    HttpRequest,
    as_response,
    http_request,
)
from relay.transports.socket.http_connection import has_turn, is_overloaded
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import take_over
from relay.transports.socket.websocket import accept_headers
from relay.transports.sockjs import pages
from relay.transports.sockjs.registry import ClaimStore, SessionRegistry, TaskSpawner
from relay.transports.sockjs.sessions import SockJsOptions, SockJsSessions, check_callback

if TYPE_CHECKING:
    from relay.transports.sockjs.session import SockJsSession

_POST = ("OPTIONS", "POST")
_METHODS: dict[str, tuple[str, ...]] = {
    "xhr": _POST,
    "xhr_send": _POST,
    "xhr_streaming": _POST,
    "jsonp_send": ("POST",),
    "jsonp": ("GET",),
    "eventsource": ("GET",),
    "htmlfile": ("GET",),
    "websocket": ("GET",),
}
# Neither ID may be empty or contain a dot. The server ID is for proxies and is ignored.
_SESSION = r"/{server:[^/.]+}/{session:[^/.]+}/{transport:" + "|".join(_METHODS) + "}"
# Limit of a poll's body, which is ignored.
_IGNORED_BYTES = 4096

Accept = Callable[["SockJsSession", HttpRequest], None]
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class SockJs:
    """One SockJS endpoint. The protocol adds `routes` to its own."""

    def __init__(
        self,
        *,
        door: str,
        prefix: str,
        options: SockJsOptions,
        accept: Accept,
        address: str,
        store: ClaimStore,
        forward: Forward,
        spawn: TaskSpawner,
    ) -> None:
        """`prefix` is '' or begins with a slash.

        `accept` is called for each new session before its first frame is sent.
        """
        reaper = Reaper()
        self._forward = forward
        self._options = options
        self._accept = accept
        self._address = address
        self._prefix = prefix
        self._sessions = SockJsSessions(options, reaper)
        self._registry = SessionRegistry(door=door, instance=address, store=store, spawn=spawn)
        # Called when registrations in the store may have expired too early.
        self.on_clock_jump = self._registry.on_clock_jump
        iframe = prefix + r"/{page:iframe[0-9\-.a-z_]*\.html}"
        self.routes: list[web.AbstractRouteDef] = [
            web.route("*", prefix + "/", self._greeting),
            web.route("*", prefix + "/info", self._info),
            web.route("*", iframe, self._iframe),
            web.route("*", prefix + _SESSION, self._session),
        ]
        if prefix:
            # As Go's request multiplexer does in upstream.
            self.routes.append(web.route("*", prefix, self._redirect))

    def __len__(self) -> int:
        """Return the number of sessions other than WebSockets."""
        return len(self._sessions)

    # ---- static ---------------------------------------------------------------------------------

    async def _redirect(self, request: web.Request) -> web.StreamResponse:
        query = f"?{request.query_string}" if request.query_string else ""
        return as_response(HttpAnswer(301, b"", {"Location": f"{self._prefix}/{query}"}))

    async def _greeting(self, request: web.Request) -> web.StreamResponse:
        if request.method != "GET":
            return as_response(pages.not_allowed(["GET"]))
        return as_response(pages.greeting())

    async def _info(self, request: web.Request) -> web.StreamResponse:
        if request.method == "OPTIONS":
            return as_response(pages.preflight(request.headers, "OPTIONS, GET"))
        if request.method != "GET":
            return as_response(pages.not_allowed(["OPTIONS", "GET"]))
        return as_response(pages.info(request.headers))

    async def _iframe(self, request: web.Request) -> web.StreamResponse:
        if request.method != "GET":
            return as_response(pages.not_allowed(["GET"]))
        return as_response(pages.iframe(request.headers, self._options.sockjs_url))

    # ---- sessions -------------------------------------------------------------------------------

    async def _session(self, request: web.Request) -> web.StreamResponse:
        transport = request.match_info["transport"]
        methods = _METHODS[transport]
        if request.method not in methods:
            return as_response(pages.not_allowed(methods))
        if request.method == "OPTIONS":
            return as_response(pages.preflight(request.headers, ", ".join(methods)))
        if transport == "websocket":
            return self._websocket(request)
        if was_forwarded(request):
            # The worker that passed on the request may have had an outdated registration.
            self._registry.forget(request.match_info["session"])
        try:
            if transport.endswith("_send"):
                return await self._send(request)
            return await self._receive(request, transport)
        except WorkerUnreachable:
            return self._refuse(request, 404, _NOT_FOUND)
        except RelayError:
            # The client tries its other transports and then reconnects.
            return self._refuse(request, 503, b"Service Unavailable\n")
        except BodyRejected as exc:
            return self._refuse(request, exc.status, f"{exc}\n".encode())

    def _websocket(self, request: web.Request) -> web.StreamResponse:
        head = accept_headers(request)
        if isinstance(head, web.Response):
            return self._refuse(request, 400, b'Can "Upgrade" only to "WebSocket".\n')
        received = http_request(request, b"")
        session, receiver = self._sessions.open_websocket(received)
        self._accept(session, received)
        response = take_over(request, head, receiver)
        if not receiver.closing:
            session.attach(receiver)
        return response

    async def _receive(self, request: web.Request, transport: str) -> web.StreamResponse:
        received = http_request(request, b"")
        if transport in ("jsonp", "htmlfile"):
            wrong = check_callback(received)
            if wrong is not None:
                return as_response(wrong)
        session_id = received.route["session"]
        if session_id not in self._sessions:
            is_full = not self._sessions.has_room
            may_refuse = is_full or is_overloaded(request)
            if may_refuse and await self._registry.owner(session_id) is None:
                if is_full:
                    return self._refuse(request, 503, b"Too many sessions are being opened\n")
                if not await has_turn(request):
                    # SockJS clients ignore when they should try again.
                    return self._refuse(request, 503, b"relay is overloaded; try again later\n")
            owner = await self._registry.claim(session_id)
            if owner != self._address:
                moved = await self._forward(request, owner, _IGNORED_BYTES)
                if moved is not None:
                    return moved
                successor = await self._registry.take_over(session_id, owner)
                if successor != self._address:
                    # Another worker was faster.
                    moved = await self._forward(request, successor, _IGNORED_BYTES)
                    return moved or self._refuse(request, 404, _NOT_FOUND)
            await read_body(request, _IGNORED_BYTES)
            # A concurrent request may have opened the session.
            if session_id not in self._sessions:
                self._open(session_id, received)
        return self._here(request, received)

    def _here(self, request: web.Request, received: HttpRequest) -> web.StreamResponse:
        exchange = Exchange(request, received)
        if not self._sessions.handle(exchange) or exchange.response is None:
            return self._refuse(request, 404, _NOT_FOUND)
        return exchange.response

    def _open(self, session_id: str, received: HttpRequest) -> None:
        session = self._sessions.open(
            session_id, received, on_removed=lambda: self._registry.release(session_id)
        )
        self._accept(session, received)

    async def _send(self, request: web.Request) -> web.StreamResponse:
        session_id = request.match_info["session"]
        is_here = session_id in self._sessions
        # Don't read bodies for sessions that don't exist.
        for _ in range(0 if is_here else 2):
            owner = await self._registry.owner(session_id)
            if owner is None:
                return self._refuse(request, 404, _NOT_FOUND)
            moved = await self._forward(request, owner, self._options.max_request_bytes)
            if moved is not None:
                return moved
            # The cached owner may be outdated. Look it up again once.
            self._registry.forget(session_id)
        try:
            body: bytes | None = await read_body(request, self._options.max_request_bytes)
        except BodyRejected as exc:
            if exc.status != 413:
                raise
            # The session is closed as its protocol defines.
            body = None
        return self._here(request, http_request(request, body))

    def _refuse(self, request: web.Request, status: int, text: bytes) -> web.StreamResponse:
        headers = {"Content-Type": pages.PLAIN} | pages.NOT_CACHED | pages.cors(request.headers)
        return as_response(HttpAnswer(status, text, headers))


# Go's http.NotFound.
_NOT_FOUND = b"404 page not found\n"
