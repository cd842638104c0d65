"""Entry point of the Centrifugo protocol: distributes its routes over listeners."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from relay.doorkit.contract import FrontDoor, Listener, Mounted
from relay.protocols.centrifugo.administrators.node import NodeReport
from relay.protocols.centrifugo.administrators.routes import AdminRoutes
from relay.protocols.centrifugo.api.executor import CommandExecutor
from relay.protocols.centrifugo.api.routes import ApiRoutes
from relay.protocols.centrifugo.api.server_commands import ServerCommands
from relay.protocols.centrifugo.clients.routes import ClientRoutes
from relay.protocols.centrifugo.settings import CentrifugoSettings

if TYPE_CHECKING:
    from aiohttp import web

    from relay.doorkit.contract import DoorContext

_log = logging.getLogger(__name__)

_INSECURE = {
    "insecure": "clients need no token",
    "insecure_api": "anyone who can reach /api/ may publish and disconnect",
    "insecure_admin": "anyone who can reach the admin socket is an administrator",
}


class MountedCentrifugo(Mounted):
    """The running protocol: clients, API and administrators."""

    drain_s: float | None = None

    def __init__(self, context: DoorContext, settings: CentrifugoSettings) -> None:
        prefix = settings.http_prefix.rstrip("/")
        self._clients = ClientRoutes(context, settings, prefix)
        server = self._clients.server
        node = NodeReport(server)
        _ = context.spawn(node.run(), name="centrifugo node")
        executor = CommandExecutor(server, ServerCommands(server, node))
        self._api = ApiRoutes(server, executor, prefix)
        self._admin = AdminRoutes(server, executor, settings, prefix)
        by_port: dict[int, list[web.AbstractRouteDef]] = {0: [*self._clients.routes]}
        parts = (settings.api_port, self._api.routes), (settings.admin_port, self._admin.routes)
        for port, routes in parts:
            if routes:
                by_port.setdefault(0 if port == settings.port else port, []).extend(routes)
        self.routes: Sequence[web.AbstractRouteDef] = by_port.pop(0)
        shared = settings.api_port in {0, settings.port}
        self.producers = self._api.routes if shared else ()
        self.listeners: Sequence[Listener] = [
            Listener(
                port=port,
                routes=routes,
                host=settings.host,
                tls_cert=settings.tls_cert,
                tls_key=settings.tls_key,
                producers=self._api.routes if port == settings.api_port else (),
            )
            for port, routes in by_port.items()
        ]

    @override
    def reload(self, settings: CentrifugoSettings) -> None:
        # Changes of ports and of `http_prefix` require a restart.
        self._clients.reload(settings)

    @override
    async def closed(self) -> None:
        # Administrators and unauthenticated clients have no session that the hub could disconnect.
        await self._admin.closed()
        await self._clients.closed()


class CentrifugoDoor(FrontDoor):
    """Serves Centrifugo's clients, HTTP API and administrators."""

    @override
    def mount(self, context: DoorContext, settings: CentrifugoSettings) -> MountedCentrifugo:
        for name, effect in _INSECURE.items():
            if getattr(settings, name):
                _log.warning("INSECURE: [protocol:centrifugo] %s: %s", name, effect)
        return MountedCentrifugo(context, settings)


DOOR = CentrifugoDoor()
