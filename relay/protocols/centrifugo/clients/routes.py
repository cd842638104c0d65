"""Where clients come in: the raw websocket at `/connection/websocket`, SockJS at `/connection`."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING

from aiohttp import web

from relay.core.model import ZERO_ID
from relay.hub.recovery import Notice
from relay.protocols.centrifugo import encoders
from relay.protocols.centrifugo.clients.connection import CentrifugoConnection
from relay.protocols.centrifugo.server_state import ServerState
from relay.transports.socket import deflate, websocket
from relay.transports.socket.heartbeat import Heartbeat
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import take_over
from relay.transports.sockjs.routes import SockJs
from relay.transports.sockjs.sessions import SockJsOptions

if TYPE_CHECKING:
    from relay.core.model import Channel
    from relay.doorkit.contract import DoorContext
    from relay.hub.session import Session
    from relay.protocols.centrifugo.encoders import CentrifugoEncoder
    from relay.protocols.centrifugo.settings import CentrifugoSettings
    from relay.transports.socket.client_socket import ClientSocket
    from relay.transports.socket.exchange import HttpRequest
    from relay.transports.sockjs.session import SockJsSession

# v1 waits for a pong for ten ninths of the interval (libcentrifugo/server/handlers.go).
_PONG_SHARE = 9
_PING = b"ping"
# SockJS packs messages into JSON once more, where a character may take six, and several at a time.
_ESCAPED = 6
_FRAME_BYTES = 4096


class ClientRoutes:
    """The clients of this worker."""

    def __init__(self, context: DoorContext, settings: CentrifugoSettings, prefix: str) -> None:
        """`prefix` stands before all of their paths."""
        loop = asyncio.get_running_loop()
        self.door = ServerState(context, settings, clock=time.time, call_later=loop.call_later)
        context.hub.on_not_subscribed[encoders.DOOR] = tell_unsubscribed
        self._gauge = context.metrics.connections.labels(encoders.DOOR)
        self._reaper = Reaper()
        self._open = 0
        self._last_closed = asyncio.Event()
        # Server options: v1 reads these at start only.
        self._compressed: CentrifugoEncoder | None = None
        if settings.websocket_compression:
            self._compressed = encoders.compressed(settings)
        self._beat = Heartbeat(
            interval_s=settings.ping_interval,
            beat=websocket.frame_ping(_PING),
            deadline_s=settings.ping_interval / _PONG_SHARE,
        )

        self._sockjs = SockJs(
            door=encoders.DOOR,
            prefix=f"{prefix}/connection",
            options=SockJsOptions(
                sockjs_url=settings.sockjs_url,
                heartbeat_s=settings.sockjs_heartbeat_delay,
                max_request_bytes=settings.client_request_max_size * _ESCAPED + _FRAME_BYTES,
                buffer_bytes=settings.client_queue_max_size,
            ),
            accept=self._accept,
            bus=context.bus,
            store=context.store,
            spawn=context.spawn,
        )
        self.routes: list[web.AbstractRouteDef] = [
            # Before SockJS, as in v1.
            web.route("*", f"{prefix}/connection/websocket", self._websocket),
            *self._sockjs.routes,
        ]

    def reload(self, settings: CentrifugoSettings) -> None:
        """See `relay.doorkit.contract.Mounted`."""
        self.door.reload(settings)

    async def closed(self) -> None:
        """See `relay.doorkit.contract.Mounted`. Who has not said who he is, is cut."""
        for connection in list(self.door.unauthenticated):
            connection.cut()
        await self._sockjs.closed()
        if self._open:
            self._last_closed.clear()
            await self._last_closed.wait()

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        self.door.stats.count("http_raw_ws_num_requests")
        squeezed = self._compressed if deflate.is_offered(request) else None
        head = websocket.accept_headers(request, compress=squeezed is not None)
        if isinstance(head, web.Response):
            return _bad_request()
        settings = self.door.settings
        socket = websocket.WebSocketConnection(
            buffer_bytes=settings.client_queue_max_size,
            max_frame_bytes=settings.client_request_max_size,
            reaper=self._reaper,
            heartbeat=self._beat,
            compressed=squeezed is not None,
            only_pong_counts=True,
        )
        connection = CentrifugoConnection(
            self.door, squeezed or encoders.WEBSOCKET, str(uuid.uuid4())
        )
        socket.on_text = socket.on_binary = connection.on_frame
        self._join(socket, connection)
        connection.attached(socket, socket)
        return take_over(request, head, socket)

    def _accept(self, session: SockJsSession, asked: HttpRequest) -> None:
        del asked
        self.door.stats.count("http_sockjs_num_requests")
        connection = CentrifugoConnection(self.door, encoders.SOCKJS, str(uuid.uuid4()))
        session.on_text = connection.on_frame
        session.on_oversized = connection.oversized
        self._join(session, connection)
        connection.attached(session)

    def _join(self, socket: ClientSocket | SockJsSession, connection: CentrifugoConnection) -> None:
        self._count(1)

        def closed() -> None:
            self._count(-1)
            connection.gone()

        socket.on_full = connection.filled
        socket.on_drained = connection.drained
        socket.on_closed = closed

    def _count(self, change: int) -> None:
        self._open += change
        self._gauge.set(self._open)
        if not self._open:
            self._last_closed.set()


def tell_unsubscribed(session: Session, channel: Channel) -> None:
    """v1 sends the push whether the client was subscribed or not."""
    notice = Notice("revoked", "unsubscribed", ZERO_ID, ZERO_ID)
    session.reply(session.encoder.notice(channel, notice) or b"")


def _bad_request() -> web.Response:
    return web.Response(
        status=400,
        text="Bad Request\n",
        content_type="text/plain",
        charset="utf-8",
        headers={"X-Content-Type-Options": "nosniff"},
    )
