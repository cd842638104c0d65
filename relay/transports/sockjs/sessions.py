"""The sessions of one worker, and what a request to one of them means."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qs

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
# Opera's EventSource needed one.
_EVENTSOURCE_PRELUDE = b"\r\n"
_PONG_S = 10.0
# More than the opening frame and what stands around the messages of one frame.
_FRAME_BYTES = 64
# As sockjs-go v1 and v2: what is no name of JavaScript, or would leave it.
_NO_CALLBACK = re.compile(r"[^a-zA-Z0-9_.]")

_STREAMS: dict[str, tuple[str, bytes]] = {
    "xhr_streaming": (SCRIPT, _XHR_PRELUDE),
    "eventsource": ("text/event-stream; charset=UTF-8", _EVENTSOURCE_PRELUDE),
    "htmlfile": (HTML, b""),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SockJsOptions:
    """Sizes in bytes, times in seconds.

    `heartbeat_s` 0: none. `max_request_bytes` is for the body of a request or a websocket's frame.
    """

    sockjs_url: str
    heartbeat_s: float = 25.0
    max_request_bytes: int = 65536
    buffer_bytes: int = 65536
    # Both as in sockjs-go and every other server.
    disconnect_s: float = 5.0
    response_limit_bytes: int = 131_072


class SockJsSessions:
    """Sessions by ID, and how a request is answered for one."""

    def __init__(self, options: SockJsOptions, reaper: Reaper) -> None:
        self._options = options
        self._reaper = reaper
        self._by_id: dict[str, SockJsSession] = {}
        self._lonely: Deadlines[SockJsSession] = Deadlines(
            options.disconnect_s, SockJsSession.expire
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
            self._waiting = Deadlines(beat_s, PollReceiver.beat)
            self._beats = {
                name: Heartbeat(
                    interval_s=beat_s, beat=self._framing[name].heartbeat, only_quiet=True
                )
                for name in _STREAMS
            }
            # A ping beside the frame: its answer shows that somebody is there.
            self._beats["websocket"] = Heartbeat(
                interval_s=beat_s,
                beat=self._framing["websocket"].heartbeat + PING,
                deadline_s=_PONG_S,
            )

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._by_id

    def open(
        self, session_id: str, asked: HttpRequest, on_gone: Callable[[], None]
    ) -> SockJsSession:
        """A new session, for its first receiver. `on_gone` follows when it is forgotten."""
        session = SockJsSession(
            transport=asked.route["transport"],
            peer=asked.peer,
            buffer_bytes=self._options.buffer_bytes,
            lonely=self._lonely,
        )
        self._by_id[session_id] = session

        def gone() -> None:
            del self._by_id[session_id]
            on_gone()

        session.on_gone = gone
        return session

    def open_websocket(self, asked: HttpRequest) -> tuple[SockJsSession, WebSocketReceiver]:
        """A session that nobody else can name: it lives as long as its websocket."""
        options = self._options
        session = SockJsSession(
            transport="websocket",
            peer=asked.peer,
            buffer_bytes=options.buffer_bytes,
            lonely=None,
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
        """See `relay.transports.between_workers.handover.Handle`."""
        asked = exchange.asked
        session = self._by_id.get(asked.route["session"])
        if session is None:
            return False
        transport = asked.route["transport"]
        if transport.endswith("_send"):
            exchange.answer(self._send(session, transport, asked))
        elif transport in _STREAMS:
            self._stream(session, transport, exchange)
        else:
            self._poll(session, transport, exchange)
        return True

    # ---- inner workings -------------------------------------------------------------------------

    def _send(self, session: SockJsSession, transport: str, asked: HttpRequest) -> HttpAnswer:
        headers = {"Content-Type": PLAIN} | NOT_CACHED | cors(asked.headers)
        if asked.body is None:
            session.on_oversized()
        else:
            try:
                body = asked.body if transport == "xhr_send" else form_data(asked)
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
        asked = exchange.asked
        kind, prelude = _STREAMS[transport]
        if transport == "htmlfile":
            prelude = htmlfile_page(callback_of(asked))
        length = None
        if transport == "xhr_streaming" and not (session.closing or session.has_receiver):
            # A frame is never divided, so a response has room for all that waits.
            length = max(options.response_limit_bytes, session.pending_bytes + _FRAME_BYTES)
        receiver = StreamReceiver(
            session=session,
            framing=self._framing[transport],
            length_bytes=length,
            buffer_bytes=options.buffer_bytes,
            reaper=self._reaper,
            heartbeat=self._beats.get(transport),
        )
        head = HttpAnswer(200, prelude, {"Content-Type": kind} | NOT_CACHED | cors(asked.headers))
        exchange.take(head.streamed(length), receiver)
        if not receiver.closing:
            session.attach(receiver)

    def _poll(self, session: SockJsSession, transport: str, exchange: Exchange) -> None:
        asked = exchange.asked
        if transport == "jsonp":
            framing = Framing(partial(frames.jsonp, callback_of(asked)))
        else:
            framing = self._framing["xhr"]
        kind = {"Content-Type": SCRIPT, "X-Content-Type-Options": "nosniff"}
        receiver = PollReceiver(
            session=session,
            exchange=exchange,
            framing=framing,
            headers=kind | NOT_CACHED | cors(asked.headers),
            waiting=self._waiting,
            buffer_bytes=self._options.buffer_bytes,
            reaper=self._reaper,
        )
        session.attach(receiver)
        if not receiver.over:
            receiver.wait()


def callback_of(asked: HttpRequest) -> str:
    """The name that jsonp and htmlfile call."""
    return asked.query.get("c", "")


def check_callback(asked: HttpRequest) -> HttpAnswer | None:
    """What to answer where the name is missing or dangerous (statuses as sockjs-go's)."""
    callback = callback_of(asked)
    headers = {"Content-Type": PLAIN, "X-Content-Type-Options": "nosniff"} | NOT_CACHED
    if not callback:
        return HttpAnswer(500, b'"callback" parameter required\n', headers)
    if _NO_CALLBACK.search(callback):
        return HttpAnswer(400, b'invalid character in "callback" parameter\n', headers)
    return None


def form_data(asked: HttpRequest) -> bytes:
    """The messages of jsonp_send: the field `d` of a form, or the body itself."""
    body = asked.body or b""
    if (
        asked.headers.get("Content-Type", "")
        .lower()
        .startswith("application/x-www-form-urlencoded")
    ):
        # As Latin-1 every byte is kept, whatever the text's encoding.
        form = parse_qs(body.decode("latin-1"), encoding="latin-1", max_num_fields=100)
        return form.get("d", [""])[0].encode("latin-1")
    return body
