"""Server-side websocket frames (RFC 6455) without I/O, and the connection that speaks them.

A server's frames are not masked, so one framed bytes object serves every client. Compression is
not negotiated; without context takeover a compressed frame would be one more such object.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiohttp import web

from relay.transports.client_socket import ClientSocket

if TYPE_CHECKING:
    import asyncio

    from relay.transports.exchange import Asked
    from relay.transports.heartbeat import Heartbeat
    from relay.transports.reaper import Reaper

CONTINUATION, TEXT, BINARY, CLOSE, PING_OPCODE, PONG = 0, 1, 2, 8, 9, 10
_OPCODES = frozenset({CONTINUATION, TEXT, BINARY, CLOSE, PING_OPCODE, PONG})

# RFC 6455 section 1.3: appended to the client's key before hashing.
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class ProtocolViolation(Exception):
    """The client broke the protocol; `before` is what it had said correctly until then."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.before: list[tuple[int, bytes]] = []


def _frame(opcode: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65536:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def frame_text(payload: bytes) -> bytes:
    """One text message, which must be UTF-8."""
    return _frame(TEXT, payload)


def frame_close(code: int, reason: str = "") -> bytes:
    """A close frame; the reason is cut to what a control frame can carry (section 5.5)."""
    text = reason.encode()[:123].decode(errors="ignore").encode()
    return _frame(CLOSE, struct.pack("!H", code) + text)


def frame_pong(payload: bytes) -> bytes:
    """The answer to a ping: the same payload."""
    return _frame(PONG, payload)


PING = _frame(PING_OPCODE, b"")
_EMPTY_PONG = _frame(PONG, b"")
# How a client's ping without a payload begins; the mask follows, and that is all.
_EMPTY_PING, _EMPTY_PING_BYTES = b"\x89\x80", 6


def parse_close(payload: bytes) -> int | None:
    """The code of a client's close frame, None where it gave none."""
    if not payload:
        return None
    if len(payload) == 1:
        raise ProtocolViolation(1002, "close frame with half a code")
    code: int = struct.unpack_from("!H", payload)[0]
    # Section 7.4 and the IANA registry; 1004 to 1006 and 1015 never travel.
    if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise ProtocolViolation(1002, "close code that may not be sent")
    _check_utf8(payload[2:])
    return code


def _check_utf8(payload: bytes) -> None:
    try:
        payload.decode()
    except UnicodeDecodeError:
        raise ProtocolViolation(1007, "not UTF-8") from None


def _unmask(payload: bytes, mask: bytes) -> bytes:
    # XOR of two long integers is the fastest that Python has for this without an extension.
    size = len(payload)
    pad = (mask * (size // 4 + 1))[:size]
    xor = int.from_bytes(payload, "little") ^ int.from_bytes(pad, "little")
    return xor.to_bytes(size, "little")


class FrameReader:
    """Turns a client's bytes into messages and control frames, at most `max_bytes` a message.

    Between messages it holds no buffer. After a ProtocolViolation it must not be fed again. The
    first `skip_bytes` are dropped: some old clients send bytes of a draft before their first frame.
    """

    __slots__ = ("_kind", "_max_bytes", "_message", "_rest", "_skip")

    def __init__(self, max_bytes: int, skip_bytes: int = 0) -> None:
        self._max_bytes = max_bytes
        self._skip = skip_bytes
        self._rest: bytes | bytearray = b""
        self._message: bytearray | None = None
        self._kind = 0

    @property
    def within_frame(self) -> bool:
        """Whether the next bytes belong to a frame that has begun."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """What `data` completes, in order: text and binary messages, pings, pongs, and a close
        frame as the last, for nothing counts after it (section 5.5.1)."""
        if self._skip:
            data, self._skip = data[self._skip :], max(0, self._skip - len(data))
        if self._rest:
            self._rest += data
            source: bytes | bytearray = self._rest
        else:
            source = data
        found: list[tuple[int, bytes]] = []
        start = 0
        try:
            while end := self._frame_at(source, start, found):
                start = end
                if found and found[-1][0] == CLOSE:
                    start = len(source)
                    break
        except ProtocolViolation as violation:
            violation.before = found
            raise
        if start == len(source):
            self._rest = b""
        elif start or source is data:
            # A bytearray grows in place: a large frame in small pieces costs linear time.
            self._rest = bytearray(memoryview(source)[start:])
        return found

    def _frame_at(
        self, source: bytes | bytearray, start: int, found: list[tuple[int, bytes]]
    ) -> int:
        """Handle the frame at `start`; its end, or 0 while it is not complete."""
        have = len(source) - start
        if have < 2:
            return 0
        first, second = source[start], source[start + 1]
        opcode = first & 0x0F
        last = first >= 0x80
        self._check_head(first, second, opcode, last=last)
        size = second & 0x7F
        at = start + 2
        if size == 126:
            if have < 4:
                return 0
            (size,) = struct.unpack_from("!H", source, at)
            at += 2
        elif size == 127:
            if have < 10:
                return 0
            (size,) = struct.unpack_from("!Q", source, at)
            at += 8
        # Before the payload is waited for: what is too long is never held.
        held = len(self._message) if self._message is not None and opcode < 8 else 0
        if opcode < 8 and held + size > self._max_bytes:
            raise ProtocolViolation(1009, f"more than {self._max_bytes} bytes")
        end = at + 4 + size
        if len(source) < end:
            return 0
        payload = _unmask(bytes(source[at + 4 : end]), bytes(source[at : at + 4])) if size else b""
        self._accept(opcode, payload, found, last=last)
        return end

    def _check_head(self, first: int, second: int, opcode: int, *, last: bool) -> None:
        if first & 0x70:
            raise ProtocolViolation(1002, "reserved bits set")
        if opcode not in _OPCODES:
            raise ProtocolViolation(1002, "unknown opcode")
        if second < 0x80:
            raise ProtocolViolation(1002, "a client's frames must be masked")
        if opcode >= 8:
            # Section 5.5: control frames are short and whole.
            if not last or second & 0x7F > 125:
                raise ProtocolViolation(1002, "control frame too long or in fragments")
        elif (opcode == CONTINUATION) != (self._message is not None):
            raise ProtocolViolation(1002, "fragments out of order")

    def _accept(
        self, opcode: int, payload: bytes, found: list[tuple[int, bytes]], *, last: bool
    ) -> None:
        if opcode < 8:
            if not last and opcode != CONTINUATION:
                self._kind, self._message = opcode, bytearray(payload)
                return
            if self._message is not None:
                self._message += payload
                if not last:
                    return
                opcode, payload, self._message = self._kind, bytes(self._message), None
            if opcode == TEXT:
                _check_utf8(payload)
        elif opcode == CLOSE:
            parse_close(payload)
        found.append((opcode, payload))


def _tokens(request: web.Request | Asked, name: str) -> set[str]:
    return {
        part.strip().lower()
        for value in request.headers.getall(name, ())
        for part in value.split(",")
    }


def accept_headers(
    request: web.Request | Asked, versions: frozenset[str] = frozenset({"13"})
) -> bytes | web.Response:
    """The 101 head for a valid opening handshake (section 4.2), else the answer to send instead.

    `versions` that a door may add: 8, whose frames are the same (hybi-08 to -12 are drafts of it).
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
        b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
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
    is set once the client has sent a close frame.
    """

    __slots__ = ("_deaf", "_pong", "_reader", "goodbye", "on_binary", "on_text")

    def __init__(
        self,
        *,
        buffer_bytes: int,
        max_frame_bytes: int,
        reaper: Reaper,
        heartbeat: Heartbeat | None = None,
        skip_bytes: int = 0,
    ) -> None:
        """`skip_bytes`: what this client sends before its first frame, see `FrameReader`."""
        super().__init__(buffer_bytes=buffer_bytes, reaper=reaper, heartbeat=heartbeat)
        self._reader = FrameReader(max_frame_bytes, skip_bytes)
        self._pong: bytes | None = None
        self._deaf = False
        self.goodbye = False
        self.on_text: Callable[[bytes], None] = _ignore
        self.on_binary: Callable[[bytes], None] | None = None

    def close_with(self, code: int, reason: str = "") -> None:
        """Close with a code and a reason for people."""
        self.close(frame_close(code, reason))

    def data_received(self, data: bytes) -> None:
        """Whatever the client sends shows that it is there."""
        self.silent_since = 0
        if self._deaf:
            return
        # Thousands of clients may ping each second: nothing is taken apart for that.
        if (
            len(data) == _EMPTY_PING_BYTES
            and data.startswith(_EMPTY_PING)
            and not self._reader.within_frame
        ):
            self._answer(b"")
            return
        violation = None
        try:
            found = self._reader.feed(data)
        except ProtocolViolation as exc:
            found, violation = exc.before, exc
        for opcode, payload in found:
            if opcode == CLOSE:
                self._on_close(payload)
                return
            if self.closing:
                continue
            if opcode == TEXT:
                self.on_text(payload)
            elif opcode == PING_OPCODE:
                self._answer(payload)
            elif opcode == BINARY:
                if self.on_binary is None:
                    self.close_with(1003, "text only")
                else:
                    self.on_binary(payload)
        if violation is not None:
            self._on_violation(violation)

    def resume_writing(self) -> None:
        """Send the pong that had to wait, then as every socket."""
        super().resume_writing()
        if self._pong is not None:
            pong, self._pong = self._pong, None
            self._answer(pong)

    def _answer(self, payload: bytes) -> None:
        # Section 5.5.3 allows to answer the latest ping only: so pings cannot fill the memory.
        if self.full:
            self._pong = payload
        else:
            self.write(frame_pong(payload) if payload else _EMPTY_PONG)

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
