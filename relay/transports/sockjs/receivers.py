"""Receivers carry a session's frames to the browser: streams, polls and WebSockets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from typing_extensions import override

from relay.transports.socket.client_socket import ClientSocket
from relay.transports.socket.exchange import Exchange, HeldRequest, HttpAnswer
from relay.transports.socket.websocket import ProtocolViolation, WebSocketConnection, frame_close
from relay.transports.sockjs.frames import BadFrame, Framing, parse_messages

if TYPE_CHECKING:
    import asyncio

    from relay.transports.socket.deadlines import Deadlines
    from relay.transports.socket.heartbeat import Heartbeat
    from relay.transports.socket.reaper import Reaper
    from relay.transports.sockjs.session import SockJsSession

_TOO_BIG = 1009


class StreamReceiver(ClientSocket):
    """A streamed response (xhr_streaming, eventsource, htmlfile).

    Browsers keep the whole response of an XMLHttpRequest in memory, so after `length_bytes` the
    client must ask for another one. The messages at its end count as received only because the
    client sees a difference between a complete response and a broken one: the response has a
    declared length. Without `length_bytes` the session ends with its only response, because the
    client of an EventSource, of a frame or in Node sees no such difference.
    """

    __slots__ = ("_cut_short", "_finishing", "_framing", "_left_bytes", "finished", "session")

    def __init__(
        self,
        *,
        session: SockJsSession,
        framing: Framing,
        length_bytes: int | None,
        buffer_bytes: int,
        reaper: Reaper,
        heartbeat: Heartbeat | None,
    ) -> None:
        """`length_bytes` is the size of the data after the head and the prelude."""
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper, heartbeat=heartbeat)
        self.session: SockJsSession | None = session
        self.finished = False
        self._framing = framing
        self._left_bytes = length_bytes
        self._finishing = False
        self._cut_short = False
        self.on_full = session.receiver_full
        self.on_drained = session.receiver_drained

    def send(self, frame: bytes) -> bool:
        """Send one frame without messages."""
        return self._send(self._framing.wrap(frame))

    def send_messages(self, elements: bytes) -> bool:
        """Send one frame of messages."""
        return self._send(self._framing.messages(elements))

    def _send(self, data: bytes) -> bool:
        left = self._left_bytes
        if left is None or self.closing:
            super().write(data)
            return True
        if len(data) > left:
            self._complete()
            return False
        super().write(data)
        self._left_bytes = left - len(data)
        if not self._left_bytes:
            self._complete()
        return True

    @override
    def write(self, data: bytes) -> None:
        """Send a heartbeat. It counts towards the response's length."""
        self._send(data)
        if self.finished and self.session is not None:
            self.session.receiver_finished(self)

    def _complete(self) -> None:
        """Fill the response up to its declared length with a heartbeat frame, and end it."""
        if self._left_bytes:
            super().write(b"h" * (self._left_bytes - 1) + b"\n")
        self._left_bytes = None
        self.finished = True
        self.end()

    def end(self) -> None:
        """Close after the last frame."""
        self._finishing = True
        self.close()

    def refuse(self, frame: bytes) -> None:
        """Send one frame and close."""
        self.session = None
        super().write(self._framing.wrap(frame))
        self.close()

    @override
    def abort(self) -> None:
        self._cut_short = True
        super().abort()

    @override
    def _finish_closing(self, transport: asyncio.Transport, *, close_frame_sent: bool) -> None:
        # After a close frame the client closes the connection. If relay closed it, a proxy would
        # report a response that is shorter than its declared length.
        if self._left_bytes is None:
            super()._finish_closing(transport, close_frame_sent=close_frame_sent)

    def data_received(self, data: bytes) -> None:
        """Ignore an early request. The client repeats it when this connection has closed."""

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        session, self.session = self.session, None
        if session is not None:
            complete = self._finishing and exc is None and not self._cut_short
            session.receiver_lost(self, complete=complete)


class PollReceiver(HeldRequest):
    """A request that is answered with one frame (xhr, jsonp)."""

    __slots__ = ("_exchange", "_framing", "_headers", "_sent_on", "_waiting", "finished", "session")

    def __init__(
        self,
        *,
        session: SockJsSession,
        exchange: Exchange,
        framing: Framing,
        headers: Mapping[str, str],
        waiting: Deadlines[PollReceiver] | None,
        buffer_bytes: int,
        reaper: Reaper,
    ) -> None:
        """`waiting` calls `send_heartbeat` for requests that have waited for long."""
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper)
        self.session: SockJsSession | None = session
        self.finished = False
        # The connection outlives this object.
        self._sent_on = exchange.transport
        # None after `wait`. A frame before that is sent as the immediate answer.
        self._exchange: Exchange | None = exchange
        self._framing = framing
        self._headers = headers
        self._waiting = waiting

    @property
    @override
    def carrier(self) -> asyncio.Transport | None:
        return self._sent_on

    def wait(self) -> None:
        """Hold the request until there is a frame."""
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        if self._waiting is not None:
            self._waiting.add(self)
        exchange.hold(self)

    def send_heartbeat(self) -> None:
        """Answer with a heartbeat frame, so that proxies keep the connection open."""
        if self.session is not None:
            self.session.send_heartbeat(self)

    def send(self, frame: bytes) -> bool:
        """Answer with one frame without messages."""
        self._answer(self._framing.wrap(frame))
        return True

    def send_messages(self, elements: bytes) -> bool:
        """Answer with one frame of messages."""
        self._answer(self._framing.messages(elements))
        return True

    def _answer(self, body: bytes) -> None:
        self.finished = True
        self.session = None
        answer = HttpAnswer(200, body, self._headers)
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.answer(answer)
        else:
            self._stop_waiting()
            self.finish(answer)

    def end(self) -> None:
        """Do nothing: the answer has been sent."""

    def refuse(self, frame: bytes) -> None:
        """Send one frame and close."""
        self.send(frame)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()
        session, self.session = self.session, None
        if session is not None:
            session.receiver_lost(self, complete=False)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.remove(self)


class WebSocketReceiver(WebSocketConnection):
    """A WebSocket, which is the only receiver of its session."""

    __slots__ = ("_ending", "_framing", "finished", "session")

    def __init__(
        self,
        *,
        session: SockJsSession,
        framing: Framing,
        buffer_bytes: int,
        max_frame_bytes: int,
        reaper: Reaper,
        heartbeat: Heartbeat | None,
    ) -> None:
        super().__init__(
            buffer_bytes=buffer_bytes,
            max_frame_bytes=max_frame_bytes,
            reaper=reaper,
            heartbeat=heartbeat,
        )
        self.session: SockJsSession | None = session
        self.finished = False
        self._framing = framing
        self._ending = False
        self.on_full = session.receiver_full
        self.on_drained = session.receiver_drained
        self.on_text = self._on_frame

    def _on_frame(self, frame: bytes) -> None:
        if not frame or self.session is None:
            # "Empty frames must be ignored", sockjs-protocol.
            self.count_idle_message()
            return
        try:
            texts = parse_messages(frame)
        except BadFrame:
            # "The server must abruptly terminate the ws connection", sockjs-protocol.
            self.abort()
            return
        if not texts:
            self.count_idle_message()
            return
        self.session.messages(texts)

    def send(self, frame: bytes) -> bool:
        """Send one frame without messages."""
        self.write(self._framing.wrap(frame))
        return True

    def send_messages(self, elements: bytes) -> bool:
        """Send one frame of messages."""
        self.write(self._framing.messages(elements))
        return True

    def end(self) -> None:
        """Close with code 1000."""
        self._ending = True
        self.close(frame_close(1000))

    def refuse(self, frame: bytes) -> None:
        """Send one frame and close."""
        self.send(frame)
        self.end()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        session, self.session = self.session, None
        if session is not None:
            session.receiver_lost(self, complete=self._ending)

    @override
    def _on_violation(self, violation: ProtocolViolation) -> None:
        if violation.code == _TOO_BIG and self.session is not None:
            # The protocol may have a close frame of its own for this.
            self.session.on_oversized()
        super()._on_violation(violation)
