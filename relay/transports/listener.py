"""Listening sockets that stay sane when descriptors run out.

Measured with all descriptors in use: uvloop closes new connections at once by means of one reserve
descriptor, but would close the listening socket itself if another thread snatched that one;
asyncio (3.11) tries `backlog` times a second to accept and logs a traceback each time, 4,096 of
them with ours. And in both the relay could not reach Redis again. So the last descriptors are kept
free: whoever comes then is closed at once, those who are there notice nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from typing import TYPE_CHECKING, cast

from aiohttp import web

if TYPE_CHECKING:
    import ssl

log = logging.getLogger(__name__)

# For Redis, name lookups and log files, and for what asyncio accepts before it can be refused.
_SPARE_DESCRIPTORS = 64
# asyncio accepts up to `backlog` connections in one turn, and fails as often in one turn too.
_ASYNCIO_BATCH = 8
_LOG_EVERY_S = 60.0
_HANDSHAKE_S = 15.0


def raise_open_file_limit() -> int:
    """Raise the soft limit of open files to the hard one; the limit that now holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            # Some systems say "unlimited" and refuse it.
            return soft
    return hard


class _Refused(asyncio.Protocol):
    """A connection for which there is no descriptor to spare."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it: a client that knows at once can try another host."""
        if isinstance(transport, asyncio.Transport):
            transport.abort()
        else:
            transport.close()


class GuardedSite(web.BaseSite):
    """A TCP site of an aiohttp runner that keeps `spare` descriptors free.

    `refused` counts the connections that were closed for that reason.
    """

    def __init__(
        self,
        runner: web.BaseRunner,
        host: str,
        port: int,
        *,
        backlog: int = 4096,
        ssl_context: ssl.SSLContext | None = None,
        reuse_port: bool = False,
        spare: int = _SPARE_DESCRIPTORS,
    ) -> None:
        super().__init__(runner, ssl_context=ssl_context, backlog=backlog)
        self._factory = cast("web.Server", runner.server)  # BaseSite has looked: it is set up
        self._host = host
        self._port = port
        self._reuse_port = reuse_port
        # A test's or a container's limit may be small: an eighth of it then.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        unlimited = limit == resource.RLIM_INFINITY
        self._limit = float("inf") if unlimited else limit - min(spare, limit // 8)
        self._probe = -1
        self._logged_at = float("-inf")
        self.refused = 0

    @property
    def name(self) -> str:
        """The address as a URL, with the port that was bound."""
        scheme = "https" if self._ssl_context else "http"
        host = f"[{self._host}]" if ":" in self._host else self._host or "0.0.0.0"  # noqa: S104 - only shown
        return f"{scheme}://{host}:{self._port}"

    @property
    def port(self) -> int:
        """The port that was bound, where 0 was asked for."""
        return self._port

    async def start(self) -> None:
        """Bind and listen; OSError where the address is taken or is not ours."""
        await super().start()
        loop = asyncio.get_running_loop()
        batch = _ASYNCIO_BATCH if isinstance(loop, asyncio.BaseEventLoop) else self._backlog
        # Before the first connection comes; cleanup() stops a site that could not start too.
        self._probe = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        server = await loop.create_server(
            self._make_protocol,
            self._host or None,
            self._port,
            ssl=self._ssl_context,
            ssl_handshake_timeout=_HANDSHAKE_S if self._ssl_context else None,
            backlog=batch,
            reuse_address=True,
            reuse_port=self._reuse_port or None,
        )
        self._server = server
        for listening in server.sockets:
            self._port = listening.getsockname()[1]
            # The kernel's queue is what a reconnect storm needs; listening again only sets that.
            with socket.socket(fileno=os.dup(listening.fileno())) as again:
                again.listen(self._backlog)

    async def stop(self) -> None:
        """Stop listening; open connections go on."""
        await super().stop()
        if self._probe >= 0:
            os.close(self._probe)
            self._probe = -1

    def _make_protocol(self) -> asyncio.BaseProtocol:
        """Called by the loop for each connection, when it is about to be or has been accepted."""
        if self._is_short():
            self.refused += 1
            self._complain()
            return _Refused()
        return self._factory()

    def _is_short(self) -> bool:
        # The kernel hands out the lowest free number, so one more descriptor tells how many are
        # left, whoever opened the others; dup and close take about a microsecond.
        try:
            number = os.dup(self._probe)
        except OSError:
            return True
        os.close(number)
        return number >= self._limit

    def _complain(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            log.error(
                "new connections are refused (%d so far): all but the last of the descriptors are"
                " in use; raise the limit of open files",
                self.refused,
            )
