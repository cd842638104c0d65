"""A minimal WebSocket client that can stop reading."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from typing_extensions import override

from scripts.loadlib.processes import LoadError

_TEXT, _CLOSE, _PING, _PONG = 1, 8, 9, 10


class WebSocket(asyncio.Protocol):
    """A WebSocket client. Calls `on_text` for each text frame as soon as it is received."""

    def __init__(self, on_text: Callable[[bytes], None]) -> None:
        self._on_text = on_text
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._open = False
        self.ready = asyncio.Event()
        self.closed = asyncio.Event()
        self.close_code = 0
        self.pongs = 0

    @classmethod
    async def connect(
        cls, port: int, path: str, on_text: Callable[[bytes], None], *, receive_buffer: int = 0
    ) -> WebSocket:
        """Connect to a server on 127.0.0.1 and complete the handshake.

        `receive_buffer` is the size of the kernel's receive buffer; 0 for the default.
        Raise LoadError if the server rejects the handshake.
        """
        loop = asyncio.get_running_loop()
        plain = socket.socket()
        plain.setblocking(False)
        if receive_buffer:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await loop.sock_connect(plain, ("127.0.0.1", port))
        except BaseException:
            plain.close()
            raise
        transport, client = await loop.create_connection(lambda: cls(on_text), sock=plain)
        transport.write(
            b"GET %b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            b"Sec-WebSocket-Version: 13\r\n\r\n" % (path.encode(), port)
        )
        async with asyncio.timeout(30):
            await client.ready.wait()
        if client.closed.is_set():
            raise LoadError(
                f"the server rejected the WebSocket handshake: {bytes(client._buffer[:300])!r}"
            )
        return client

    def send_text(self, text: bytes) -> None:
        """Send one text frame."""
        self._send(_TEXT, text)

    def ping(self) -> None:
        """Send one ping without a payload."""
        self._send(_PING, b"")

    def pause(self) -> None:
        """Stop reading from the socket."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Continue reading."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self.ready.set()

    @override
    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._open:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            if not self._buffer.startswith(b"HTTP/1.1 101"):
                self.close()
                return
            del self._buffer[: end + 4]
            self._open = True
            self.ready.set()
        self._frames()

    def _frames(self) -> None:
        buffer = self._buffer
        start, end = 0, len(buffer)
        while end - start >= 2:
            length = buffer[start + 1] & 127
            body = start + 2
            if length == 126:
                length, body = int.from_bytes(buffer[start + 2 : start + 4]), start + 4
            elif length == 127:
                length, body = int.from_bytes(buffer[start + 2 : start + 10]), start + 10
            if end < body + length:
                break
            self._frame(buffer[start] & 15, bytes(buffer[body : body + length]))
            start = body + length
        del buffer[:start]

    def _frame(self, kind: int, payload: bytes) -> None:
        if kind == _TEXT:
            self._on_text(payload)
        elif kind == _PING:
            self._send(_PONG, payload)
        elif kind == _PONG:
            self.pongs += 1
        elif kind == _CLOSE:
            self.close_code = int.from_bytes(payload[:2])
            self.close()

    def _send(self, kind: int, payload: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        # A mask of zeros is valid. Masking protects proxies, and there is none on loopback.
        length = len(payload)
        if length < 126:
            head = bytes((0x80 | kind, 0x80 | length))
        else:
            head = bytes((0x80 | kind, 0x80 | 126)) + length.to_bytes(2)
        self._transport.write(head + bytes(4) + payload)
