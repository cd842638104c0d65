"""A TCP proxy that can cut its connections at any byte, in both directions at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from socket import SO_LINGER, SOL_SOCKET
from struct import pack


class Cutter:
    """Forwards connections to `port`. Its own port is set when it runs."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.port = 0
        self.cuts = 0
        # While this is set, new connections are rejected.
        self.refuses = False
        self._open: dict[asyncio.WriteTransport, asyncio.WriteTransport] = {}
        # Both sides of connections whose bytes are dropped.
        self._silent: set[asyncio.WriteTransport] = set()

    def __len__(self) -> int:
        return len(self._open)

    def cut(self, index: int) -> None:
        """Cut the connection with this index, modulo the number of connections."""
        if self._open:
            near = list(self._open)[index % len(self._open)]
            for transport in (near, self._open.pop(near)):
                transport.abort()
            self.cuts += 1

    def reset(self) -> None:
        """End all connections with a reset (RST), as the kernel of a server that has crashed."""
        for near, far in list(self._open.items()):
            near.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, pack("ii", 1, 0))
            near.abort()
            far.abort()

    def silence(self) -> None:
        """Drop all bytes of the present connections, as a firewall that has forgotten them."""
        self._silent |= {side for pair in self._open.items() for side in pair}

    def silence_replies(self) -> None:
        """Drop all bytes that the present connections receive from the server."""
        self._silent |= set(self._open)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            writer.transport.abort()
            return
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open[writer.transport] = other_writer.transport
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, other_writer, self._silent))
                group.create_task(_pump(other_reader, writer, self._silent))
        finally:
            self._open.pop(writer.transport, None)
            self._silent -= {writer.transport, other_writer.transport}
            writer.transport.abort()
            other_writer.transport.abort()


async def _pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    silent: set[asyncio.WriteTransport],
) -> None:
    # uvloop raises RuntimeError if the connection is closed.
    with suppress(OSError, RuntimeError):
        while data := await reader.read(65536):
            if writer.transport not in silent:
                writer.write(data)
                await writer.drain()
    with suppress(OSError, RuntimeError):
        writer.write_eof()


@asynccontextmanager
async def cutting(port: int) -> AsyncIterator[Cutter]:
    """Run a proxy in front of this port."""
    cutter = Cutter(port)
    server = await asyncio.start_server(cutter._serve, "127.0.0.1", 0)
    cutter.port = server.sockets[0].getsockname()[1]
    try:
        yield cutter
    finally:
        server.close()
        while len(cutter):
            cutter.cut(0)
