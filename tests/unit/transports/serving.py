"""A small aiohttp server and raw clients, for the tests of this folder."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from relay.transports.socket.listener import GuardedSite

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Run = Callable[[Awaitable[None]], None]

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def masked(
    opcode: int, payload: bytes, *, fin: bool = True, mask: bytes = b"\x9e\x07\xd1\x53"
) -> bytes:
    """Build a client's frame. The mask is fixed, so that test IDs are the same in each run."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65536:
        length = bytes([0x80 | 126]) + size.to_bytes(2, "big")
    else:
        length = bytes([0x80 | 127]) + size.to_bytes(8, "big")
    body = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    return bytes([(0x80 if fin else 0) | opcode]) + length + mask + body


@asynccontextmanager
async def serving(
    handler: Handler, tls: ssl.SSLContext | None = None, keepalive_timeout: float = 75.0
) -> AsyncIterator[tuple[int, web.AppRunner]]:
    """Serve the handler at `/`; return its port and runner."""
    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app, shutdown_timeout=1.0, keepalive_timeout=keepalive_timeout)
    await runner.setup()
    site = GuardedSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    try:
        yield site.port, runner
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw_client(
    port: int, first: bytes, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect a TCP or TLS client that has sent `first`."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=tls, server_hostname="localhost" if tls else None, limit=1 << 24
    )
    try:
        writer.write(first)
        yield reader, writer
    finally:
        writer.transport.abort()


async def head_of(reader: asyncio.StreamReader) -> bytes:
    """Read and return the head of a response."""
    return await reader.readuntil(b"\r\n\r\n")
