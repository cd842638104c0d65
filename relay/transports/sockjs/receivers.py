"""What takes a session's frames to the browser: a stream, a poll or a websocket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

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
    client of an EventSource or a frame sees no such difference.
    """

    __slots__ = ("_cut_short", "_finishing", "_framing", "_left_bytes", "over", "session")

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
        """`length_bytes` is what follows the head and the prelude."""
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper, heartbeat=heartbeat)
        self.session: SockJsSession | None = session
        self.over = False
        self._framing = framing
        self._left_bytes = length_bytes
        self._finishing = False
        self._cut_short = False
        self.on_full = session.receiver_full
        self.on_drained = session.receiver_drained

    def send(self, frame: bytes) -> bool:
        """See `Receiver`."""
        return self._send(self._framing.wrap(frame))

    def send_messages(self, elements: bytes) -> bool:
        """See `Receiver`."""
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

    def write(self, data: bytes) -> None:
        """Send a heartbeat, which counts as a part of the response."""
        self._send(data)
        if self.over and self.session is not None:
            self.session.receiver_over(self)

    def _complete(self) -> None:
        """Fill the response up to its declared length with a heartbeat frame, and end it."""
        if self._left_bytes:
            super().write(b"h" * (self._left_bytes - 1) + b"\n")
        self._left_bytes = None
        self.over = True
        self.end()

    def leave(self) -> None:
        """See `ClientSocket`: the session goes on elsewhere if its client can tell."""
        session = self.session
        if self.closing or session is None:
            return
        if self._left_bytes is None:
            session.close()
        else:
            self._complete()
            session.receiver_over(self)

    def end(self) -> None:
        """See `Receiver`."""
        self._finishing = True
        self.close()

    def refuse(self, frame: bytes) -> None:
        """See `Receiver`."""
        self.session = None
        super().write(self._framing.wrap(frame))
        self.close()

    def abort(self) -> None:
        """See `ClientSocket`."""
        self._cut_short = True
        super().abort()

    def _hang_up(self, transport: asyncio.Transport, *, said_goodbye: bool) -> None:
        # After a close frame the client hangs up. A proxy would report a response that is shorter
        # than its declared length.
        if self._left_bytes is None:
            super()._hang_up(transport, said_goodbye=said_goodbye)

    def data_received(self, data: bytes) -> None:
        """The next request, sent too early: it is sent again when this connection has closed."""

    def connection_lost(self, exc: Exception | None) -> None:
        """See `ClientSocket`."""
        super().connection_lost(exc)
        session, self.session = self.session, None
        if session is not None:
            whole = self._finishing and exc is None and not self._cut_short
            session.receiver_lost(self, whole=whole)


class PollReceiver(HeldRequest):
    """A request that one frame answers (xhr, jsonp)."""

    __slots__ = ("_exchange", "_framing", "_headers", "_waiting", "over", "session")

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
        """`waiting` calls `beat` for those that have waited for long."""
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper)
        self.session: SockJsSession | None = session
        self.over = False
        # Until `wait`: what comes before it is the answer at once.
        self._exchange: Exchange | None = exchange
        self._framing = framing
        self._headers = headers
        self._waiting = waiting

    def wait(self) -> None:
        """Nothing was there to be sent."""
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        if self._waiting is not None:
            self._waiting.add(self)
        exchange.hold(self)

    def leave(self) -> None:
        """See `ClientSocket`: as if it had waited for long."""
        self.beat()

    def beat(self) -> None:
        """So that nothing on the way takes the connection for dead."""
        if self.session is not None:
            self.session.beat(self)

    def send(self, frame: bytes) -> bool:
        """See `Receiver`."""
        self._answer(self._framing.wrap(frame))
        return True

    def send_messages(self, elements: bytes) -> bool:
        """See `Receiver`."""
        self._answer(self._framing.messages(elements))
        return True

    def _answer(self, body: bytes) -> None:
        self.over = True
        self.session = None
        answer = HttpAnswer(200, body, self._headers)
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.answer(answer)
        else:
            self._no_beat()
            self.finish(answer)

    def end(self) -> None:
        """See `Receiver`: one frame has been the end."""

    def refuse(self, frame: bytes) -> None:
        """See `Receiver`."""
        self.send(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `ClientSocket`."""
        super().connection_lost(exc)
        self._no_beat()
        session, self.session = self.session, None
        if session is not None:
            session.receiver_lost(self, whole=False)

    def _no_beat(self) -> None:
        if self._waiting is not None:
            self._waiting.remove(self)


class WebSocketReceiver(WebSocketConnection):
    """A websocket with SockJS frames, for the whole of its session."""

    __slots__ = ("_ending", "_framing", "over", "session")

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
        self.over = False
        self._framing = framing
        self._ending = False
        self.on_full = session.receiver_full
        self.on_drained = session.receiver_drained
        self.on_text = self._on_frame

    def _on_frame(self, frame: bytes) -> None:
        if not frame or self.session is None:
            # "Empty frames must be ignored", sockjs-protocol.
            return
        try:
            texts = parse_messages(frame)
        except BadFrame:
            # "The server must abruptly terminate the ws connection", sockjs-protocol.
            self.abort()
            return
        self.session.messages(texts)

    def send(self, frame: bytes) -> bool:
        """See `Receiver`."""
        self.write(self._framing.wrap(frame))
        return True

    def send_messages(self, elements: bytes) -> bool:
        """See `Receiver`."""
        self.write(self._framing.messages(elements))
        return True

    def end(self) -> None:
        """See `Receiver`."""
        self._ending = True
        self.close(frame_close(1000))

    def refuse(self, frame: bytes) -> None:
        """See `Receiver`."""
        self.send(frame)
        self.end()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `ClientSocket`."""
        super().connection_lost(exc)
        session, self.session = self.session, None
        if session is not None:
            session.receiver_lost(self, whole=self._ending)

    def _on_violation(self, violation: ProtocolViolation) -> None:
        if violation.code == _TOO_BIG and self.session is not None:
            # The owner may have its own words for that, and they come first.
            self.session.on_oversized()
        super()._on_violation(violation)
