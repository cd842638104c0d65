"""Connections between workers of different hosts.

A worker that has read a request for a session of another host connects to the internal address of
the session's worker and sends one line, followed by the request:

    relay1 <HMAC-SHA256 of the rest, hexadecimal> <JSON object>

The key of the HMAC is shared by all workers through Redis. The object names the receiver, so that
the line is useless elsewhere. The receiver answers with one byte and then handles the request as if
it had read it from the client. It closes the connection if the line is not valid. Nothing else is
served on the internal address.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import cast

from typing_extensions import override

from relay.core.errors import WorkerUnreachable
from relay.transports.between_workers.splice import ACCEPTED, OwnerEnd
from relay.transports.socket.deadlines import Deadlines

_log = logging.getLogger(__name__)

_VERSION = b"relay1"
_LINE_BYTES = 1024
_LINE_S = 5.0
_MAX_STRANGERS = 64
_CONNECT_S = 2.0
# A host that has lost its network or power is detected within this time.
_SILENCE_S = 10

Key = Callable[[], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """The first line of a connection between workers.

    Attributes:
        receiver: Address of the worker that the request is for.
        listener: Name of the listener that the client connected to.
        hops: Number of times that the request has been passed on.
        peer: Address of the client.
    """

    receiver: str
    listener: str
    hops: int
    peer: str

    def line(self, key: bytes) -> bytes:
        """Return the line."""
        text = json.dumps(asdict(self)).encode()
        return b" ".join((_VERSION, _mac(key, text), text)) + b"\n"

    @classmethod
    def parse(cls, line: bytes, key: bytes, receiver: str) -> Introduction:
        """Parse a line for this receiver. Raise ValueError if it is not valid."""
        version, mac, text = line.split(b" ", 2)
        if version != _VERSION or not key or not hmac.compare_digest(mac, _mac(key, text)):
            raise ValueError("wrong version or key")
        found = cls(**json.loads(text))
        if found.receiver != receiver:
            raise ValueError("sent to another worker")
        return found


def _mac(key: bytes, text: bytes) -> bytes:
    return hmac.new(key, text, hashlib.sha256).hexdigest().encode()


# Serves the connection, with the data behind the line. Returns False if that is not possible.
Take = Callable[[asyncio.Transport, Introduction, bytes], bool]


async def connect(
    address: tuple[str, int], introduction: Introduction, key: bytes, data: bytes
) -> OwnerEnd:
    """Send a request to another worker; return once it has been accepted.

    Raise WorkerUnreachable if it has not been accepted.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_CONNECT_S):
            transport, owner = await loop.create_connection(
                lambda: OwnerEnd(is_accepted=False), *address
            )
    except (OSError, TimeoutError) as exc:
        raise _unreachable(introduction, address, str(exc) or "timeout") from exc
    _detect_silence(transport)
    transport.write(introduction.line(key) + data)
    try:
        is_accepted = await owner.accepted
    except asyncio.CancelledError:
        transport.abort()
        raise
    if not is_accepted:
        transport.abort()
        raise _unreachable(introduction, address, "it did not accept the request")
    return owner


def _unreachable(
    introduction: Introduction, address: tuple[str, int], cause: str
) -> WorkerUnreachable:
    host, port = address
    receiver = introduction.receiver
    _log.warning(
        "Could not pass on a request to worker %s at %s:%d: %s", receiver, host, port, cause
    )
    return WorkerUnreachable(cause)


def _detect_silence(transport: asyncio.BaseTransport) -> None:
    connection = transport.get_extra_info("socket")
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE_S // 2),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENCE_S // 5),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_S * 1000),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    ):
        connection.setsockopt(level, option, value)


class InternalListener:
    """Accepts requests that workers of other hosts pass on to this worker."""

    def __init__(self, worker: str, key: Key, take: Take) -> None:
        """`worker` is the address of this worker."""
        self.worker = worker
        self.key = key
        self.take = take
        self.strangers: Deadlines[_Stranger] = Deadlines(_LINE_S, _Stranger.abort)
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int, sock: socket.socket | None = None) -> int:
        """Listen; return the port. Raise OSError if the address is in use or not available.

        `sock` listens on this address already.
        """
        loop = asyncio.get_running_loop()
        if sock is None:
            self._server = await loop.create_server(lambda: _Stranger(self), host, port)
        else:
            self._server = await loop.create_server(lambda: _Stranger(self), sock=sock)
        found: int = self._server.sockets[0].getsockname()[1]
        return found

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """The listening sockets."""
        return self._server.sockets if self._server is not None else ()

    def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()


class _Stranger(asyncio.Protocol):
    """A connection whose line has not been received yet."""

    __slots__ = ("_listener", "_read", "_transport")

    def __init__(self, listener: InternalListener) -> None:
        self._listener = listener
        self._read = b""
        self._transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        strangers = self._listener.strangers
        strangers.add(self)
        oldest = strangers.oldest(min_age_s=0.0)
        if len(strangers) > _MAX_STRANGERS and oldest is not None:
            oldest.abort()

    @override
    def data_received(self, data: bytes) -> None:
        self._read += data
        line, found, early = self._read.partition(b"\n")
        if not found and len(line) <= _LINE_BYTES:
            return
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        try:
            listener = self._listener
            introduction = Introduction.parse(line, listener.key(), listener.worker)
        except (ValueError, TypeError) as exc:
            peer = transport.get_extra_info("peername")
            _log.warning("Closed a connection from %s to the internal address: %s", peer[0], exc)
            self.abort()
            return
        self._listener.strangers.remove(self)
        self._transport = None
        transport.write(ACCEPTED)
        if not self._listener.take(transport, introduction, early):
            transport.abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.strangers.remove(self)
        self._transport = None

    def abort(self) -> None:
        """Close the connection."""
        self._listener.strangers.remove(self)
        if self._transport is not None:
            self._transport.abort()
