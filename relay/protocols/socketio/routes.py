"""The paths `/notifications/` and `/socket.io/`, and the clients of this worker."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiohttp import web
from typing_extensions import override

from relay.core.model import Channel
from relay.core.slices import for_each
from relay.doorkit.contract import FrontDoor, Mounted
from relay.doorkit.engineio_clients import EngineIoClients
from relay.doorkit.first_subscriptions import DeferredLog
from relay.doorkit.open_connections import OpenConnections
from relay.doorkit.origins import AllowedOrigins, any_origin
from relay.doorkit.recoverable_sessions import RecoverableSessions
from relay.protocols.socketio.client import RoomIds, SocketClient
from relay.protocols.socketio.emitter_commands import EmitterCommands
from relay.protocols.socketio.encoders import OffsetEncoder, RecoverableEncoder, SocketEncoder
from relay.protocols.socketio.rooms import read_rooms
from relay.protocols.socketio.settings import SocketIoSettings
from relay.rights.token import TokenReader

if TYPE_CHECKING:
    from relay.doorkit.contract import DoorContext, Listener

_log = logging.getLogger(__name__)


class MountedSocketIo(Mounted):
    """The Socket.IO protocol while it is served."""

    listeners: Sequence[Listener] = ()
    producers: Sequence[web.AbstractRouteDef] = ()
    drain_s: float | None = None

    def __init__(self, context: DoorContext, settings: SocketIoSettings) -> None:
        self.context = context
        self._use(settings)
        self._encoders = (
            SocketEncoder(3, settings.namespace),
            SocketEncoder(4, settings.namespace),
            OffsetEncoder(4, settings.namespace),
            RecoverableEncoder(4, settings.namespace),
        )
        self.sessions: RecoverableSessions[RoomIds] = RecoverableSessions(
            context, "socketio", settings.recovery_s, read_rooms
        )
        self.deferred = DeferredLog("Socket.IO")
        self.clients = EngineIoClients(
            context,
            timing=settings.timing(),
            # Pages of every origin may connect, as in Socket.IO 2: they need a token to receive
            # events, and the cookie is accepted from allowed origins only.
            cors=any_origin,
            open_connections=OpenConnections(context.metrics.connections.labels("socketio")),
            sessions=self.sessions,
            create=lambda engine, request: SocketClient(self, engine, request),
        )
        self.routes: list[web.AbstractRouteDef] = [
            web.route("*", path, self.clients.endpoint.handle) for path in settings.path_list()
        ]
        scripts = r"/{script:socket\.io(?:\.[a-z]+)*\.js}"
        self.routes += [
            web.get(path.rstrip("/") + scripts, _no_script)
            for path in settings.path_list()
            if path.endswith("/")
        ]
        context.on_command("socketio", EmitterCommands(self.clients))
        context.on_drop(self._rights_changed)

    @override
    def reload(self, settings: SocketIoSettings) -> None:
        # Namespace and paths change at a restart only.
        self._use(settings)
        self.clients.endpoint.reload(settings.timing())

    def _use(self, settings: SocketIoSettings) -> None:
        self.tokens = TokenReader(
            settings.jwt(), source="[protocol:socketio] secret (signs clients' JWTs)"
        )
        self.settings = settings
        self.origins = AllowedOrigins(settings.origins(), "[protocol:socketio] allowed_origins")

    @override
    async def closed(self) -> None:
        await self.clients.closed()

    def encoder(self, version: int, *, recovers: bool) -> SocketEncoder:
        """Return the encoder for clients of this Engine.IO version. `recovers` is True if the
        client is known to support connection state recovery."""
        if version == 3:
            return self._encoders[0]
        if not self.sessions.recovery_s:
            return self._encoders[1]
        return self._encoders[3 if recovers else 2]

    def _rights_changed(self, channel: Channel | None, user: str | None) -> None:
        for_each(
            list(self.clients),
            lambda client: client.rights_changed(channel, user),
            lambda work: self.context.spawn(work, name="socketio rights"),
        )


async def _no_script(request: web.Request) -> web.Response:
    name = request.match_info["script"]
    text = f"relay does not serve {name}: load socket.io-client from your own server or a CDN\n"
    return web.Response(status=404, text=text)


class SocketIoDoor(FrontDoor):
    """Serves the Socket.IO protocol."""

    @override
    def mount(self, context: DoorContext, settings: SocketIoSettings) -> MountedSocketIo:
        return MountedSocketIo(context, settings)


DOOR = SocketIoDoor()
