"""The SockJS sessions of one worker, and the handling of their requests."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qs

from relay.core.client_libraries import EVENT_STREAM
from relay.transports.socket.deadlines import Deadlines
from relay.transports.socket.exchange import Exchange, HttpAnswer, HttpRequest
from relay.transports.socket.heartbeat import Heartbeat
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.websocket import PING
from relay.transports.sockjs import frames
from relay.transports.sockjs.frames import BadFrame, Framing, parse_messages
from relay.transports.sockjs.pages import HTML, NOT_CACHED, PLAIN, SCRIPT, cors, htmlfile_page
from relay.transports.sockjs.receivers import PollReceiver, StreamReceiver, WebSocketReceiver
from relay.transports.sockjs.session import SockJsSession

# "The transport must first send 2KiB of `h` bytes", sockjs-protocol; sockjs-go the same.
_XHR_PRELUDE = b"h" * 2048 + b"\n"
# Opera's EventSource requires a blank line first.
_EVENTSOURCE_PRELUDE = b"\r\n"
_LONGEST_DOWNLOAD_S = 300.0
_PONG_S = 10.0
# Upper limit of the open frame and the framing of one message frame together.
_FRAME_BYTES = 64
# Characters that are not allowed in a callback name, as in sockjs-go v1 and v2.
_NO_CALLBACK = re.compile(r"[^a-zA-Z0-9_.]")

# Sessions of a worker whose clients have not sent a message yet. They end within seconds. Until
# then, each has a registration in Redis.
_MAX_SILENT = 5_000

_STREAMS: dict[str, tuple[str, bytes]] = {
    "xhr_streaming": (SCRIPT, _XHR_PRELUDE),
    "eventsource": (EVENT_STREAM, _EVENTSOURCE_PRELUDE),
    "htmlfile": (HTML, b""),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SockJsOptions:
    """Options of an endpoint. Sizes are in bytes, times in seconds.

    `heartbeat_s` 0 disables heartbeats. `max_request_bytes` limits the body of a request and a
    WebSocket frame.
    """

    sockjs_url: str
    heartbeat_s: float = 25.0
    max_request_bytes: int = 65536
    buffer_bytes: int = 65536
    # The defaults of sockjs-go and the other SockJS servers.
    disconnect_s: float = 5.0
    response_limit_bytes: int = 131_072


class SockJsSessions:
    """Sessions by ID. Handles the requests for them."""

    def __init__(self, options: SockJsOptions, reaper: Reaper) -> None:
        self._options = options
        self._reaper = reaper
        self._by_id: dict[str, SockJsSession] = {}
        self._silent: set[str] = set()
        self._detached: Deadlines[SockJsSession] = Deadlines(
            options.disconnect_s,
            SockJsSession.expire,
            # The browser sends its next request when it has received the last response.
            carrier=lambda session: session.carrier,
            longest_s=_LONGEST_DOWNLOAD_S,
        )
        self._framing = {
            "xhr": Framing(frames.xhr),
            "xhr_streaming": Framing(frames.xhr),
            "eventsource": Framing(frames.eventsource),
            "htmlfile": Framing(frames.htmlfile),
            "websocket": Framing(frames.websocket),
        }
        self._waiting: Deadlines[PollReceiver] | None = None
        self._beats: dict[str, Heartbeat] = {}
        beat_s = options.heartbeat_s
        if beat_s > 0:
            self._waiting = Deadlines(beat_s, PollReceiver.send_heartbeat)
            self._beats = {
                name: Heartbeat(
                    interval_s=beat_s, beat=self._framing[name].heartbeat, only_quiet=True
                )
                for name in _STREAMS
            }
            # A WebSocket also gets a ping, whose pong shows that the client is connected.
            self._beats["websocket"] = Heartbeat(
                interval_s=beat_s,
                beat=self._framing["websocket"].heartbeat + PING,
                deadline_s=_PONG_S,
            )

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._by_id

    @property
    def has_room(self) -> bool:
        """Return False while too many clients have opened a session and sent nothing."""
        return len(self._silent) < _MAX_SILENT

    def open(
        self, session_id: str, request: HttpRequest, on_removed: Callable[[], None]
    ) -> SockJsSession:
        """Create a session for its first receiver. `on_removed` is called when it is removed."""
        session = SockJsSession(
            transport=request.route["transport"],
            peer=request.peer,
            info=request.info,
            buffer_bytes=self._options.buffer_bytes,
            detached=self._detached,
        )
        self._by_id[session_id] = session
        self._silent.add(session_id)

        def removed() -> None:
            del self._by_id[session_id]
            self._silent.discard(session_id)
            on_removed()

        session.on_removed = removed
        return session

    def open_websocket(self, request: HttpRequest) -> tuple[SockJsSession, WebSocketReceiver]:
        """Create a session without an ID that lives as long as its WebSocket."""
        options = self._options
        session = SockJsSession(
            transport="websocket",
            peer=request.peer,
            info=request.info,
            buffer_bytes=options.buffer_bytes,
            detached=None,
        )
        receiver = WebSocketReceiver(
            session=session,
            framing=self._framing["websocket"],
            buffer_bytes=options.buffer_bytes,
            max_frame_bytes=options.max_request_bytes,
            reaper=self._reaper,
            heartbeat=self._beats.get("websocket"),
        )
        return session, receiver

    def handle(self, exchange: Exchange) -> bool:
        """Answer a request. Return False if its session does not exist here."""
        request = exchange.request
        session = self._by_id.get(request.route["session"])
        if session is None:
            return False
        transport = request.route["transport"]
        if transport.endswith("_send"):
            exchange.answer(self._send(session, transport, request))
        elif transport in _STREAMS:
            self._stream(session, transport, exchange)
        else:
            self._poll(session, transport, exchange)
        return True

    # ---- inner workings -------------------------------------------------------------------------

    def _send(self, session: SockJsSession, transport: str, request: HttpRequest) -> HttpAnswer:
        headers = {"Content-Type": PLAIN} | NOT_CACHED | cors(request.headers)
        self._silent.discard(request.route["session"])
        if request.body is None:
            session.on_oversized()
        else:
            try:
                body = request.body if transport == "xhr_send" else form_data(request)
                texts = parse_messages(body)
            except BadFrame as exc:
                return HttpAnswer(500, str(exc).encode(), headers)
            session.messages(texts)
        return (
            HttpAnswer(204, b"", headers)
            if transport == "xhr_send"
            else HttpAnswer(200, b"ok", headers)
        )

    def _stream(self, session: SockJsSession, transport: str, exchange: Exchange) -> None:
        options = self._options
        request = exchange.request
        kind, prelude = _STREAMS[transport]
        if transport == "htmlfile":
            prelude = htmlfile_page(callback_of(request))
        length = None
        # A browser reports an error if a response is shorter than its declared length. In Node
        # sockjs-client 1.6 reports nothing then, so it gets a response that ends with its
        # connection. Browsers send Origin with every POST, Node's client does not.
        is_browser = transport == "xhr_streaming" and "Origin" in request.headers
        if is_browser and not (session.closing or session.has_receiver):
            # A frame cannot be split, so the response needs room for all pending messages.
            length = max(options.response_limit_bytes, session.pending_bytes + _FRAME_BYTES)
        receiver = StreamReceiver(
            session=session,
            framing=self._framing[transport],
            length_bytes=length,
            buffer_bytes=options.buffer_bytes,
            reaper=self._reaper,
            heartbeat=self._beats.get(transport),
        )
        head = HttpAnswer(200, prelude, {"Content-Type": kind} | NOT_CACHED | cors(request.headers))
        exchange.take(head.streamed(length), receiver)
        if not receiver.closing:
            session.attach(receiver)

    def _poll(self, session: SockJsSession, transport: str, exchange: Exchange) -> None:
        request = exchange.request
        if transport == "jsonp":
            framing = Framing(partial(frames.jsonp, callback_of(request)))
        else:
            framing = self._framing["xhr"]
        kind = {"Content-Type": SCRIPT, "X-Content-Type-Options": "nosniff"}
        receiver = PollReceiver(
            session=session,
            exchange=exchange,
            framing=framing,
            headers=kind | NOT_CACHED | cors(request.headers),
            waiting=self._waiting,
            buffer_bytes=self._options.buffer_bytes,
            reaper=self._reaper,
        )
        session.attach(receiver)
        if not receiver.finished:
            receiver.wait()


def callback_of(request: HttpRequest) -> str:
    """Return the callback name of jsonp and htmlfile."""
    return request.query.get("c", "")


def check_callback(request: HttpRequest) -> HttpAnswer | None:
    """Return an error if the callback name is missing or unsafe (status codes of sockjs-go)."""
    callback = callback_of(request)
    headers = {"Content-Type": PLAIN, "X-Content-Type-Options": "nosniff"} | NOT_CACHED
    if not callback:
        return HttpAnswer(500, b'"callback" parameter required\n', headers)
    if _NO_CALLBACK.search(callback):
        return HttpAnswer(400, b'invalid character in "callback" parameter\n', headers)
    return None


def form_data(request: HttpRequest) -> bytes:
    """Return the messages of jsonp_send: the form field `d`, or the body itself."""
    body = request.body or b""
    if (
        request.headers.get("Content-Type", "")
        .lower()
        .startswith("application/x-www-form-urlencoded")
    ):
        # Latin-1 preserves every byte, whatever the text's encoding.
        form = parse_qs(body.decode("latin-1"), encoding="latin-1", max_num_fields=100)
        return form.get("d", [""])[0].encode("latin-1")
    return body
