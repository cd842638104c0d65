"""Client endpoints: WebSocket at `/connection/websocket`, SockJS at `/connection`."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING

from aiohttp import web

from relay.doorkit.http_status import go_error
from relay.doorkit.open_connections import OpenConnections
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
    from relay.doorkit.contract import DoorContext
    from relay.protocols.centrifugo.encoders import CentrifugoEncoder
    from relay.protocols.centrifugo.settings import CentrifugoSettings
    from relay.transports.socket.client_socket import ClientSocket
    from relay.transports.socket.exchange import HttpRequest
    from relay.transports.sockjs.session import SockJsSession

# v1 waits for a pong for ten ninths of the interval (libcentrifugo/server/handlers.go).
_PONG_SHARE = 9
_PING = b"ping"
# SockJS encodes messages as JSON strings, several at a time. One character may take six.
_ESCAPED = 6
_FRAME_BYTES = 4096


class ClientRoutes:
    """Accepts the clients of one worker."""

    def __init__(self, context: DoorContext, settings: CentrifugoSettings, prefix: str) -> None:
        """`prefix` is put in front of all paths."""
        loop = asyncio.get_running_loop()
        self.server = ServerState(context, settings, clock=time.time, call_later=loop.call_later)
        self._open = OpenConnections(context.metrics.connections.labels(encoders.DOOR))
        self._reaper = Reaper()
        # Like v1, read these settings at start only.
        self._compressed: CentrifugoEncoder | None = None
        if settings.websocket_compression:
            self._compressed = encoders.compressed(settings)
        self._heartbeat = Heartbeat(
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
            address=context.bus.address,
            store=context.store,
            forward=context.forward,
            spawn=context.spawn,
        )
        context.clock.on_jump.append(self._sockjs.on_clock_jump)
        self.routes: list[web.AbstractRouteDef] = [
            # Before SockJS, as in v1.
            web.route("*", f"{prefix}/connection/websocket", self._websocket),
            *self._sockjs.routes,
        ]

    def reload(self, settings: CentrifugoSettings) -> None:
        """Apply new settings."""
        self.server.reload(settings)

    async def closed(self) -> None:
        """Abort unauthenticated clients and wait until all clients have disconnected."""
        for connection in list(self.server.unauthenticated):
            connection.abort()
        await self._open.wait_closed()

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        self.server.stats.count("http_raw_ws_num_requests")
        compressed = self._compressed if deflate.is_offered(request) else None
        head = websocket.accept_headers(request, compress=compressed is not None)
        if isinstance(head, web.Response):
            return go_error(400, "Bad Request")
        settings = self.server.settings
        socket = websocket.WebSocketConnection(
            buffer_bytes=settings.client_queue_max_size,
            max_frame_bytes=settings.client_request_max_size,
            reaper=self._reaper,
            heartbeat=self._heartbeat,
            compressed=compressed is not None,
            only_pong_counts=True,
        )
        encoder = compressed or encoders.WEBSOCKET
        connection = CentrifugoConnection(self.server, encoder, str(uuid.uuid4()))
        socket.on_text = socket.on_binary = connection.on_frame
        self._connect(socket, connection)
        connection.on_open(socket, socket)
        return take_over(request, head, socket)

    def _accept(self, session: SockJsSession, request: HttpRequest) -> None:
        del request
        self.server.stats.count("http_sockjs_num_requests")
        connection = CentrifugoConnection(self.server, encoders.SOCKJS, str(uuid.uuid4()))
        session.on_text = connection.on_frame
        session.on_oversized = connection.reject_oversized
        self._connect(session, connection)
        connection.on_open(session)

    def _connect(
        self, transport: ClientSocket | SockJsSession, connection: CentrifugoConnection
    ) -> None:
        self._open.opened()

        def closed() -> None:
            self._open.closed()
            connection.on_closed()

        transport.on_full = connection.on_full
        transport.on_drained = connection.on_drained
        transport.on_closed = closed
