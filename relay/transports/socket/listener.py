"""Listening sockets that keep file descriptors in reserve.

Measured with all descriptors in use:

- uvloop closes new connections immediately by means of one reserve descriptor. If another thread
  takes that one, uvloop closes the listening socket.
- asyncio (3.11) calls accept `backlog` times per second, and logs a traceback each time: 4,096 with
  our backlog.
- With both, relay could not reconnect to Redis.

So the last descriptors are kept free: new connections are then closed immediately, and existing
connections are not affected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web
from typing_extensions import override

from relay.transports.socket.http_connection import ConnectionLimits, HttpFactory
from relay.transports.socket.inherited import InheritedSocket

if TYPE_CHECKING:
    import ssl

log = logging.getLogger(__name__)

# For Redis, DNS lookups and log files, and for connections that asyncio has accepted before they
# can be refused.
_SPARE_DESCRIPTORS = 64
# Connections that the kernel queues until they are accepted, for reconnect storms. The kernel's own
# limit, net.core.somaxconn, is lower or the same.
_BACKLOG = 65_535
# Connections that uvloop accepts in one turn of the loop. libuv (since 1.45) accepts one for each
# handle that listens, so the socket is opened several times. With one connection per turn, a storm
# of 3,000 clients took 1.7 times the processor time, because each had its own pipelines to Redis.
_ACCEPTS_PER_TURN = 8
# asyncio accepts up to `backlog` connections in one turn of the loop. A refused connection closes
# five turns later, and the spare descriptors must last until then.
_ASYNCIO_BATCH = 4
_HANDSHAKE_S = 15.0


def raise_open_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit. Return the limit in effect."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            # Some systems report "unlimited" but reject it as a soft limit.
            return soft
    return hard


class _Gate(asyncio.Protocol):
    """Checks a new connection's descriptor before aiohttp's handler is created."""

    __slots__ = ("_site",)

    def __init__(self, site: GuardedSite) -> None:
        self._site = site

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        opened = cast("asyncio.Transport", transport)
        # The kernel assigns the lowest free number, so a high number means that few are left.
        connection = opened.get_extra_info("socket")
        if self._site.give is not None and self._site.give(connection):
            # This closes the descriptor of this process only.
            opened.abort()
        elif self._site.has_room(connection):
            handler = self._site.make_handler()
            opened.set_protocol(handler)
            handler.connection_made(opened)
        else:
            opened.abort()


class _Adopted(asyncio.Protocol):
    """Passes `early`, which another process has read, to aiohttp's handler at once.

    If the handler had to wait for it, the connection could be lost in between, and aiohttp would
    then handle the request without its own server ("'NoneType' object is not callable").
    """

    __slots__ = ("_early", "_factory", "_hops", "_peer")

    def __init__(self, factory: HttpFactory, early: bytes, hops: int, peer: str) -> None:
        self._factory = factory
        self._early = early
        self._hops = hops
        self._peer = peer

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        handler = self._factory()
        handler.adopted(self._hops, self._peer)
        transport.set_protocol(handler)
        handler.connection_made(transport)
        if self._early:
            # No other data can follow, because the client is waiting for the answer.
            handler.data_received(self._early)


class GuardedSite(web.BaseSite):
    """A TCP site of an aiohttp runner that keeps some file descriptors free.

    `refused` is the number of connections that were closed for this reason.
    """

    def __init__(
        self,
        runner: web.BaseRunner,
        hosts: str | Sequence[str],
        port: int,
        *,
        ssl_context: ssl.SSLContext | None = None,
        reuse_port: bool = False,
        limits: ConnectionLimits | None = None,
        inherited: Sequence[InheritedSocket] = (),
    ) -> None:
        """`hosts` are names and addresses; none means all addresses of both families. `limits` are
        shared by all listeners of this process. `inherited` are open already; with them, `hosts`
        are the addresses besides, and none means none."""
        super().__init__(runner, ssl_context=ssl_context, backlog=_BACKLOG)
        self._limits = limits or ConnectionLimits()
        self.serve(runner)
        # While this worker stops, `make_handler` rejects new clients; sessions are still served.
        self._first_handler = self.make_handler
        self._servers: list[asyncio.Server] = []
        # Further handles for the same sockets (`_ACCEPTS_PER_TURN`).
        self._copies: list[asyncio.Server] = []
        self._hosts = (hosts,) if isinstance(hosts, str) else hosts
        self._port = port
        self._reuse_port = reuse_port
        self._inherited = inherited
        # Whether another process keeps the sockets open, and connections in their queues with them.
        self.held = any(each.held for each in inherited)
        # If the limit is small, as in some containers, reserve an eighth of it.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        unlimited = limit == resource.RLIM_INFINITY
        self.limit = float("inf") if unlimited else limit - min(_SPARE_DESCRIPTORS, limit // 8)
        self.refused = 0
        # If set, called first for each connection. Returns True if another process has taken it.
        self.give: Callable[[socket.socket], bool] | None = None

    def serve(self, runner: web.BaseRunner) -> None:
        """Pass new connections to `runner`, which must have been set up."""
        self.make_handler = HttpFactory(cast("web.Server", runner.server), self._limits, self)

    @property
    def name(self) -> str:
        """The address as a URL with the bound port."""
        scheme = "https" if self._ssl_context else "http"
        host = next(iter(self._hosts), "0.0.0.0")  # noqa: S104 - only shown
        host = f"[{host}]" if ":" in host else host
        return f"{scheme}://{host}:{self._port}"

    @property
    def tls(self) -> bool:
        """Whether the listener uses TLS."""
        return self._ssl_context is not None

    @property
    def port(self) -> int:
        """The bound port. It differs from the requested port if that was 0."""
        return self._port

    @property
    def sockets(self) -> list[InheritedSocket]:
        """The listening sockets, for another process. Their descriptors are this process's."""
        return [
            InheritedSocket(
                socket.socket(fileno=os.dup(each.fileno())),
                next((own.name for own in self._inherited if own.name), ""),
                self.held,
            )
            for each in self._listening()
        ]

    def _listening(self) -> list[socket.socket]:
        return [each for server in self._servers for each in server.sockets]

    async def start(self) -> None:
        """Bind and listen. Raise OSError if the address is in use or not available."""
        await super().start()
        loop = asyncio.get_running_loop()
        is_uvloop = not isinstance(loop, asyncio.BaseEventLoop)
        batch = self._backlog if is_uvloop else _ASYNCIO_BATCH
        if not self._port and len(self._hosts) != 1:
            # Otherwise each address would get another port.
            with socket.socket() as free:
                free.bind(("", 0))
                self._port = free.getsockname()[1]
        tls: Any = {
            "ssl": self._ssl_context,
            "ssl_handshake_timeout": _HANDSHAKE_S if self._ssl_context else None,
            "backlog": batch,
        }
        self._servers = [
            await loop.create_server(lambda: _Gate(self), sock=each.socket, **tls)
            for each in self._inherited
        ]
        if self._hosts or not self._inherited:
            new = await loop.create_server(
                lambda: _Gate(self),
                self._hosts or None,
                self._port,
                reuse_address=True,
                reuse_port=self._reuse_port or None,
                **tls,
            )
            self._servers.append(new)
        for listening in self._listening():
            self._port = listening.getsockname()[1]
            # Set the length of the kernel's queue by listening again, for reconnect storms.
            with socket.socket(fileno=os.dup(listening.fileno())) as again:
                again.listen(self._backlog)
            for _ in range(_ACCEPTS_PER_TURN - 1 if is_uvloop else 0):
                copy = socket.socket(fileno=os.dup(listening.fileno()))
                self._copies.append(await loop.create_server(lambda: _Gate(self), sock=copy, **tls))

    async def stop(self) -> None:
        """Stop listening. Connections in the kernel's queue are still served, by this process or by
        the one that keeps the sockets open."""
        if not self._servers:
            return
        listening = [] if self.held else self._listening()
        # Closing a listening socket resets the connections in its queue, so accept them first. The
        # duplicates keep the sockets open until then.
        queues = [socket.socket(fileno=os.dup(each.fileno())) for each in listening]
        for server in [*self._servers, *self._copies]:
            server.close()
        self._servers, self._copies = [], []
        await super().stop()
        waiting: list[socket.socket] = []
        for queue in queues:
            with queue, contextlib.suppress(OSError):
                queue.setblocking(False)
                while True:
                    waiting.append(queue.accept()[0])
        for connection in waiting:
            await self.adopt(connection)

    async def adopt(
        self, connection: socket.socket, early: bytes = b"", *, hops: int = 0, peer: str = ""
    ) -> None:
        """Serve a connection that another process has accepted.

        `early` is the data of a request that was passed on to this process, `hops` times so far.
        `peer` is set if the other process still has the client's socket and copies its data.
        """
        loop = asyncio.get_running_loop()
        if not self.has_room(connection):
            connection.close()
            return
        connection.setblocking(False)
        # A request that has been read is not encrypted.
        tls = None if early else self._ssl_context
        factory = self._first_handler if early else self.make_handler
        try:
            await loop.connect_accepted_socket(
                lambda: _Adopted(factory, early, hops, peer),
                connection,
                ssl=tls,
                ssl_handshake_timeout=_HANDSHAKE_S if tls else None,
            )
        except OSError:
            # The client has disconnected.
            connection.close()

    def adopt_open(
        self, transport: asyncio.Transport, early: bytes, *, hops: int, peer: str
    ) -> bool:
        """Serve an open connection to another worker. See `adopt`.

        Return False if file descriptors are short.
        """
        has_room = self.has_room(transport.get_extra_info("socket"))
        if has_room:
            _Adopted(self._first_handler, early, hops, peer).connection_made(transport)
        return has_room

    def has_room(self, connection: socket.socket) -> bool:
        """Return whether a new connection can be served; log it if not.

        If descriptors are short, an old connection without a request is closed for the new one.
        """
        if connection.fileno() < self.limit or self.make_handler.shed():
            return True
        self.refused += 1
        log.error(
            "Refused a new connection: all file descriptors but the reserve are in use; raise the"
            " limit of open files"
        )
        return False
