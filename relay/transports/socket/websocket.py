"""Server side of WebSocket (RFC 6455): encoding of frames, handshake and connection.

Frames from a server are not masked, so all clients can share one encoded frame. Compression is
optional and has no context takeover, so compressed frames can be shared too
(`relay.transports.socket.deflate`).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiohttp import web
from typing_extensions import override

from relay.core.reasons import Reason
from relay.transports.socket import deflate
from relay.transports.socket.client_socket import ClientSocket
from relay.transports.socket.frames import (
    BINARY,
    CLOSE,
    COMPRESSED,
    PING_OPCODE,
    PONG,
    TEXT,
    TOO_LARGE,
    FrameReader,
    unmask,
)
from relay.transports.socket.frames import ProtocolViolation as ProtocolViolation
from relay.transports.socket.read_pace import LARGE_READ_BYTES, read_later

if TYPE_CHECKING:
    from relay.transports.socket.exchange import HttpRequest
    from relay.transports.socket.heartbeat import Heartbeat
    from relay.transports.socket.reaper import Reaper

# RFC 6455 section 1.3: appended to the client's key before hashing.
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def _frame(opcode: int, payload: bytes, bits: int = 0) -> bytes:
    size, first = len(payload), 0x80 | bits | opcode
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65536:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


def frame_text(payload: bytes) -> bytes:
    """Encode a text message, which must be UTF-8."""
    return _frame(TEXT, payload)


def frame_compressed(payload: bytes, level: int = 1) -> bytes:
    """Encode a text message for clients with permessage-deflate."""
    return _frame(TEXT, deflate.deflate(payload, level), COMPRESSED)


def frame_ping(payload: bytes) -> bytes:
    """Encode a ping. The pong has the same payload."""
    return _frame(PING_OPCODE, payload)


def frame_binary(payload: bytes) -> bytes:
    """Encode a binary message."""
    return _frame(BINARY, payload)


def frame_close(code: int, reason: str = "") -> bytes:
    """Encode a close frame. The reason is truncated to fit a control frame (section 5.5)."""
    text = reason.encode()[:123].decode(errors="ignore").encode()
    return _frame(CLOSE, struct.pack("!H", code) + text)


def frame_pong(payload: bytes) -> bytes:
    """Encode a pong with the payload of the ping."""
    return _frame(PONG, payload)


PING = _frame(PING_OPCODE, b"")
_EMPTY_PONG = _frame(PONG, b"")
# First byte of a client's ping, and the size of its head with length and mask.
_PING_HEAD, _PING_HEAD_BYTES = 0x89, 6
# Number of control frames and empty fragments that a client may send within this time. The busiest
# real clients, Seafile's, send one ping per second.
_IDLE_FRAMES, _IDLE_FRAMES_S = 100, 2.0
_POLICY_VIOLATION, _TRY_AGAIN_LATER = 1008, 1013
# Section 7.1.5: the close frame had no code.
_NO_CODE = 1005
# Incomplete messages up to this size are not counted (`relay.transports.socket.bodies`).
_LARGE_BYTES = 65536


def _tokens(request: web.Request | HttpRequest, name: str) -> set[str]:
    return {
        part.strip().lower()
        for value in request.headers.getall(name, ())
        for part in value.split(",")
    }


def subprotocols(request: web.Request | HttpRequest) -> list[str]:
    """Return the subprotocols that a client offers, in its order."""
    return [
        part.strip()
        for value in request.headers.getall("Sec-WebSocket-Protocol", ())
        for part in value.split(",")
    ]


def accept_headers(
    request: web.Request | HttpRequest,
    versions: frozenset[str] = frozenset({"13"}),
    *,
    compress: bool = False,
    subprotocol: str = "",
) -> bytes | web.Response:
    """Return the 101 response head for a valid handshake (section 4.2), or an error response.

    Protocols may add version 8 to `versions`: its frames are the same (hybi-08 to -12). With
    `compress`, permessage-deflate is accepted. The caller must check that the client offers it.
    `subprotocol` is selected if the client offers it; browsers close the connection if none is.
    """
    if (
        request.method != "GET"
        or request.version < (1, 1)
        or "websocket" not in _tokens(request, "Upgrade")
        or "upgrade" not in _tokens(request, "Connection")
    ):
        return _upgrade_required("this address requires a WebSocket client")
    if request.headers.get("Sec-WebSocket-Version", "").strip() not in versions:
        return _upgrade_required("websocket version 13 is required")
    key = request.headers.get("Sec-WebSocket-Key", "").strip()
    try:
        nonce = base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):
        nonce = b""
    if len(nonce) != 16:
        return web.Response(status=400, text="Sec-WebSocket-Key must be 16 bytes in base64\n")
    # Required by section 4.2.2. It has no security purpose.
    digest = hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()
    selected = subprotocol and subprotocol in subprotocols(request)
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: "
        + base64.b64encode(digest)
        + (b"\r\nSec-WebSocket-Protocol: %b" % subprotocol.encode() if selected else b"")
        + (b"\r\nSec-WebSocket-Extensions: " + deflate.AGREED if compress else b"")
        + b"\r\n\r\n"
    )


def _upgrade_required(text: str) -> web.Response:
    # Upgrade is required by RFC 9110 section 15.5.22, the version by RFC 6455 section 4.4.
    return web.Response(
        status=426,
        text=text + "\n",
        headers={"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"},
    )


def _ignore(text: bytes) -> None:
    """Default callback: ignore the message."""


class WebSocketConnection(ClientSocket):
    """A WebSocket client. Text messages are passed to `on_text`.

    `write` and `close` take encoded frames. If the last bytes of `close` end with a close frame,
    the client's close frame is awaited. Without `on_binary`, a binary message closes the connection
    with 1003. Too many control frames or empty fragments close it with 1008. `close_received` is
    True after the client has sent a close frame.
    """

    __slots__ = (
        "_counted",
        "_idle_allowed",
        "_idle_since",
        "_ignores_input",
        "_pong",
        "_pong_counts",
        "_read_scheduled",
        "_reader",
        "_reads_later",
        "close_received",
        "on_binary",
        "on_text",
        "on_too_large",
    )

    def __init__(
        self,
        *,
        buffer_bytes: int,
        max_frame_bytes: int,
        reaper: Reaper,
        heartbeat: Heartbeat | None = None,
        skip_bytes: int = 0,
        compressed: bool = False,
        only_pong_counts: bool = False,
        lenient: bool = False,
    ) -> None:
        """`skip_bytes` is the size of the data before the first frame (see `FrameReader`).

        `compressed` is True if permessage-deflate has been negotiated. With `only_pong_counts`, no
        other frame counts as a response to the heartbeat. With `lenient`, text messages may be any
        bytes, and a message that is too large is dropped, with a call of `on_too_large`, instead of
        closing the connection.
        """
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper, heartbeat=heartbeat)
        self._reader = FrameReader(
            max_frame_bytes, skip_bytes, compressed=compressed, lenient=lenient
        )
        self._pong_counts = only_pong_counts
        self._pong: bytes | None = None
        self._ignores_input = self._read_scheduled = False
        # Reading is paused until it is this connection's turn (see `read_pace`).
        self._reads_later = False
        # Whether `bodies` counts an incomplete message of this client.
        self._counted = False
        # The value of `idle_frames` at which their rate is checked.
        self._idle_allowed = _IDLE_FRAMES
        self._idle_since = time.monotonic()
        self.close_received = False
        self.on_text: Callable[[bytes], None] = _ignore
        self.on_binary: Callable[[bytes], None] | None = None
        self.on_too_large: Callable[[], None] | None = None

    @property
    @override
    def transport_name(self) -> str:
        return "websocket"

    def limit_messages(self, max_bytes: int) -> None:
        """Change the maximum size of the client's messages."""
        self._reader.max_bytes = max_bytes

    def count_idle_message(self) -> None:
        """Limit the rate of a message without effect, as that of a control frame."""
        self._reader.idle_frames += 1

    def close_with(self, code: int, reason: str = "") -> None:
        """Close with a code and a reason."""
        self.close(frame_close(code, reason))

    @override
    def data_received(self, data: bytes) -> None:
        if not self._pong_counts:
            self.silent_since = 0
        if len(data) >= LARGE_READ_BYTES:
            self._wait_for_turn()
        if self._ignores_input:
            return
        # Fast path for a single ping, because thousands of clients may ping every second.
        size = len(data) - _PING_HEAD_BYTES
        if (
            0 <= size <= 125
            and data[0] == _PING_HEAD
            and data[1] == 0x80 | size
            and self._reader.at_frame_start
            and not self.closing
        ):
            self._reader.idle_frames += 1
            if self._reader.idle_frames <= self._idle_allowed or self._rate_is_acceptable():
                self._answer([unmask(data[6:], data[2:6]) if size else b""])
            return
        self._read(data)

    def _wait_for_turn(self) -> None:
        transport = self._transport
        if not self._reads_later and transport is not None and not transport.is_closing():
            self._reads_later = True
            transport.pause_reading()
            read_later(self._read_on)

    def _read_on(self) -> None:
        self._reads_later = False
        if self._ignores_input or not (self._reader.more or self._reading_paused):
            super().resume_reading()

    def _read(self, data: bytes) -> None:
        violation = None
        try:
            found = self._reader.feed(data)
        except ProtocolViolation as exc:
            found, violation = exc.before, exc
        if self._counted or self._reader.held_bytes > _LARGE_BYTES:
            self._count()
        if self._reader.idle_frames > self._idle_allowed and not self._rate_is_acceptable():
            return
        pings: list[bytes] = []
        for opcode, payload in found:
            if opcode == PING_OPCODE:
                pings.append(payload)
                continue
            if pings:
                # A message may close the connection, so write pongs before it.
                self._answer(pings)
                pings = []
            if opcode == CLOSE:
                self._on_close(payload)
                return
            if self.closing:
                continue
            if opcode == TEXT:
                self.on_text(payload)
            elif opcode == PONG:
                self.silent_since = 0
            elif opcode == TOO_LARGE:
                if self.on_too_large is not None:
                    self.on_too_large()
            elif opcode == BINARY:
                if self.on_binary is None:
                    self.close_with(1003, "text only")
                else:
                    self.on_binary(payload)
        if pings:
            self._answer(pings)
        if violation is not None:
            self._on_violation(violation)
        elif self._reader.more:
            self._read_later(slowly=self._reader.has_tiny)
        elif self._reader.has_tiny:
            self._wait_for_turn()

    def _count(self) -> None:
        """Count an incomplete message among what this worker holds for all peers."""
        held = self._reader.held_bytes
        self._counted = held > _LARGE_BYTES
        if self.bodies is None:
            return
        if self._counted:
            self.bodies.hold(self, held, self._reject_message)
        else:
            self.bodies.release(self)

    def _reject_message(self) -> None:
        self._counted = False
        self._reader.drop()
        if not self.closing:
            self._on_violation(ProtocolViolation(_TRY_AGAIN_LATER, "too many large messages"))

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._counted and self.bodies is not None:
            self.bodies.release(self)
        super().connection_lost(exc)

    def _read_later(self, *, slowly: bool = False) -> None:
        """Parse the rest of the received data in another turn of the event loop.

        `slowly`: at the common pace of all clients (`read_pace`). A megabyte in tiny fragments
        would keep the worker busy for a long time.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self.closing:
            # A client that sends this much data does not wait for the close frame.
            self._ignores_input = True
            return
        transport.pause_reading()
        if not self._read_scheduled:
            self._read_scheduled = True
            if slowly:
                read_later(self._continue_reading)
            else:
                asyncio.get_running_loop().call_soon(self._continue_reading)

    def _continue_reading(self) -> None:
        self._read_scheduled = False
        # If the owner has paused reading in the meantime, `resume_reading` continues.
        if self._reading_paused or not self._reader.more:
            return
        try:
            self._read(b"")
        except BaseException:
            # The loop does the same if `data_received` fails.
            self.abort()
            raise
        if not self._reads_later:
            self._read_on()

    @override
    def resume_reading(self) -> None:
        # Parse the data that has been received before reading from the socket.
        self._reading_paused = False
        if self._reader.more and not self._ignores_input:
            self._read_later()
        elif not self._reads_later:
            super().resume_reading()

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        if self._pong is not None:
            pong, self._pong = self._pong, None
            self._answer([pong])

    def _answer(self, pings: list[bytes]) -> None:
        self.pinged = True
        if self.closing:
            return
        # Section 5.5.3 allows a pong for the latest ping only, so pings cannot fill the memory.
        if self.full:
            self._pong = pings[-1]
        else:
            pongs = [frame_pong(payload) if payload else _EMPTY_PONG for payload in pings]
            self.write(pongs[0] if len(pongs) == 1 else b"".join(pongs))

    def _rate_is_acceptable(self) -> bool:
        """Return True if the rate of control frames is acceptable. Otherwise close."""
        now = time.monotonic()
        if now - self._idle_since >= _IDLE_FRAMES_S:
            self._idle_since = now
            self._idle_allowed = self._reader.idle_frames + _IDLE_FRAMES
            return True
        self._on_violation(ProtocolViolation(_POLICY_VIOLATION, "too many control frames"))
        return False

    def _on_close(self, payload: bytes) -> None:
        self._ignores_input = self.close_received = True
        self.close_code = int.from_bytes(payload[:2]) if len(payload) > 1 else _NO_CODE
        transport = self._transport
        # Both sides have sent a close frame, so the server closes the connection (section 7.1.1).
        if not self.closing:
            self.write(_frame(CLOSE, payload[:2]))
            self.close()
        elif transport is not None:
            transport.close()

    def _on_violation(self, violation: ProtocolViolation) -> None:
        self._ignores_input = True
        self.ending = self.ending or Reason.BAD_MESSAGE
        self.close_with(violation.code, violation.reason)
        transport = self._transport
        # The rest of the input cannot be parsed. Closing with unread input would reset the
        # connection, and the client might not receive the close frame. So close the sending side
        # only, and drop what arrives until the client disconnects.
        if transport is not None and not transport.is_closing():
            if transport.can_write_eof():
                transport.write_eof()
            else:
                transport.close()

    @override
    def _finish_closing(self, transport: asyncio.Transport, *, close_frame_sent: bool) -> None:
        if not close_frame_sent:
            transport.close()

    @override
    def _clear_callbacks(self) -> None:
        super()._clear_callbacks()
        self.on_text = _ignore
        self.on_binary = self.on_too_large = None
