"""The private channel: PHP with the admin key, from an authorised host, by websocket or POST."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
from hashlib import sha256
from typing import TYPE_CHECKING

from aiohttp import web

from relay.core.errors import LimitExceeded, RelayError
from relay.core.reasons import Reason
from relay.protocols.pydio import private_messages
from relay.protocols.pydio.hosts import AuthorisedHosts
from relay.protocols.pydio.settings import PydioSettings, split
from relay.transports.socket import websocket
from relay.transports.socket.bodies import BodyRejected, read_body
from relay.transports.socket.take_over import take_over

if TYPE_CHECKING:
    from relay.doorkit.contract import DoorContext
    from relay.protocols.pydio.outbound import Outbound
    from relay.transports.socket.reaper import Reaper

_log = logging.getLogger(__name__)

ADMIN_KEY = "Admin-Key"
_VERSIONS = frozenset({"8", "13"})
# Eight random bytes directly behind the head of a handshake of version 8: the third key of an older
# draft (vendor/phpws/websocket.client.php, `serializeHeaders`, Pydio 6.4.2).
_JUNK_BYTES = 8
# How long a stop waits for PHP requests that are under way.
_LAST_REQUESTS_S = 1.0


class PrivateChannel:
    """PHP's way in."""

    def __init__(
        self,
        context: DoorContext,
        settings: PydioSettings,
        outbound: Outbound,
        reaper: Reaper,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._context = context
        self._outbound = outbound
        self._reaper = reaper
        self._clock = loop.time
        self._open: set[websocket.WebSocketConnection] = set()
        self._none_open = asyncio.Event()
        self.reload(settings)

    def reload(self, settings: PydioSettings) -> None:
        """For connections from now on."""
        self._settings = settings
        # Never empty: see `PydioDoor.mount`; a reload that empties it closes the channel.
        self._key = settings.key.get_secret_value().encode() or os.urandom(32)
        self._hosts = AuthorisedHosts(split(settings.authorised_hosts), clock=self._clock)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The one handler of its paths."""
        peer = _peer(request)
        # Both are always looked at, so that neither tells how the other went.
        allowed = await self._hosts.allow(peer)
        keyed = self._has_key(request)
        if not (allowed and keyed):
            _log.warning(
                "Rejected a request of %s on Pydio's private path: %s",
                peer or "an unknown address",
                "wrong Admin-Key, see [protocol:pydio] key"
                if allowed
                else "not in [protocol:pydio] authorised_hosts",
            )
            return self._refused(403, Reason.FORBIDDEN, "not allowed")
        if request.method == "POST":
            return await self._post(request, peer)
        accepted = websocket.accept_headers(request, _VERSIONS)
        if isinstance(accepted, web.Response):
            return accepted
        # One worker reads the connections of all, so that a message never overtakes those of the
        # PHP requests before it: PHP does not wait until a message has been appended.
        return self._context.gather(request) or self._connect(request, accepted, peer)

    async def closed(self) -> None:
        """Return once PHP has ended the requests under way, or after a second."""
        if self._open:
            self._none_open.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_REQUESTS_S):
                    await self._none_open.wait()

    def _has_key(self, request: web.Request) -> bool:
        shown = request.headers.get(ADMIN_KEY, "").encode(errors="surrogateescape")
        # Of digests: the comparison itself would tell the key's length.
        return hmac.compare_digest(sha256(shown).digest(), sha256(self._key).digest())

    # ---- websocket --------------------------------------------------------------------------

    def _connect(self, request: web.Request, accepted: bytes, peer: str) -> web.StreamResponse:
        old = request.headers.get("Sec-WebSocket-Version", "").strip() == "8"
        # No heartbeat: PHP reads nothing while it works, and hangs up when its request is over.
        socket = websocket.WebSocketConnection(
            buffer_bytes=self._context.client_buffer_bytes,
            max_frame_bytes=self._settings.private_max_bytes,
            reaper=self._reaper,
            skip_bytes=_JUNK_BYTES if old else 0,
        )

        def received(text: bytes) -> None:
            try:
                self._outbound.add(private_messages.read(text))
            except private_messages.Unreadable as exc:
                self._context.metrics.refused.labels(Reason.BAD_REQUEST).inc()
                _log.warning("Dropped a message of %s on Pydio's private path: %s", peer, exc)

        def closed() -> None:
            self._open.discard(socket)
            if not self._open:
                self._none_open.set()

        self._open.add(socket)
        socket.on_text = received
        socket.on_closed = closed
        return take_over(request, accepted, socket)

    # ---- POST -------------------------------------------------------------------------------

    async def _post(self, request: web.Request, peer: str) -> web.Response:
        try:
            limit_bytes = self._settings.private_max_bytes
            body = await read_body(request, limit_bytes, "[protocol:pydio] private_max_bytes")
            publication = private_messages.read(body)
            entry_id = await self._context.publish(
                publication.channel,
                publication.data,
                to=publication.to,
                extra=publication.extra,
            )
        except (private_messages.Unreadable, ValueError) as exc:
            _log.warning("Dropped a message of %s on Pydio's private path: %s", peer, exc)
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
        self._context.metrics.refused.labels(code).inc()
        return web.json_response({"error": {"code": code, "message": text}}, status=status)


def _peer(request: web.Request) -> str:
    address = request.transport.get_extra_info("peername") if request.transport else None
    return str(address[0]) if isinstance(address, tuple) else ""
