"""Parser of a client's WebSocket frames (RFC 6455). Performs no I/O.

With `compressed`, messages may be compressed with permessage-deflate (RFC 7692), each
independently.
"""

from __future__ import annotations

import struct

from relay.transports.socket.deflate import InflateError, inflate

CONTINUATION, TEXT, BINARY, CLOSE, PING_OPCODE, PONG = 0, 1, 2, 8, 9, 10
_OPCODES = frozenset({CONTINUATION, TEXT, BINARY, CLOSE, PING_OPCODE, PONG})

# Not an opcode of the protocol: stands for a message that was too large and was dropped.
TOO_LARGE = 16

# Set in the first frame of a compressed message (RFC 7692 section 6).
COMPRESSED = 0x40

# Limit of frames that one call parses, so that many tiny frames do not block the event loop.
FRAMES_PER_TURN = 64
# Fragments below this size are read slowly. Real clients send fragments of 4 KiB and more.
_TINY_BYTES = 512
# The payload of a frame above this size is unmasked as it arrives, not all of it at its end.
_LARGE_BYTES = 65536


class ProtocolViolation(Exception):
    """The client violated the protocol. `before` has the valid frames before the violation."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.before: list[tuple[int, bytes]] = []


def parse_close(payload: bytes) -> int | None:
    """Return the code of a client's close frame, or None if it has none."""
    if not payload:
        return None
    if len(payload) == 1:
        raise ProtocolViolation(1002, "close frame with half a code")
    code: int = struct.unpack_from("!H", payload)[0]
    # Section 7.4 and the IANA registry; 1004 to 1006 and 1015 are never sent.
    if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise ProtocolViolation(1002, "close code that may not be sent")
    _check_utf8(payload[2:])
    return code


def _check_utf8(payload: bytes) -> None:
    try:
        payload.decode()
    except UnicodeDecodeError:
        raise ProtocolViolation(1007, "not UTF-8") from None


def unmask(payload: bytes, mask: bytes) -> bytes:
    """Unmask a payload (section 5.3)."""
    # XOR of two long integers is the fastest way in pure Python.
    size = len(payload)
    pad = (mask * (size // 4 + 1))[:size]
    xor = int.from_bytes(payload, "little") ^ int.from_bytes(pad, "little")
    return xor.to_bytes(size, "little")


class FrameReader:
    """Parses messages of at most `max_bytes`, and control frames.

    It has no buffer between messages. After a ProtocolViolation it must not be used again. The
    first `skip_bytes` are dropped, because some old clients send bytes of a draft of the protocol
    before their first frame.

    With `lenient`, a text message may be any bytes, and a message that is too large is dropped
    while it arrives: its place is taken by an item with the opcode TOO_LARGE.
    """

    __slots__ = (
        "_allowed",
        "_drops",
        "_inflates",
        "_kind",
        "_lenient",
        "_message",
        "_payload_at",
        "_rest",
        "_skip",
        "_unmasked",
        "has_tiny",
        "idle_frames",
        "max_bytes",
        "more",
    )

    def __init__(
        self,
        max_bytes: int,
        skip_bytes: int = 0,
        *,
        compressed: bool = False,
        lenient: bool = False,
    ) -> None:
        self.max_bytes = max_bytes
        self._lenient = lenient
        # Whether the rest of the message, in further fragments, is dropped.
        self._drops = False
        self._allowed = COMPRESSED if compressed else 0
        self._inflates = False
        self._skip = skip_bytes
        self._rest: bytes | bytearray = b""
        self._message: bytearray | None = None
        self._kind = 0
        # For an incomplete large frame: offset of its payload, and number of unmasked bytes.
        self._payload_at = self._unmasked = 0
        # Number of control frames and empty fragments, which cause work without a message.
        self.idle_frames = 0
        # Whether the last call has parsed a tiny fragment.
        self.has_tiny = False
        # Whether the last call stopped early; call `feed(b"")` to continue.
        self.more = False

    @property
    def at_frame_start(self) -> bool:
        """Whether the next byte begins a frame."""
        return not self._rest and not self._skip

    @property
    def held_bytes(self) -> int:
        """The size of what has arrived of an incomplete message."""
        return len(self._rest) + len(self._message or b"")

    def drop(self) -> None:
        """Free the incomplete message; the reader must not be fed again."""
        self._rest, self._message, self._payload_at = b"", None, 0
        self.more = False

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Return the frames that `data` completes, in order: messages, pings, pongs and close.

        A close frame is the last item, because later frames are ignored (section 5.5.1). At most
        FRAMES_PER_TURN frames are parsed. `more` is True if others may be left.
        """
        if self._skip:
            data, self._skip = data[self._skip :], max(0, self._skip - len(data))
        if self._rest:
            self._rest += data
            source: bytes | bytearray = self._rest
        else:
            source = data
        found: list[tuple[int, bytes]] = []
        start = count = self._payload_at = 0
        self.more = self.has_tiny = False
        try:
            while end := self._frame_at(source, start, found):
                start = end
                count += 1
                if found and found[-1][0] == CLOSE:
                    start = len(source)
                    break
                if count == FRAMES_PER_TURN:
                    self.more = start < len(source)
                    break
        except ProtocolViolation as violation:
            violation.before = found
            raise
        if start == len(source):
            self._rest = b""
        elif isinstance(source, bytearray):
            # Deleting from the front of a bytearray moves no bytes, and appending works in place.
            # So large frames in small pieces and many frames in one piece take linear time.
            del source[:start]
        else:
            self._rest = bytearray(memoryview(source)[start:])
        if self._payload_at:
            self._unmask_ahead(self._rest, self._payload_at)
        return found

    def _unmask_ahead(self, frame: bytes | bytearray, at: int) -> None:
        # Unmask multiples of four bytes, so that the rest starts with the mask's first byte.
        first = at + self._unmasked
        end = at + (len(frame) - at) // 4 * 4
        if isinstance(frame, bytearray) and first < end:
            frame[first:end] = unmask(bytes(frame[first:end]), bytes(frame[at - 4 : at]))
            self._unmasked = end - at

    def _frame_at(
        self, source: bytes | bytearray, start: int, found: list[tuple[int, bytes]]
    ) -> int:
        """Handle the frame at `start`. Return its end, or 0 if it is incomplete."""
        have = len(source) - start
        if have < 2:
            return 0
        first, second = source[start], source[start + 1]
        opcode = first & 0x0F
        last = first >= 0x80
        self._check_head(first, second, opcode, last=last)
        if 0 < opcode < 8:
            self._inflates = bool(first & COMPRESSED)
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
        # Check the size before the payload arrives, so that oversized messages are not buffered.
        held = len(self._message) if self._message is not None and opcode < 8 else 0
        end = at + 4 + size
        if opcode < 8 and (self._drops or held + size > self.max_bytes):
            if not self._lenient:
                raise ProtocolViolation(1009, f"more than {self.max_bytes} bytes")
            self._drops = not last
            self._message = None if last else bytearray()
            if last:
                found.append((TOO_LARGE, b""))
            self._skip = max(0, end - len(source))
            return min(end, len(source))
        if len(source) < end:
            if size > _LARGE_BYTES and len(source) >= at + 4:
                self._payload_at = at + 4 - start
            return 0
        done, self._unmasked = at + 4 + self._unmasked, 0
        payload = unmask(bytes(source[done:end]), bytes(source[at : at + 4])) if size else b""
        if done > at + 4:
            payload = bytes(source[at + 4 : done]) + payload
        self._accept(opcode, payload, found, last=last)
        return end

    def _check_head(self, first: int, second: int, opcode: int, *, last: bool) -> None:
        # The bit is allowed in the first frame of a message only.
        if first & 0x70 & ~(self._allowed if 0 < opcode < 8 else 0):
            raise ProtocolViolation(1002, "reserved bits set")
        if opcode not in _OPCODES:
            raise ProtocolViolation(1002, "unknown opcode")
        if second < 0x80:
            raise ProtocolViolation(1002, "a client's frames must be masked")
        if opcode >= 8:
            # Section 5.5: control frames are short and not fragmented.
            if not last or second & 0x7F > 125:
                raise ProtocolViolation(1002, "control frame too long or in fragments")
        elif (opcode == CONTINUATION) != (self._message is not None):
            raise ProtocolViolation(1002, "fragments out of order")

    def _accept(
        self, opcode: int, payload: bytes, found: list[tuple[int, bytes]], *, last: bool
    ) -> None:
        if opcode >= 8 or not (last or payload):
            self.idle_frames += 1
        elif not last and len(payload) < _TINY_BYTES:
            self.has_tiny = True
        if opcode < 8:
            if not last and opcode != CONTINUATION:
                self._kind, self._message = opcode, bytearray(payload)
                return
            if self._message is not None:
                self._message += payload
                if not last:
                    return
                opcode, payload, self._message = self._kind, bytes(self._message), None
            if self._inflates:
                payload = self._inflated(payload)
            if opcode == TEXT and not self._lenient:
                _check_utf8(payload)
        elif opcode == CLOSE:
            parse_close(payload)
        found.append((opcode, payload))

    def _inflated(self, payload: bytes) -> bytes:
        try:
            message = inflate(payload, self.max_bytes)
        except InflateError as exc:
            raise ProtocolViolation(1007, str(exc)) from None
        if message is None:
            raise ProtocolViolation(1009, f"more than {self.max_bytes} bytes")
        return message
