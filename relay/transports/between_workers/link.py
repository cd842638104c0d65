"""The two ends of one client's connection between two workers.

`NearEnd` has the client's socket. `RemoteTransport` stands in for that socket where the session
is: whatever owns a client's socket works on it unchanged. What is under way between them is
bounded both ways: each end says how much of what it got has gone on.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from relay.transports.socket.client_socket import ClientSocket
from relay.transports.socket.exchange import HeldRequest

if TYPE_CHECKING:
    from relay.transports.socket.reaper import Reaper

# What a client may send ahead of its session's worker.
_INPUT_BYTES = 65536
# What may be under way to one client, whatever its session's own limit: Redis drops a subscriber
# that it holds 32 MB for (client-output-buffer-limit pubsub), and with it everybody's messages.
_OUTPUT_BYTES = 262_144
_TAKEN = struct.Struct("!?I")
_SIZE = struct.Struct("!I")


class Kind(IntEnum):
    """A message's kind. Upper half: from the session's worker."""

    ASK = 1
    DATA = 2
    CREDIT_FAR = 3
    GONE = 4
    CLOSED = 5
    PROBE_NEAR = 6
    PROBE_FAR = 7
    LEAVE = 8

    ANSWER = 16
    HOLD = 17
    TAKE = 18
    UNKNOWN = 19
    WRITE = 20
    CREDIT_NEAR = 21
    FINISH = 22
    CLOSE = 23
    CUT = 24


class Link:
    """One connection between two workers, as one of them counts it."""

    __slots__ = ("_send", "number", "peer", "received", "sent")

    def __init__(
        self, number: int, peer: str, send: Callable[[Link, Kind, bytes], asyncio.Future[bool]]
    ) -> None:
        self.number = number
        self.peer = peer
        self.sent = 0
        self.received = 0
        self._send = send

    def send(self, kind: Kind, payload: bytes = b"") -> asyncio.Future[bool]:
        """One message, in order."""
        self.sent += 1
        return self._send(self, kind, payload)

    def tell(self, kind: Kind, payload: bytes = b"") -> None:
        """As `send`; if it is lost, the count will show."""
        self.send(kind, payload).add_done_callback(_swallow)


def _swallow(sent: asyncio.Future[bool]) -> None:
    if not sent.cancelled():
        sent.exception()


class NearEnd(HeldRequest):
    """The client's socket, on the worker that read its request.

    `answered` is set by the owner's first message, which is `first`, or by the end of the link.
    """

    __slots__ = (
        "_credit_bytes",
        "_cut_short",
        "_duplex",
        "_in_flight",
        "_on_over",
        "_over",
        "_owed",
        "_waiting",
        "answered",
        "first",
        "link",
    )

    def __init__(
        self,
        *,
        link: Link,
        buffer_bytes: int,
        reaper: Reaper,
        on_over: Callable[[NearEnd], None],
    ) -> None:
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper)
        self.link = link
        self.answered = asyncio.Event()
        self.first: tuple[Kind, bytes] = (Kind.CUT, b"")
        self._on_over = on_over
        self._over = False
        self._cut_short = False
        self._duplex = False
        self._credit_bytes = 1
        # What the client has been written and the owner not been told of; what the client has
        # sent and the owner not confirmed.
        self._owed = 0
        self._in_flight = 0
        # What the owner sent before the socket was here.
        self._waiting: list[tuple[Kind, bytes]] = []

    # ---- from the owner -------------------------------------------------------------------------

    def on_message(self, kind: Kind, payload: bytes) -> None:
        """The next message of the link."""
        if not self.answered.is_set():
            self.first = kind, payload
            if kind is Kind.TAKE or kind is Kind.HOLD:
                self._duplex, self._credit_bytes = _TAKEN.unpack(payload)
            else:
                self._end()
            self.answered.set()
        elif self._transport is None:
            self._waiting.append((kind, payload))
        else:
            self._obey(kind, payload)

    def _obey(self, kind: Kind, payload: bytes) -> None:
        match kind:
            case Kind.WRITE:
                self.write(payload)
                self._owed += len(payload)
                self._settle()
            case Kind.CREDIT_NEAR:
                (size,) = _SIZE.unpack(payload)
                self._in_flight -= size
                if self._transport is not None and self._in_flight <= _INPUT_BYTES // 2:
                    self._transport.resume_reading()
            case Kind.FINISH:
                self._end()
                self.finish_raw(payload)
            case Kind.CLOSE:
                self.close()
            case _:
                self._end()
                self.abort()

    def cut(self) -> None:
        """Something on the way is lost: so is the connection."""
        self.give_up()
        self.answered.set()
        self.abort()

    def on_worker_stop(self) -> None:
        """This worker stops: the owner is asked to let the client come again elsewhere."""
        if not self._over:
            self.link.tell(Kind.LEAVE)

    def give_up(self) -> None:
        """Tell the owner that the client is gone, if it has to be told."""
        if not self._over:
            self.link.tell(Kind.GONE)
        self._end()

    # ---- from the client ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is here: what the owner has sent goes out."""
        super().connection_made(transport)
        waiting, self._waiting = self._waiting, []
        for kind, payload in waiting:
            self._obey(kind, payload)
        if self._over and not self.closing:
            self.abort()

    def data_received(self, data: bytes) -> None:
        """For the owner, where the connection is a websocket."""
        if not self._duplex:
            super().data_received(data)
            return
        self.link.tell(Kind.DATA, data)
        self._in_flight += len(data)
        if self._in_flight > _INPUT_BYTES and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The client takes more."""
        super().resume_writing()
        self._settle()

    def abort(self) -> None:
        """See `ClientSocket`. What has not been flushed is lost, and the owner will know."""
        self._cut_short = True
        super().abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or the owner's last bytes are out."""
        if not self._over:
            # Closed by the owner's wish, or because the client has finished: what was to go out has
            # gone in both cases.
            was_here = self._transport is not None
            whole = was_here and self.closing and exc is None and not self._cut_short
            self.link.tell(Kind.CLOSED if whole else Kind.GONE)
        self._end()
        super().connection_lost(exc)

    def _settle(self) -> None:
        # Not while the client is full: what it has not taken counts as being on the way.
        if self._owed >= self._credit_bytes and not self.full and not self._over:
            self.link.tell(Kind.CREDIT_FAR, _SIZE.pack(self._owed))
            self._owed = 0

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._on_over(self)


class RemoteTransport(asyncio.Transport):
    """The client's socket in the eyes of its owner, on another worker.

    As with a socket, `connection_lost` follows `close` once everything has been written there.
    """

    def __init__(self, link: Link, peer: str, on_over: Callable[[RemoteTransport], None]) -> None:
        super().__init__({"peername": (peer, 0)} if peer else {})
        self.link = link
        self._on_over = on_over
        self._protocol: asyncio.Protocol | None = None
        self._begin: tuple[Kind, bool] | None = None
        self._closing = False
        self._over = False
        self._paused = False
        self._high, self._low = 65536, 16384
        # Written and not confirmed; read and not confirmed.
        self._in_flight = 0
        self._owed = 0
        # What came while the owner did not want to read; bounded by what is not confirmed.
        self._reading = True
        self._unread: list[bytes] = []

    def begin(self, kind: Kind, protocol: asyncio.Protocol, *, duplex: bool = False) -> None:
        """Give the connection to `protocol`, and tell the asker what it is for."""
        self._protocol = protocol
        self._begin = kind, duplex
        protocol.connection_made(self)
        self._tell_begin()

    def _tell_begin(self) -> None:
        if self._begin is not None:
            (kind, duplex), self._begin = self._begin, None
            # So often that an owner that waits for `low` is told in time.
            self.link.tell(kind, _TAKEN.pack(duplex, max(1, self._low // 2)))

    def _tell(self, kind: Kind, payload: bytes = b"") -> None:
        self._tell_begin()
        self.link.tell(kind, payload)

    # ---- from the asker -------------------------------------------------------------------------

    def on_message(self, kind: Kind, payload: bytes) -> None:
        """The next message of the link."""
        if self._over or self._protocol is None:
            return
        match kind:
            case Kind.CREDIT_FAR:
                (size,) = _SIZE.unpack(payload)
                self._in_flight -= size
                if self._paused and self._in_flight <= self._low:
                    self._paused = False
                    self._protocol.resume_writing()
            case Kind.DATA:
                self._unread.append(payload)
                self._read()
            case Kind.LEAVE:
                if isinstance(self._protocol, ClientSocket):
                    self._protocol.on_worker_stop()
            case _:
                self._end(None if kind is Kind.CLOSED else ConnectionResetError())

    def _read(self) -> None:
        while self._reading and self._unread and self._protocol is not None:
            data = self._unread.pop(0)
            self._owed += len(data)
            self._protocol.data_received(data)
        if self._owed >= _INPUT_BYTES // 4 and not self._over:
            self._tell(Kind.CREDIT_NEAR, _SIZE.pack(self._owed))
            self._owed = 0

    def cut(self) -> None:
        """Something on the way is lost: so is the connection."""
        if not self._over:
            self._tell(Kind.CUT)
            self._end(ConnectionResetError())

    def _end(self, exc: Exception | None) -> None:
        if self._over:
            return
        self._over = self._closing = True
        self._on_over(self)
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            protocol.connection_lost(exc)

    # ---- for the owner (asyncio.Transport) ------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """See `asyncio.WriteTransport`."""
        if self._closing or not data:
            return
        self._tell(Kind.WRITE, bytes(data))
        self._in_flight += len(data)
        if self._in_flight > self._high and not self._paused and self._protocol is not None:
            self._paused = True
            self._protocol.pause_writing()

    def close(self) -> None:
        """See `asyncio.BaseTransport`."""
        if not self._closing:
            self._closing = True
            self._tell(Kind.CLOSE)

    def abort(self) -> None:
        """See `asyncio.WriteTransport`."""
        if not self._over:
            self._closing = True
            self._tell(Kind.CUT)
            asyncio.get_running_loop().call_soon(self._end, None)

    def finish(self, answer: bytes) -> None:
        """The answer is whole with these bytes; the owner has nothing more to do with it."""
        if not self._closing:
            self._tell(Kind.FINISH, answer)
            self._protocol = None
            self._end(None)

    def pause_reading(self) -> None:
        """See `asyncio.ReadTransport`."""
        self._reading = False

    def resume_reading(self) -> None:
        """See `asyncio.ReadTransport`."""
        self._reading = True
        self._read()

    def is_closing(self) -> bool:
        """See `asyncio.BaseTransport`."""
        return self._closing

    def can_write_eof(self) -> bool:
        """No: an end of file is not handed over."""
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """See `asyncio.WriteTransport`. To be called before anything is written."""
        self._high = min(_OUTPUT_BYTES, 65536 if high is None else high)
        self._low = min(self._high, self._high // 4 if low is None else low)

    def get_write_buffer_size(self) -> int:
        """See `asyncio.WriteTransport`: what the client's worker has not confirmed."""
        return self._in_flight

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Not on this kind: a connection keeps its owner."""
        raise NotImplementedError


def give_back(transport: asyncio.Transport, answer: bytes, early: bytes) -> None:
    """For `HeldRequest.returns`: what came early is where the client's socket is."""
    del early
    if isinstance(transport, RemoteTransport):
        transport.finish(answer)
