"""One SockJS session: messages in and out, over one receiver after the other. Without I/O.

To the hub and the door it is what a websocket is: an outbox, and four callbacks. Between two
receivers (polls, or a stream's reconnects) it keeps what it is given, up to the buffer's limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from relay.transports.sockjs.frames import GO_AWAY, HEARTBEAT, OPEN, STILL_OPEN, close_frame

if TYPE_CHECKING:
    from relay.transports.socket.deadlines import Deadlines


class Receiver(Protocol):
    """What takes frames to the browser now."""

    # More than the limit waits in it.
    full: bool
    # It takes no more: a poll that has been answered, a stream that has reached its limit.
    over: bool

    def send(self, frame: bytes) -> bool:
        """Send one frame that has no messages; see `send_messages`."""

    def send_messages(self, elements: bytes) -> bool:
        """Send one frame of messages.

        Return False if the frame has no room in it. Nothing was sent then, and it is over.
        """

    def end(self) -> None:
        """Nothing follows. Its end is told to the session by `receiver_lost`, unless it is over
        at once."""

    def refuse(self, frame: bytes) -> None:
        """Send this and be done; the session hears no more of it."""

    def abort(self) -> None:
        """Cut it off."""

    def waiting_bytes(self) -> int:
        """What it still holds."""


def _nothing() -> None:
    """The callback of an owner who does not care, or does not care any more."""


def _ignore(text: bytes) -> None:
    """The callback of an owner who does not listen."""


class SockJsSession:
    """A client, whatever its transport.

    `write` takes what `frames.element` made, one or several joined; all of one call goes out as one
    frame. `full` is true while more than `buffer_bytes` wait, for a receiver or in one; writes are
    still accepted then. `on_full` and `on_drained` say when that changes. `on_text` gets each
    message of the client, `on_oversized` is told of a request that is too large to be read.
    `on_closed` is called exactly once: the client is gone, or has been told of its end; after
    `close` or `abort` it is the only callback that still comes.
    """

    __slots__ = (
        "_buffer_bytes",
        "_closed",
        "_farewell",
        "_lonely",
        "_opened",
        "_pending",
        "_pending_bytes",
        "_receiver",
        "full",
        "on_closed",
        "on_drained",
        "on_full",
        "on_gone",
        "on_oversized",
        "on_text",
        "peer_address",
        "transport",
    )

    def __init__(
        self,
        *,
        transport: str,
        peer: str,
        buffer_bytes: int,
        lonely: Deadlines[SockJsSession] | None,
    ) -> None:
        """`lonely` ends sessions that have no receiver for too long; a websocket's has one
        always."""
        self.transport = transport
        self.peer_address = peer
        self.full = False
        self.on_text: Callable[[bytes], None] = _ignore
        self.on_full: Callable[[], None] = _nothing
        self.on_drained: Callable[[], None] = _nothing
        self.on_closed: Callable[[], None] = _nothing
        self.on_oversized: Callable[[], None] = _nothing
        # Nothing of it is needed any more: for whoever keeps it by its ID.
        self.on_gone: Callable[[], None] = _nothing
        self._buffer_bytes = buffer_bytes
        self._lonely = lonely
        self._receiver: Receiver | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._opened = False
        self._farewell = b""
        self._closed = False
        if lonely is not None:
            lonely.add(self)

    # ---- for the owner --------------------------------------------------------------------------

    @property
    def closing(self) -> bool:
        """Whether `close` or `abort` was called, or the client is gone."""
        return bool(self._farewell) or self._closed

    def write(self, data: bytes) -> None:
        """Send messages as soon as the client takes them; swallowed if the session is closing."""
        if self.closing or not data:
            return
        receiver = self._receiver
        if receiver is not None and not self._pending:
            sent = receiver.send_messages(data)
            if not sent:
                self._pending.append(data)
                self._pending_bytes += len(data)
            if receiver.over:
                self._detach()
            return
        self._pending.append(data)
        self._pending_bytes += len(data)
        if self._pending_bytes > self._buffer_bytes:
            self._settle(full=True)

    def close(self, last: bytes = b"") -> None:
        """End the session with the frame `last`, after what waits; "Go away!" without one."""
        if self.closing:
            return
        self._farewell = last or GO_AWAY
        self.full = False
        self.on_full = self.on_drained = self.on_oversized = _nothing
        self.on_text = _ignore
        if self._receiver is not None:
            self._say_goodbye(self._receiver)

    def close_with(self, code: int, reason: str = "") -> None:
        """As `close`, with the frame made of a code and a reason."""
        self.close(close_frame(code, reason))

    def abort(self) -> None:
        """End it now; what waits is lost, and the client is not told."""
        receiver = self._receiver
        self._end()
        if receiver is not None:
            receiver.abort()

    def peer(self) -> str:
        """The client's address as text, '' where there is none."""
        return self.peer_address

    def waiting_bytes(self) -> int:
        """What is held for the client."""
        return self._pending_bytes + (self._receiver.waiting_bytes() if self._receiver else 0)

    # ---- from the client ------------------------------------------------------------------------

    def messages(self, texts: list[bytes]) -> None:
        """What the client has sent, in order."""
        for text in texts:
            if self.closing:
                return
            self.on_text(text)

    def attach(self, receiver: Receiver) -> None:
        """A receiver has come: it gets what waits, or the reason why it may not stay."""
        if self._receiver is not None:
            receiver.refuse(self._farewell or STILL_OPEN)
            return
        if self._lonely is not None:
            self._lonely.remove(self)
        self._receiver = receiver
        if not self._opened:
            self._opened = True
            receiver.send(OPEN)
        if self._pending and not receiver.over:
            pending = self._pending
            joined = pending[0] if len(pending) == 1 else b"".join(pending)
            if receiver.send_messages(joined):
                self._pending, self._pending_bytes = [], 0
        if self._farewell:
            if not receiver.over:
                self._say_goodbye(receiver)
            else:
                self._detach()
        elif receiver.over:
            self._detach()
        else:
            self._settle(full=receiver.full)

    @property
    def has_receiver(self) -> bool:
        """Whether a receiver is attached, so that another one would be refused."""
        return self._receiver is not None

    @property
    def pending_bytes(self) -> int:
        """The size of the messages that wait for a receiver."""
        return self._pending_bytes

    def beat(self, receiver: Receiver) -> None:
        """Nothing was sent for long: show the way that the connection lives."""
        if receiver is self._receiver and not receiver.over:
            receiver.send(HEARTBEAT)
            if receiver.over:
                self._detach()

    def receiver_over(self, receiver: Receiver) -> None:
        """The receiver has ended by itself; another will come."""
        if receiver is self._receiver and not self._farewell:
            self._detach()

    def receiver_full(self) -> None:
        """The receiver has more than it should."""
        if not self.closing:
            self._settle(full=True)

    def receiver_drained(self) -> None:
        """The receiver takes more."""
        if not self.closing:
            self._settle(full=False)

    def receiver_lost(self, receiver: Receiver, *, whole: bool) -> None:
        """A receiver's connection is gone; `whole`: after it had finished, and with all it had.

        One that broke off may have lost messages, so the session ends: its client connects anew.
        """
        if self._receiver is receiver and whole and self._farewell:
            self._detach()
            self._tell_closed()
        elif self._receiver is receiver or not whole:
            if self._receiver is receiver:
                self._receiver = None
            self.abort()

    def expire(self) -> None:
        """No receiver came for too long."""
        self._end()

    # ---- inner workings -------------------------------------------------------------------------

    def _settle(self, *, full: bool) -> None:
        was, self.full = self.full, full
        if was != full:
            (self.on_full if full else self.on_drained)()

    def _detach(self) -> None:
        self._receiver = None
        if self._closed and not self._farewell:
            return
        if self._lonely is not None:
            self._lonely.add(self)
        if not self._farewell:
            self._settle(full=self._pending_bytes > self._buffer_bytes)

    def _say_goodbye(self, receiver: Receiver) -> None:
        if not receiver.send(self._farewell):
            # The next receiver gets it.
            self._detach()
            return
        receiver.end()
        if receiver.over:
            self._detach()
            self._tell_closed()

    def _end(self) -> None:
        self._receiver = None
        self._pending.clear()
        self._pending_bytes = 0
        if self._lonely is not None:
            self._lonely.remove(self)
        on_gone, self.on_gone = self.on_gone, _nothing
        on_gone()
        self._tell_closed()

    def _tell_closed(self) -> None:
        self._closed = True
        on_closed = self.on_closed
        # They close a cycle that only the collector would free.
        self.on_full = self.on_drained = self.on_closed = self.on_oversized = _nothing
        self.on_text = _ignore
        on_closed()
