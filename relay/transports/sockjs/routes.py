"""SockJS at a path of a door: all its transports, from any worker of the site.

    sockjs = SockJs(
        door="centrifugo", prefix="/connection", options=SockJsOptions(sockjs_url=...),
        accept=accept, bus=context.bus, store=context.store, spawn=context.spawn,
    )
    routes += sockjs.routes       # and in `Mounted.closed`: await sockjs.closed()

    def accept(session: SockJsSession, asked: HttpRequest) -> None:
        # A new client. As with a websocket: set its callbacks, and give it to the hub's session.
        session.on_text = ...
        session.on_full, session.on_drained = hub_session.pause, hub_session.resume
        session.on_closed = ...
        hub_session.attach(session)

What is written to a session are elements, `frames.element(payload)`: a door's encoder for SockJS
makes one per event, and they may be joined. `session.close_with(code, reason)` is for the end,
`session.on_oversized` for a request larger than `max_request_bytes`; that should be several times
the size of a message, because messages are escaped and may come several at a time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from aiohttp import web

from relay.core.errors import Unavailable
from relay.transports.between_workers.handover import Bus, Handover, NotThere
from relay.transports.socket.bodies import BodyRejected, read_body
from relay.transports.socket.exchange import HttpAnswer, HttpRequest, as_response, http_request
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
# Neither may be empty or have a dot; a server is what a proxy might go by, and is ignored.
_SESSION = r"/{server:[^/.]+}/{session:[^/.]+}/{transport:" + "|".join(_METHODS) + "}"
# All else that a browser sends with a poll.
_IGNORED_BYTES = 4096

Accept = Callable[["SockJsSession", HttpRequest], None]
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class SockJs:
    """One mount. `routes` are the door's to serve."""

    def __init__(
        self,
        *,
        door: str,
        prefix: str,
        options: SockJsOptions,
        accept: Accept,
        bus: Bus,
        store: ClaimStore,
        spawn: TaskSpawner,
    ) -> None:
        """`prefix` is '' or begins with a slash; `accept` is told of each new session, in the turn
        in which it opens."""
        reaper = Reaper()
        self._options = options
        self._accept = accept
        self._address = bus.address
        self._prefix = prefix
        self._sessions = SockJsSessions(options, reaper)
        self._registry = SessionRegistry(door=door, instance=bus.address, store=store, spawn=spawn)
        self._handover = Handover(
            topic=f"{door}:sockjs",
            bus=bus,
            handle=self._sessions.handle,
            buffer_bytes=options.buffer_bytes,
            reaper=reaper,
        )
        iframe = prefix + r"/{page:iframe[0-9\-.a-z_]*\.html}"
        self.routes: list[web.AbstractRouteDef] = [
            web.route("*", prefix + "/", self._greeting),
            web.route("*", prefix + "/info", self._info),
            web.route("*", iframe, self._iframe),
            web.route("*", prefix + _SESSION, self._session),
        ]
        if prefix:
            # Go's multiplexer, in which upstream mounts it.
            self.routes.append(web.route("*", prefix, self._moved))

    def __len__(self) -> int:
        """Sessions that are not websockets."""
        return len(self._sessions)

    async def closed(self) -> None:
        """For the door's `Mounted.closed`: clients of other workers' sessions go there directly."""
        await self._handover.closed()

    # ---- static ---------------------------------------------------------------------------------

    async def _moved(self, request: web.Request) -> web.StreamResponse:
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
        try:
            if transport.endswith("_send"):
                return await self._send(request)
            return await self._receive(request, transport)
        except Unavailable:
            # The client tries another transport, and then from the beginning.
            return self._refuse(request, 503, b"Service Unavailable\n")
        except BodyRejected as exc:
            return self._refuse(request, exc.status, f"{exc}\n".encode())

    def _websocket(self, request: web.Request) -> web.StreamResponse:
        head = accept_headers(request)
        if isinstance(head, web.Response):
            return self._refuse(request, 400, b'Can "Upgrade" only to "WebSocket".\n')
        asked = http_request(request, b"")
        session, receiver = self._sessions.open_websocket(asked)
        self._accept(session, asked)
        response = take_over(request, head, receiver)
        if not receiver.closing:
            session.attach(receiver)
        return response

    async def _receive(self, request: web.Request, transport: str) -> web.StreamResponse:
        asked = http_request(request, await read_body(request, _IGNORED_BYTES))
        if transport in ("jsonp", "htmlfile"):
            wrong = check_callback(asked)
            if wrong is not None:
                return as_response(wrong)
        session_id = asked.route["session"]
        if session_id not in self._sessions:
            owner = await self._registry.claim(session_id)
            if owner != self._address:
                try:
                    return await self._handover.forward(request, asked, owner)
                except NotThere:
                    await self._registry.seize(session_id)
            # Another request may have been faster.
            if session_id not in self._sessions:
                self._open(session_id, asked)
        response = self._handover.here(request, asked)
        return self._refuse(request, 404, _NOT_FOUND) if response is None else response

    def _open(self, session_id: str, asked: HttpRequest) -> None:
        session = self._sessions.open(
            session_id, asked, on_gone=lambda: self._registry.release(session_id)
        )
        self._accept(session, asked)

    async def _send(self, request: web.Request) -> web.StreamResponse:
        session_id = request.match_info["session"]
        is_here = session_id in self._sessions
        # Only a session's client may send a body.
        if not is_here and await self._registry.owner(session_id) is None:
            return self._refuse(request, 404, _NOT_FOUND)
        try:
            body: bytes | None = await read_body(request, self._options.max_request_bytes)
        except BodyRejected as exc:
            if exc.status != 413:
                raise
            # The session ends in its protocol's own words.
            body = None
        asked = http_request(request, body)
        response = self._handover.here(request, asked)
        if response is not None:
            return response
        # Who has it may have been remembered for too long: then it is asked for anew, once.
        for _ in range(2):
            owner = await self._registry.owner(session_id)
            if owner is None:
                break
            try:
                return await self._handover.forward(request, asked, owner)
            except NotThere:
                self._registry.forget(session_id)
        return self._refuse(request, 404, _NOT_FOUND)

    def _refuse(self, request: web.Request, status: int, text: bytes) -> web.StreamResponse:
        headers = {"Content-Type": pages.PLAIN} | pages.NOT_CACHED | pages.cors(request.headers)
        return as_response(HttpAnswer(status, text, headers))


# Go's http.NotFound.
_NOT_FOUND = b"404 page not found\n"
