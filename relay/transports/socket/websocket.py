"""Server-side websocket frames (RFC 6455) without I/O, and the connection that speaks them.

A server's frames are not masked, so one framed bytes object serves every client. Compression is
agreed on where a door wants it, and without context takeover: so a compressed frame is one more
such object (`relay.transports.socket.deflate`).
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

from relay.transports.socket import deflate
from relay.transports.socket.client_socket import ClientSocket
from relay.transports.socket.frames import (
    BINARY,
    CLOSE,
    COMPRESSED,
    PING_OPCODE,
    PONG,
    TEXT,
    FrameReader,
    unmask,
)
from relay.transports.socket.frames import ProtocolViolation as ProtocolViolation

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
    """One text message, which must be UTF-8."""
    return _frame(TEXT, payload)


def frame_compressed(payload: bytes, level: int = 1) -> bytes:
    """One text message for clients that have agreed to permessage-deflate."""
    return _frame(TEXT, deflate.deflate(payload, level), COMPRESSED)


def frame_ping(payload: bytes) -> bytes:
    """A ping; the answer has the same payload."""
    return _frame(PING_OPCODE, payload)


def frame_binary(payload: bytes) -> bytes:
    """One binary message."""
    return _frame(BINARY, payload)


def frame_close(code: int, reason: str = "") -> bytes:
    """A close frame; the reason is cut to what a control frame can carry (section 5.5)."""
    text = reason.encode()[:123].decode(errors="ignore").encode()
    return _frame(CLOSE, struct.pack("!H", code) + text)


def frame_pong(payload: bytes) -> bytes:
    """The answer to a ping: the same payload."""
    return _frame(PONG, payload)


PING = _frame(PING_OPCODE, b"")
_EMPTY_PONG = _frame(PONG, b"")
# How a client's ping begins; its length and the mask follow.
_PING_HEAD, _PING_HEAD_BYTES = 0x89, 6
# Control frames and tiny fragments that one client may send within the time. The busiest real
# clients, Seafile's, send one ping per second.
_IDLE_FRAMES, _IDLE_FRAMES_S = 100, 2.0
_POLICY_VIOLATION = 1008


def _tokens(request: web.Request | HttpRequest, name: str) -> set[str]:
    return {
        part.strip().lower()
        for value in request.headers.getall(name, ())
        for part in value.split(",")
    }


def accept_headers(
    request: web.Request | HttpRequest,
    versions: frozenset[str] = frozenset({"13"}),
    *,
    compress: bool = False,
) -> bytes | web.Response:
    """The 101 head for a valid opening handshake (section 4.2), else the answer to send instead.

    `versions` that a door may add: 8, whose frames are the same (hybi-08 to -12 are drafts of it).
    `compress`: agree to permessage-deflate; the caller has looked whether it is offered.
    """
    if (
        request.method != "GET"
        or request.version < (1, 1)
        or "websocket" not in _tokens(request, "Upgrade")
        or "upgrade" not in _tokens(request, "Connection")
    ):
        return _upgrade_required("this address speaks websocket")
    if request.headers.get("Sec-WebSocket-Version", "").strip() not in versions:
        return _upgrade_required("websocket version 13 is required")
    key = request.headers.get("Sec-WebSocket-Key", "").strip()
    try:
        nonce = base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):
        nonce = b""
    if len(nonce) != 16:
        return web.Response(status=400, text="Sec-WebSocket-Key must be 16 bytes in base64\n")
    # SHA-1 is what section 4.2.2 asks for; it guards nothing.
    digest = hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: "
        + base64.b64encode(digest)
        + (b"\r\nSec-WebSocket-Extensions: " + deflate.AGREED if compress else b"")
        + b"\r\n\r\n"
    )


def _upgrade_required(text: str) -> web.Response:
    # RFC 9110 section 15.5.22 asks for Upgrade, RFC 6455 section 4.4 for the version.
    return web.Response(
        status=426,
        text=text + "\n",
        headers={"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"},
    )


def _ignore(text: bytes) -> None:
    """The callback of an owner who does not listen."""


class WebSocketConnection(ClientSocket):
    """A websocket client: text goes to `on_text`, everything else is dealt with here.

    `write` and `close` take framed bytes; `close`'s last ones should end with a close frame, whose
    answer is then waited for. Without an `on_binary` a binary message closes with 1003. `goodbye`
    is set once the client has sent a close frame. A client that sends too many control frames or
    tiny fragments is closed with 1008.
    """

    __slots__ = (
        "_deaf",
        "_idle_allowed",
        "_idle_since",
        "_planned",
        "_pong",
        "_pong_counts",
        "_reader",
        "goodbye",
        "on_binary",
        "on_text",
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
    ) -> None:
        """`skip_bytes`: what this client sends before its first frame, see `FrameReader`.
        `compressed`: it was agreed on. `only_pong_counts`: nothing else answers the heartbeat."""
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper, heartbeat=heartbeat)
        self._reader = FrameReader(max_frame_bytes, skip_bytes, compressed=compressed)
        self._pong_counts = only_pong_counts
        self._pong: bytes | None = None
        self._deaf = self._planned = False
        # The value of `idle_frames` at which the time is looked at.
        self._idle_allowed = _IDLE_FRAMES
        self._idle_since = time.monotonic()
        self.goodbye = False
        self.on_text: Callable[[bytes], None] = _ignore
        self.on_binary: Callable[[bytes], None] | None = None

    def limit_messages(self, max_bytes: int) -> None:
        """Change the largest message that the client may send from now on."""
        self._reader.max_bytes = max_bytes

    def close_with(self, code: int, reason: str = "") -> None:
        """Close with a code and a reason for people."""
        self.close(frame_close(code, reason))

    def data_received(self, data: bytes) -> None:
        """Whatever the client sends shows that it is there, where not a pong is asked for."""
        if not self._pong_counts:
            self.silent_since = 0
        if self._deaf:
            return
        # Thousands of clients may ping each second: one ping by itself needs no reader.
        size = len(data) - _PING_HEAD_BYTES
        if (
            0 <= size <= 125
            and data[0] == _PING_HEAD
            and data[1] == 0x80 | size
            and self._reader.at_frame_start
            and not self.closing
        ):
            self._reader.idle_frames += 1
            if self._reader.idle_frames <= self._idle_allowed or self._may_idle():
                self._answer([unmask(data[6:], data[2:6]) if size else b""])
            return
        self._read(data)

    def _read(self, data: bytes) -> None:
        violation = None
        try:
            found = self._reader.feed(data)
        except ProtocolViolation as exc:
            found, violation = exc.before, exc
        if self._reader.idle_frames > self._idle_allowed and not self._may_idle():
            return
        pings: list[bytes] = []
        for opcode, payload in found:
            if opcode == PING_OPCODE:
                pings.append(payload)
                continue
            if pings:
                # A message may close the connection: pongs are written before it.
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
            self._read_later()

    def _read_later(self) -> None:
        """Let other clients have their turn before the rest of what has come is parsed."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self.closing:
            # A client that still sends as much as this is not waiting for the close frame.
            self._deaf = True
            return
        transport.pause_reading()
        if not self._planned:
            self._planned = True
            asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        self._planned = False
        # If the owner has paused reading meanwhile, `resume_reading` continues.
        if self._unheard or not self._reader.more:
            return
        try:
            self._read(b"")
        except BaseException:
            # As the loop does when `data_received` fails.
            self.abort()
            raise
        if self._deaf or not (self._reader.more or self._unheard):
            super().resume_reading()

    def resume_reading(self) -> None:
        """Parse what has come already before the socket is read again."""
        self._unheard = False
        if self._reader.more and not self._deaf:
            self._read_later()
        else:
            super().resume_reading()

    def resume_writing(self) -> None:
        """Send the pong that had to wait, then as every socket."""
        super().resume_writing()
        if self._pong is not None:
            pong, self._pong = self._pong, None
            self._answer([pong])

    def _answer(self, pings: list[bytes]) -> None:
        self.pinged = True
        if self.closing:
            return
        # Section 5.5.3 allows to answer the latest ping only: so pings cannot fill the memory.
        if self.full:
            self._pong = pings[-1]
        else:
            pongs = [frame_pong(payload) if payload else _EMPTY_PONG for payload in pings]
            self.write(pongs[0] if len(pongs) == 1 else b"".join(pongs))

    def _may_idle(self) -> bool:
        """Allow as many control frames again if the last ones took long enough, else close."""
        now = time.monotonic()
        if now - self._idle_since >= _IDLE_FRAMES_S:
            self._idle_since = now
            self._idle_allowed = self._reader.idle_frames + _IDLE_FRAMES
            return True
        self._on_violation(ProtocolViolation(_POLICY_VIOLATION, "too many control frames"))
        return False

    def _on_close(self, payload: bytes) -> None:
        self._deaf = self.goodbye = True
        transport = self._transport
        # An empty `last` below: both sides have said goodbye, and the server hangs up (7.1.1).
        if not self.closing:
            self.write(_frame(CLOSE, payload[:2]))
            self.close()
        elif transport is not None:
            transport.close()

    def _on_violation(self, violation: ProtocolViolation) -> None:
        self._deaf = True
        self.close_with(violation.code, violation.reason)
        transport = self._transport
        # The rest cannot be read any more, its goodbye included; but to close with unread input
        # resets the connection, and the client might never see why. So: no more from us, and what
        # still comes is dropped until it hangs up.
        if transport is not None and not transport.is_closing():
            if transport.can_write_eof():
                transport.write_eof()
            else:
                transport.close()

    def _hang_up(self, transport: asyncio.Transport, *, said_goodbye: bool) -> None:
        if not said_goodbye:
            transport.close()

    def _let_go(self) -> None:
        super()._let_go()
        self.on_text = _ignore
        self.on_binary = None
