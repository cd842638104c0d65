"""The HTTP endpoint of Engine.IO: one path for both protocol versions, and this worker's sessions.

A session's ID names its worker (`between_workers.session_ids`). A request that arrives at another
worker is passed on to it (`between_workers.forwarder`), so no sticky proxy is needed. Errors are
those of engine.io 6.6 (captured): status 400 and `{"code","message"}`. Unlike engine.io, relay
rejects a WebSocket with an unsupported protocol version before the upgrade.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import orjson
from aiohttp import web

from relay.core.client_libraries import allowed_headers
from relay.core.errors import RelayError
from relay.core.slices import next_slice
from relay.transports.between_workers.forwarder import Forward
from relay.transports.between_workers.session_ids import SessionIds
from relay.transports.engineio import packets
from relay.transports.engineio.engine import Engine
from relay.transports.engineio.packets import Malformed
from relay.transports.socket import websocket
from relay.transports.socket.bodies import BodyRejected, read_body
from relay.transports.socket.exchange import (
    Exchange,
    HeldRequest,
    HttpAnswer,
    HttpRequest,
    as_response,
    http_request,
)
from relay.transports.socket.heartbeat import Heartbeat
from relay.transports.socket.reaper import Reaper

if TYPE_CHECKING:
    from multidict import MultiMapping

UNKNOWN_TRANSPORT, UNKNOWN_SID, BAD_METHOD, BAD_REQUEST, FORBIDDEN, BAD_VERSION = range(6)
_MESSAGES = (
    "Transport unknown",
    "Session ID unknown",
    "Bad handshake method",
    "Bad request",
    "Forbidden",
    "Unsupported protocol version",
)
_TEXT = "text/plain; charset=UTF-8"
_SCRIPT = "text/javascript; charset=UTF-8"
_PING_4 = packets.frame(packets.Packet(packets.PING), 4)
# Limit of a JSONP form. Decoding forms is slow, and only browsers without CORS send them.
_FORM_BYTES = 65_536
# Clients of protocol 3 send the pings. Their silence is checked this often per interval.
_CHECKS_PER_INTERVAL = 5
# Time for the upgrade from polling to WebSocket: Engine.IO's `upgradeTimeout`.
_UPGRADE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Intervals and limits that the handshake contains."""

    ping_interval_s: float = 25.0
    ping_timeout_s: float = 20.0
    max_payload_bytes: int = 1_000_000


# The protocol's handler of a new session. It sets the session's callbacks.
Opened = Callable[[Engine, HttpRequest], None]


class Endpoint:
    """All sessions of one protocol on this worker, which their IDs name.

    `cors` returns the headers of every answer.
    """

    def __init__(
        self,
        *,
        address: str,
        ids: SessionIds,
        timing: Timing,
        buffer_bytes: int,
        opened: Opened,
        cors: Callable[[MultiMapping[str]], dict[str, str]],
        forward: Forward,
    ) -> None:
        self._address = address
        self._ids = ids
        self._buffer_bytes = buffer_bytes
        self._opened = opened
        self._cors = cors
        self._reaper = Reaper()
        self._engines: dict[str, Engine] = {}
        self._last_gone = asyncio.Event()
        self._forward = forward
        self.reload(timing)

    def reload(self, timing: Timing) -> None:
        """Use other timing for new sessions."""
        self._timing = timing
        deadline = timing.ping_interval_s + timing.ping_timeout_s
        self._beats = {
            3: Heartbeat(
                interval_s=timing.ping_interval_s / _CHECKS_PER_INTERVAL,
                beat=b"",
                deadline_s=deadline,
            ),
            4: Heartbeat(
                interval_s=timing.ping_interval_s,
                beat=_PING_4,
                deadline_s=timing.ping_timeout_s,
            ),
        }

    def __len__(self) -> int:
        return len(self._engines)

    async def closed(self) -> None:
        """Wait until all sessions have ended."""
        if self._engines:
            self._last_gone.clear()
            await self._last_gone.wait()

    # ---- requests ---------------------------------------------------------------------------

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Handle a request with any method."""
        if request.method == "OPTIONS":
            return web.Response(status=204, headers=self._preflight(request.headers))
        asked = http_request(request, b"")
        sid = asked.query.get("sid", "")
        engine = self._engines.get(sid)
        owner = self._ids.owner_of(sid) if sid and engine is None else None
        if owner is not None and owner != self._address:
            try:
                passed_on = await self._forward(request, owner, self._timing.max_payload_bytes)
            except BodyRejected as exc:
                return as_response(self._refusal(exc.status, BAD_REQUEST, request.headers))
            except RelayError:
                passed_on = None
            # There is no such worker, and no such session.
            return passed_on or as_response(self._refusal(400, UNKNOWN_SID, request.headers))
        # Only a session's client may send a body.
        if request.method == "POST" and engine is not None:
            try:
                body = await read_body(request, engine.max_message_bytes)
                asked = replace(asked, body=body)
            except BodyRejected as exc:
                if exc.status != 413:
                    return as_response(self._refusal(exc.status, BAD_REQUEST, request.headers))
                # The session ends too.
                asked = replace(asked, body=None)
            # Decoding takes milliseconds: many bodies that arrive together must take turns.
            await next_slice()
        exchange = Exchange(request, asked)
        self._handle(exchange)
        if exchange.response is None:
            raise RuntimeError("the request was not answered")
        return exchange.response

    def _preflight(self, headers: Mapping[str, str]) -> dict[str, str]:
        allowed = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600"}
        return {**self._cors_of(headers), **allowed, **allowed_headers(headers)}

    def _handle(self, exchange: Exchange) -> None:
        """Answer a request for a session of this worker, or for a new one."""
        asked = exchange.request
        query = asked.query
        transport = query.get("transport", "")
        if transport not in ("polling", "websocket"):
            self._refuse(exchange, UNKNOWN_TRANSPORT)
        elif "sid" not in query:
            self._begin(exchange, transport)
        elif (engine := self._engines.get(query["sid"])) is None:
            self._refuse(exchange, UNKNOWN_SID)
        elif transport == "websocket":
            self._probe(exchange, engine)
        elif asked.method == "GET":
            self._poll(exchange, engine)
        elif asked.method == "POST":
            self._receive(exchange, engine)
        else:
            self._refuse(exchange, BAD_REQUEST)

    def _begin(self, exchange: Exchange, transport: str) -> None:
        asked = exchange.request
        version = {"3": 3, "4": 4}.get(asked.query.get("EIO", ""))
        if asked.method != "GET":
            self._refuse(exchange, BAD_METHOD)
        elif version is None:
            self._refuse(exchange, BAD_VERSION)
        elif transport == "websocket":
            head = websocket.accept_headers(asked)
            if isinstance(head, web.Response):
                self._refuse(exchange, BAD_REQUEST)
                return
            engine = self._engine(version, asked)
            socket = self._websocket(engine)
            engine.attach(socket)
            exchange.take(head, socket)
            self._open(engine, asked, upgrades=[])
        else:
            engine = self._engine(version, asked)
            self._open(engine, asked, upgrades=["websocket"])
            self._poll(exchange, engine)

    def _engine(self, version: int, asked: HttpRequest) -> Engine:
        engine = Engine(
            sid=self._ids.new(),
            version=version,
            buffer_bytes=self._buffer_bytes,
            max_message_bytes=self._timing.max_payload_bytes,
            reaper=self._reaper,
            heartbeat=self._beats[version],
            on_gone=self._gone,
            base64_only=_only_base64(asked),
            info=asked.info,
        )
        self._engines[engine.sid] = engine
        return engine

    def _open(self, engine: Engine, asked: HttpRequest, upgrades: list[str]) -> None:
        timing = self._timing
        handshake = orjson.dumps(
            {
                "sid": engine.sid,
                "upgrades": upgrades,
                "pingInterval": round(timing.ping_interval_s * 1000),
                "pingTimeout": round(timing.ping_timeout_s * 1000),
                "maxPayload": timing.max_payload_bytes,
            }
        )
        engine.write(packets.frame(packets.Packet(packets.OPEN, handshake), engine.version))
        self._opened(engine, asked)

    def _gone(self, engine: Engine) -> None:
        self._engines.pop(engine.sid, None)
        if not self._engines:
            self._last_gone.set()

    # ---- polling ----------------------------------------------------------------------------

    def _poll(self, exchange: Exchange, engine: Engine) -> None:
        headers = exchange.request.headers
        waiting = _Poll(
            exchange, engine, self._cors_of(headers), self._refusal(400, UNKNOWN_SID, headers)
        )
        stamp = exchange.request.query.get("t", "")
        if not engine.poll(waiting.answer, stamp, exchange.transport):
            self._refuse(exchange, BAD_REQUEST)
        elif not waiting.answered:
            held = HeldRequest(buffer_bytes=self._buffer_bytes, reaper=self._reaper)
            held.on_closed = engine.poll_lost
            waiting.held = held
            exchange.hold(held)

    def _receive(self, exchange: Exchange, engine: Engine) -> None:
        asked = exchange.request
        headers = self._cors_of(asked.headers)
        kind = asked.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        binary = kind == "application/octet-stream"
        is_form = "j" in asked.query or kind == "application/x-www-form-urlencoded"
        if not engine.is_polling:
            # A request that a proxy has repeated. Its packets have been received.
            self._refuse(exchange, BAD_REQUEST)
            return
        limit = engine.max_message_bytes
        if is_form:
            limit = min(limit, _FORM_BYTES)
        body = asked.body
        if body is None or len(body) > limit:
            self._answer(exchange, 413, b"", headers)
            engine.abort()
            return
        try:
            if is_form:
                body = packets.jsonp_body(_form_field(body))
            received = packets.decode_payload(body, engine.version, binary=binary)
        except Malformed:
            self._refuse(exchange, BAD_REQUEST)
            engine.violated()
            return
        self._answer(exchange, 200, b"ok", {**headers, "Content-Type": "text/html"})
        engine.receive(received)

    # ---- websocket --------------------------------------------------------------------------

    def _probe(self, exchange: Exchange, engine: Engine) -> None:
        head = websocket.accept_headers(exchange.request)
        if isinstance(head, web.Response):
            self._refuse(exchange, BAD_REQUEST)
            return
        socket = self._websocket(engine)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(_UPGRADE_S, socket.abort)
        if engine.probe(socket, timer):
            exchange.take(head, socket)
        else:
            timer.cancel()
            self._refuse(exchange, BAD_REQUEST)

    def _websocket(self, engine: Engine) -> websocket.WebSocketConnection:
        return websocket.WebSocketConnection(
            buffer_bytes=self._buffer_bytes,
            max_frame_bytes=engine.max_message_bytes,
            reaper=self._reaper,
        )

    # ---- answers ----------------------------------------------------------------------------

    def _refuse(self, exchange: Exchange, code: int) -> None:
        status = 403 if code == FORBIDDEN else 400
        exchange.answer(self._refusal(status, code, exchange.request.headers))

    def _refusal(self, status: int, code: int, asked: MultiMapping[str]) -> HttpAnswer:
        body = orjson.dumps({"code": code, "message": _MESSAGES[code]})
        headers = {"Content-Type": "application/json", **self._cors_of(asked)}
        return HttpAnswer(status, body, {**headers, "Cache-Control": "no-store"})

    @staticmethod
    def _answer(exchange: Exchange, status: int, body: bytes, headers: dict[str, str]) -> None:
        exchange.answer(HttpAnswer(status, body, {**headers, "Cache-Control": "no-store"}))

    def _cors_of(self, headers: MultiMapping[str] | Mapping[str, str]) -> dict[str, str]:
        return self._cors(headers)  # type: ignore[arg-type]  # both have `get`


class _Poll:
    """A polling request, which is answered immediately or held."""

    __slots__ = ("_engine", "_exchange", "_headers", "_no_session", "answered", "held")

    def __init__(
        self, exchange: Exchange, engine: Engine, headers: dict[str, str], no_session: HttpAnswer
    ) -> None:
        self._exchange = exchange
        self._engine = engine
        self._headers = headers
        self._no_session = no_session
        self.answered = False
        self.held: HeldRequest | None = None

    def answer(self, frames: bytes | None) -> None:
        """Answer with the frames as one body, or that the session does not exist if it is None."""
        answer = self._no_session if frames is None else self._body(frames)
        self.answered = True
        if self.held is None:
            self._exchange.answer(answer)
        else:
            self.held.finish(answer)

    def _body(self, frames: bytes) -> HttpAnswer:
        request, version = self._exchange.request, self._engine.version
        query = request.query
        index = query.get("j", "")
        jsonp = index.isascii() and index.isdigit()
        body = packets.encode_payload(
            packets.unframe(frames, version),
            version,
            base64_only=jsonp or self._engine.base64_only or _only_base64(request),
        )
        kind, data = _TEXT, body.data
        if body.binary:
            kind = "application/octet-stream"
        elif jsonp:
            kind, data = _SCRIPT, packets.jsonp_answer(int(index[:9]), data)
        headers = {**self._headers, "Content-Type": kind, "Cache-Control": "no-store"}
        return HttpAnswer(200, data, headers)


def _only_base64(request: HttpRequest) -> bool:
    return request.query.get("b64", "0") not in ("", "0", "false")


def _form_field(body: bytes) -> bytes:
    try:
        fields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=16)
        return fields["d"][0].encode()
    except (KeyError, ValueError):
        raise Malformed("a form without the field d") from None
