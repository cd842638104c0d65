"""One SockJS session over a sequence of receivers. Performs no I/O.

The hub and the protocol use it like a WebSocket: an outbox and callbacks. Between two receivers
(polls, or reconnects of a stream) it buffers messages.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from relay.transports.sockjs.frames import GO_AWAY, HEARTBEAT, OPEN, STILL_OPEN, close_frame

if TYPE_CHECKING:
    import asyncio

    from relay.core.connection import ConnectionInfo
    from relay.core.reasons import Reason
    from relay.transports.socket.deadlines import Deadlines


class Receiver(Protocol):
    """The HTTP response or WebSocket that currently carries frames to the browser."""

    # More than the limit waits in the receiver's send buffer.
    full: bool
    # The receiver accepts no more frames: an answered poll, or a stream at its size limit.
    finished: bool

    @property
    def carrier(self) -> asyncio.Transport | None:
        """The connection. It may still carry the last frames when `finished` is True."""

    def send(self, frame: bytes) -> bool:
        """Send one frame without messages. See `send_messages`."""

    def send_messages(self, elements: bytes) -> bool:
        """Send one frame of messages.

        Return False if the frame does not fit. Then nothing was sent and the receiver is finished.
        """

    def end(self) -> None:
        """Close after the last frame. The session's `receiver_lost` follows, unless the receiver is
        finished at once."""

    def refuse(self, frame: bytes) -> None:
        """Send one frame and close, without further calls to the session."""

    def abort(self) -> None:
        """Close immediately."""

    def waiting_bytes(self) -> int:
        """Return the number of bytes that have not been sent."""


class SessionState(enum.Enum):
    """Life of a session."""

    OPEN = enum.auto()
    # The close frame has not been sent.
    CLOSING = enum.auto()
    # The close frame has been sent. It is sent again to each receiver until the session is removed.
    CLOSED = enum.auto()
    REMOVED = enum.auto()


_TRANSITIONS = {
    SessionState.OPEN: {SessionState.CLOSING, SessionState.REMOVED},
    SessionState.CLOSING: {SessionState.CLOSED, SessionState.REMOVED},
    SessionState.CLOSED: {SessionState.REMOVED},
    SessionState.REMOVED: set[SessionState](),
}


def _ignore() -> None:
    """Default callback."""


def _ignore_text(text: bytes) -> None:
    """Default callback for messages."""


class SockJsSession:
    """A client of any transport.

    `write` takes one or more messages encoded by `frames.element`. The messages of one call are
    sent in one frame. `full` is True while more than `buffer_bytes` wait here or in the receiver;
    writes are still accepted then.

    Callbacks:

    - `on_full` and `on_drained`: `full` has changed;
    - `on_text`: one message from the client;
    - `on_oversized`: a request was too large to be read;
    - `on_closed`: the client has disconnected or has received the close frame. It is called exactly
      once, and after `close` or `abort` it is the only callback;
    - `on_removed`: the session can be deleted.
    """

    __slots__ = (
        "_buffer_bytes",
        "_carrier",
        "_close_frame",
        "_detached",
        "_open_sent",
        "_pending",
        "_pending_bytes",
        "_receiver",
        "_state",
        "close_code",
        "ending",
        "full",
        "info",
        "on_closed",
        "on_drained",
        "on_full",
        "on_oversized",
        "on_removed",
        "on_text",
        "peer_address",
        "transport",
    )

    def __init__(
        self,
        *,
        transport: str,
        peer: str,
        info: ConnectionInfo | None = None,
        buffer_bytes: int,
        detached: Deadlines[SockJsSession] | None,
    ) -> None:
        """`detached` expires sessions without a receiver. It is None for a WebSocket's session.

        `info` describes the connection of the first request.
        """
        self.info = info
        self.close_code: int | None = None
        self.ending: Reason | None = None
        self.transport = transport
        self.peer_address = peer
        self.full = False
        self.on_text: Callable[[bytes], None] = _ignore_text
        self.on_full: Callable[[], None] = _ignore
        self.on_drained: Callable[[], None] = _ignore
        self.on_closed: Callable[[], None] = _ignore
        self.on_oversized: Callable[[], None] = _ignore
        self.on_removed: Callable[[], None] = _ignore
        self._buffer_bytes = buffer_bytes
        self._detached = detached
        self._receiver: Receiver | None = None
        self._carrier: asyncio.Transport | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._open_sent = False
        self._close_frame = b""
        self._state = SessionState.OPEN
        if detached is not None:
            detached.add(self)

    def _enter(self, state: SessionState) -> None:
        if state not in _TRANSITIONS[self._state]:
            raise RuntimeError(f"a session cannot go from {self._state} to {state}")
        self._state = state

    # ---- for the owner --------------------------------------------------------------------------

    @property
    def closing(self) -> bool:
        """Whether `close` or `abort` was called, or the client has disconnected."""
        return self._state is not SessionState.OPEN

    def write(self, data: bytes) -> None:
        """Send messages as soon as possible. Do nothing if the session is closing."""
        if self.closing or not data:
            return
        receiver = self._receiver
        if receiver is not None and not self._pending:
            sent = receiver.send_messages(data)
            if not sent:
                self._pending.append(data)
                self._pending_bytes += len(data)
            if receiver.finished:
                self._detach()
            return
        self._pending.append(data)
        self._pending_bytes += len(data)
        if self._pending_bytes > self._buffer_bytes:
            self._set_full(full=True)

    def close(self, last: bytes = b"") -> None:
        """Close with the frame `last` after all pending messages. The default is "Go away!"."""
        if self.closing:
            return
        self._enter(SessionState.CLOSING)
        self._close_frame = last or GO_AWAY
        self.full = False
        self.on_full = self.on_drained = self.on_oversized = _ignore
        self.on_text = _ignore_text
        if self._receiver is not None:
            self._send_close_frame(self._receiver)

    def close_with(self, code: int, reason: str = "") -> None:
        """Close with a code and a reason. See `close`."""
        self.close(close_frame(code, reason))

    def abort(self) -> None:
        """Close immediately without a close frame, and drop pending messages."""
        receiver = self._receiver
        self._remove()
        if receiver is not None:
            receiver.abort()

    def peer(self) -> str:
        """Return the client's address, or '' if it is unknown."""
        return self.peer_address

    @property
    def transport_name(self) -> str:
        """The way in which the client is connected, for operators."""
        return f"sockjs {self.transport}"

    def waiting_bytes(self) -> int:
        """Return the number of bytes that have not been sent."""
        return self._pending_bytes + (self._receiver.waiting_bytes() if self._receiver else 0)

    # ---- from the client ------------------------------------------------------------------------

    def messages(self, texts: list[bytes]) -> None:
        """Pass the client's messages to `on_text`, in order."""
        for text in texts:
            if self.closing:
                return
            self.on_text(text)

    def attach(self, receiver: Receiver) -> None:
        """Send pending frames to a new receiver. Refuse it if the session has one already."""
        if self._receiver is not None:
            receiver.refuse(self._close_frame or STILL_OPEN)
            return
        if self._detached is not None:
            self._detached.remove(self)
        self._receiver, self._carrier = receiver, None
        if not self._open_sent:
            self._open_sent = True
            receiver.send(OPEN)
        if self._pending and not receiver.finished:
            pending = self._pending
            joined = pending[0] if len(pending) == 1 else b"".join(pending)
            if receiver.send_messages(joined):
                self._pending, self._pending_bytes = [], 0
        if self._close_frame:
            if not receiver.finished:
                self._send_close_frame(receiver)
            else:
                self._detach()
        elif receiver.finished:
            self._detach()
        else:
            self._set_full(full=receiver.full)

    @property
    def has_receiver(self) -> bool:
        """Whether a receiver is attached, so that another one would be refused."""
        return self._receiver is not None

    @property
    def pending_bytes(self) -> int:
        """The size of the messages that wait for a receiver."""
        return self._pending_bytes

    def send_heartbeat(self, receiver: Receiver) -> None:
        """Send a heartbeat frame, so that proxies keep the idle connection open."""
        if receiver is self._receiver and not receiver.finished:
            receiver.send(HEARTBEAT)
            if receiver.finished:
                self._detach()

    def receiver_finished(self, receiver: Receiver) -> None:
        """Detach a receiver that has ended by itself. The client sends another request."""
        if receiver is self._receiver and not self._close_frame:
            self._detach()

    def receiver_full(self) -> None:
        """Report that the receiver's send buffer is full."""
        if not self.closing:
            self._set_full(full=True)

    def receiver_drained(self) -> None:
        """Report that the receiver's send buffer has room again."""
        if not self.closing:
            self._set_full(full=False)

    def receiver_lost(self, receiver: Receiver, *, complete: bool) -> None:
        """Handle the end of a receiver's connection.

        `complete` is True if all its data was sent before. Otherwise messages may be lost, so the
        session is removed and the client has to open another one.
        """
        if self._receiver is receiver and complete and self._close_frame:
            self._detach()
            self._notify_closed()
        elif self._receiver is receiver or not complete:
            if self._receiver is receiver:
                self._receiver = None
            self.abort()

    @property
    def carrier(self) -> asyncio.Transport | None:
        """The connection of the last response, which the browser may still be receiving."""
        return self._carrier

    def expire(self) -> None:
        """Remove the session, because it has had no receiver for too long."""
        self._remove()

    # ---- inner workings -------------------------------------------------------------------------

    def _set_full(self, *, full: bool) -> None:
        was, self.full = self.full, full
        if was != full:
            (self.on_full if full else self.on_drained)()

    def _detach(self) -> None:
        receiver, self._receiver = self._receiver, None
        self._carrier = receiver.carrier if receiver is not None else None
        if self._state is SessionState.REMOVED:
            return
        if self._detached is not None:
            self._detached.add(self)
        if not self._close_frame:
            self._set_full(full=self._pending_bytes > self._buffer_bytes)

    def _send_close_frame(self, receiver: Receiver) -> None:
        if not receiver.send(self._close_frame):
            # The next receiver gets it.
            self._detach()
            return
        receiver.end()
        if receiver.finished:
            self._detach()
            self._notify_closed()

    def _remove(self) -> None:
        if self._state is not SessionState.REMOVED:
            self._enter(SessionState.REMOVED)
        self._receiver = self._carrier = None
        self._pending.clear()
        self._pending_bytes = 0
        if self._detached is not None:
            self._detached.remove(self)
        on_removed, self.on_removed = self.on_removed, _ignore
        on_removed()
        self._notify_closed()

    def _notify_closed(self) -> None:
        if self._state is SessionState.CLOSING:
            self._enter(SessionState.CLOSED)
        on_closed = self.on_closed
        # Break the reference cycle with the owner. Otherwise only the garbage collector frees it.
        self.on_full = self.on_drained = self.on_closed = self.on_oversized = _ignore
        self.on_text = _ignore_text
        on_closed()
