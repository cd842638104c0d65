"""A client's socket over real TCP: full, drained and closed, in every order."""

from __future__ import annotations

import asyncio
import gc
import ssl
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from relay.transports.socket import sse
from relay.transports.socket.client_socket import ClientSocket
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import take_over
from tests.unit.transports.serving import GET, Run, head_of, raw_client, serving

BUFFER = 65536


class Owner:
    """Records the order of a socket's callbacks."""

    def __init__(self, reaper: Reaper) -> None:
        self.socket = ClientSocket(buffer_bytes=BUFFER, reaper=reaper)
        self.calls: list[str] = []
        self.drained, self.closed = asyncio.Event(), asyncio.Event()
        self.socket.on_full = lambda: self.calls.append("full")
        self.socket.on_drained = self._on_drained
        self.socket.on_closed = self._on_closed

    def _on_drained(self) -> None:
        self.calls.append("drained")
        self.drained.set()

    def _on_closed(self) -> None:
        self.calls.append("closed")
        self.closed.set()

    def fill(self) -> int:
        """Write until the socket is full; return the number of bytes."""
        wrote = 0
        while not self.socket.full:
            self.socket.write(b"x" * 50_000)
            wrote += 50_000
        return wrote


@asynccontextmanager
async def one_client(
    reaper: Reaper, tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None
) -> AsyncIterator[tuple[Owner, asyncio.StreamReader, asyncio.StreamWriter]]:
    owners: list[Owner] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        owner = Owner(reaper)
        owners.append(owner)
        # Subclasses of ClientSocket implement data_received. That of SSE ignores the data.
        return take_over(request, sse.head(), owner.socket)

    async with (
        serving(handler, tls[0] if tls else None) as (port, _),
        raw_client(port, GET, tls[1] if tls else None) as (reader, writer),
    ):
        await head_of(reader)
        yield owners.pop(), reader, writer


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_full_and_drained_alternate_without_loss(
    run: Run, reaper: Reaper, tls: tuple[ssl.SSLContext, ssl.SSLContext], secure: bool
) -> None:
    async def main() -> None:
        async with one_client(reaper, tls if secure else None) as (owner, reader, _):
            for _ in range(2):
                owner.drained.clear()
                wrote = owner.fill()
                assert owner.socket.waiting_bytes() > 0
                assert len(await reader.readexactly(wrote)) == wrote
                await owner.drained.wait()
                assert not owner.socket.full
            assert owner.calls == ["full", "drained"] * 2
            owner.socket.close(b"end")
            assert await reader.read() == b"end"
            await owner.closed.wait()
            assert owner.calls[4:] == ["closed"]

    run(main())


def test_close_flushes_the_buffer_and_ignores_later_writes(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        async with one_client(reaper) as (owner, reader, _):
            wrote = owner.fill()
            owner.socket.close(b"last")
            owner.socket.write(b"too late")
            owner.socket.close(b"again")
            assert owner.socket.closing
            assert await reader.read() == b"x" * wrote + b"last"
            await owner.closed.wait()
            owner.socket.write(b"much too late")
            owner.socket.close()
            owner.socket.abort()
            # After a close, the only callback is on_closed.
            assert owner.calls == ["full", "closed"]
            assert len(reaper) == 0
            assert owner.socket.peer() == ""

    run(main())


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_a_client_that_does_not_read_its_last_bytes_is_aborted(
    run: Run, reaper: Reaper, tls: tuple[ssl.SSLContext, ssl.SSLContext], secure: bool
) -> None:
    async def main() -> None:
        async with one_client(reaper, tls if secure else None) as (owner, reader, _):
            assert owner.socket.peer() == "127.0.0.1"
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(100):
                # This exceeds the client's own buffers.
                owner.socket.write(b"x" * 500_000)
            begin = asyncio.get_running_loop().time()
            owner.socket.close(b"last")
            await owner.closed.wait()
            assert asyncio.get_running_loop().time() - begin >= 0.25
            assert owner.calls == ["full", "closed"]

    run(main())


def test_abort_drops_the_buffer(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        async with one_client(reaper) as (owner, _, _):
            owner.fill()
            owner.socket.abort()
            owner.socket.write(b"too late")
            await owner.closed.wait()
            assert owner.calls == ["full", "closed"]

    run(main())


@pytest.mark.parametrize("how", ["eof", "reset"])
def test_a_disconnect_is_reported_once(run: Run, reaper: Reaper, how: str) -> None:
    async def main() -> None:
        async with one_client(reaper) as (owner, _, writer):
            if how == "eof":
                writer.close()
            else:
                owner.socket.write(b"unread")
                writer.transport.abort()
            await owner.closed.wait()
            assert owner.calls == ["closed"]
            assert len(reaper) == 0

    run(main())


def test_a_closed_socket_is_freed_without_garbage_collection(run: Run, reaper: Reaper) -> None:
    async def main() -> None:
        async with one_client(reaper) as (owner, reader, _):
            gc.collect()
            gc.disable()
            try:
                held = weakref.ref(owner)
                owner.socket.close()
                assert await reader.read() == b""
                await owner.closed.wait()
                await asyncio.sleep(0)
                del owner
                assert held() is None
            finally:
                gc.enable()

    run(main())


def test_writing_before_the_take_over_has_no_effect(reaper: Reaper) -> None:
    socket = ClientSocket(buffer_bytes=BUFFER, reaper=reaper)
    socket.write(b"x")
    socket.close(b"x")
    socket.abort()
    assert socket.waiting_bytes() == 0
