"""The private channel: messages from PHP over websocket or POST.

PHP must connect from an authorised host and send the admin key.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
from collections import deque
from collections.abc import Callable
from hashlib import sha256
from typing import TYPE_CHECKING

from aiohttp import web

from relay.config.lists import split
from relay.core.errors import LimitExceeded, RelayError
from relay.core.reasons import Reason
from relay.core.slices import next_slice
from relay.doorkit.open_connections import OpenConnections
from relay.protocols.pydio import private_messages
from relay.protocols.pydio.hosts import AuthorisedHosts
from relay.protocols.pydio.outbound import LIMIT_BYTES
from relay.protocols.pydio.settings import PydioSettings
from relay.transports.socket import websocket
from relay.transports.socket.bodies import BodyRejected, read_body
from relay.transports.socket.take_over import take_over

if TYPE_CHECKING:
    from relay.doorkit.contract import DoorContext, Spawn
    from relay.protocols.pydio.outbound import OutboundQueue
    from relay.transports.socket.reaper import Reaper

_log = logging.getLogger(__name__)

ADMIN_KEY = "Admin-Key"
_VERSIONS = frozenset({"8", "13"})
# With version 8, PHP sends eight random bytes after the handshake's headers: the third key of an
# older draft (vendor/phpws/websocket.client.php, `serializeHeaders`, Pydio 6.4.2).
_JUNK_BYTES = 8
# On shutdown, wait at most this time for running PHP requests.
_LAST_REQUESTS_S = 1.0


class PrivateChannel:
    """Receives messages of PHP and queues them for the streams."""

    def __init__(
        self,
        context: DoorContext,
        settings: PydioSettings,
        outbound: OutboundQueue,
        reaper: Reaper,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._context = context
        self._outbound = outbound
        self._reaper = reaper
        self._clock = loop.time
        self._open = OpenConnections()
        self._unread = _UnreadMessages(outbound.add, context.spawn)
        self.reload(settings)

    def reload(self, settings: PydioSettings) -> None:
        """Use new settings for new connections."""
        self._settings = settings
        # An empty key must not match an empty header. Without a key the protocol is disabled at the
        # start; if a reload removes the key, no request is accepted.
        self._key = settings.key.get_secret_value().encode() or os.urandom(32)
        self._hosts = AuthorisedHosts(split(settings.authorised_hosts), clock=self._clock)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Handle all requests to the private path."""
        peer = _peer(request)
        # Check both in any case, so that the response time does not reveal which one failed.
        allowed = await self._hosts.allow(peer)
        keyed = self._has_key(request)
        if not (allowed and keyed):
            if allowed:
                reason = "wrong Admin-Key, see [protocol:pydio] key"
            elif peer:
                reason = "not in [protocol:pydio] authorised_hosts"
            else:
                reason = "its address cannot be compared with [protocol:pydio] authorised_hosts"
            _log.warning(
                "Rejected a request from %s on Pydio's private path: %s",
                peer or "a client that has disconnected",
                reason,
            )
            return self._refused(403, Reason.FORBIDDEN, "not allowed")
        if request.method == "POST":
            return await self._post(request, peer)
        accepted = websocket.accept_headers(request, _VERSIONS)
        if isinstance(accepted, web.Response):
            return accepted
        # PHP does not wait until a message has been appended. One worker per host reads all of its
        # connections, so that messages of consecutive PHP requests keep their order.
        return await self._context.gather(request) or self._connect(request, accepted, peer)

    async def closed(self) -> None:
        """Wait until PHP has closed its connections, at most a second."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_REQUESTS_S):
                await self._open.wait_closed()
        await self._unread.wait_empty()

    def _has_key(self, request: web.Request) -> bool:
        shown = request.headers.get(ADMIN_KEY, "").encode(errors="surrogateescape")
        # Compare digests: comparing the keys themselves would reveal the key's length.
        return hmac.compare_digest(sha256(shown).digest(), sha256(self._key).digest())

    # ---- websocket --------------------------------------------------------------------------

    def _connect(self, request: web.Request, accepted: bytes, peer: str) -> web.StreamResponse:
        old = request.headers.get("Sec-WebSocket-Version", "").strip() == "8"
        limit_bytes = self._settings.private_max_bytes
        # No heartbeat: PHP does not read while its request runs, and closes the connection at its
        # end.
        socket = websocket.WebSocketConnection(
            buffer_bytes=self._context.client_buffer_bytes,
            max_frame_bytes=limit_bytes,
            reaper=self._reaper,
            skip_bytes=_JUNK_BYTES if old else 0,
            # One message must not affect the others of the same PHP request. PHP's strings are
            # bytes: paths have the encoding of the server's file system.
            lenient=True,
        )

        def dropped(reason: str) -> None:
            self._context.metrics.rejected("pydio", Reason.BAD_REQUEST)
            _log.warning("Dropped a message from %s on Pydio's private path: %s", peer, reason)

        self._open.opened()
        socket.on_text = lambda text: self._unread.add(text, dropped)
        socket.on_too_large = lambda: dropped(
            f"more than {limit_bytes} bytes, see [protocol:pydio] private_max_bytes"
        )
        socket.on_closed = self._open.closed
        return take_over(request, accepted, socket)

    # ---- POST -------------------------------------------------------------------------------

    async def _post(self, request: web.Request, peer: str) -> web.Response:
        try:
            limit_bytes = self._settings.private_max_bytes
            body = await read_body(request, limit_bytes, "[protocol:pydio] private_max_bytes")
            publication = await _read(body)
            entry_id = await self._context.publish(
                publication.channel,
                publication.data,
                to=publication.to,
                extra=publication.extra,
            )
        except (private_messages.InvalidMessage, ValueError) as exc:
            _log.warning("Dropped a message from %s on Pydio's private path: %s", peer, exc)
            return self._refused(400, Reason.BAD_REQUEST, str(exc))
        except BodyRejected as exc:
            code = Reason.LIMIT_EXCEEDED if exc.status == 413 else Reason.BAD_REQUEST
            return self._refused(exc.status, code, str(exc))
        except LimitExceeded as exc:
            return self._refused(413, exc.code, str(exc))
        except RelayError:
            return self._refused(503, Reason.UNAVAILABLE, "not appended; try again")
        return web.json_response({"channel": publication.channel, "id": str(entry_id)})

    # ---- both -------------------------------------------------------------------------------

    def _refused(self, status: int, code: Reason, text: str) -> web.Response:
        self._context.metrics.rejected("pydio", code)
        return web.json_response({"error": {"code": code, "message": text}}, status=status)


class _UnreadMessages:
    """Parses messages in the order of their arrival, large ones in another thread."""

    def __init__(self, then: Callable[[private_messages.Publication], None], spawn: Spawn) -> None:
        self._then = then
        self._spawn = spawn
        self._waiting: deque[tuple[bytes, Callable[[str], None]]] = deque()
        self._bytes = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def add(self, body: bytes, dropped: Callable[[str], None]) -> None:
        """Parse a message and pass it on. If it is invalid, call `dropped` with the reason."""
        if self._empty.is_set() and len(body) <= private_messages.LARGE_BYTES:
            try:
                self._then(private_messages.read(body))
            except private_messages.InvalidMessage as exc:
                dropped(str(exc))
        elif self._bytes + len(body) > LIMIT_BYTES:
            dropped(f"more than {LIMIT_BYTES} bytes of messages arrive faster than they are read")
        else:
            self._bytes += len(body)
            self._waiting.append((body, dropped))
            if self._empty.is_set():
                self._empty.clear()
                _ = self._spawn(self._run(), name="pydio messages")

    async def wait_empty(self) -> None:
        """Wait until all messages have been parsed."""
        await self._empty.wait()

    async def _run(self) -> None:
        while self._waiting:
            body, dropped = self._waiting.popleft()
            try:
                self._then(await _read(body))
            except private_messages.InvalidMessage as exc:
                dropped(str(exc))
            self._bytes -= len(body)
        self._empty.set()


async def _read(body: bytes) -> private_messages.Publication:
    if len(body) > private_messages.LARGE_BYTES:
        return await asyncio.to_thread(private_messages.read, body)
    await next_slice()
    return private_messages.read(body)


def _peer(request: web.Request) -> str:
    address = request.transport.get_extra_info("peername") if request.transport else None
    return str(address[0]) if isinstance(address, tuple) else ""
