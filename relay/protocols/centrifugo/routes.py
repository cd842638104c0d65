"""The Centrifugo door's paths, joined: which of them are on which listener."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from relay.doorkit.contract import Listener
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
    "insecure_api": "whoever reaches /api/ may publish and disconnect",
    "insecure_admin": "whoever reaches the admin socket is an administrator",
}


class MountedCentrifugo:
    """The door at work: each part has its routes and takes new settings."""

    drain_s: float | None = None

    def __init__(self, context: DoorContext, settings: CentrifugoSettings) -> None:
        prefix = settings.http_prefix.rstrip("/")
        self._sockets = ClientRoutes(context, settings, prefix)
        door = self._sockets.door
        node = NodeReport(door)
        # It ends with the relay.
        _ = context.spawn(node.run(), name="centrifugo node")
        api = CommandExecutor(door, ServerCommands(door, node))
        self._api = ApiRoutes(door, api, prefix)
        self._admin = AdminRoutes(door, api, settings, prefix)
        by_port: dict[int, list[web.AbstractRouteDef]] = {0: [*self._sockets.routes]}
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

    def reload(self, settings: CentrifugoSettings) -> None:
        """See `relay.doorkit.contract.Mounted`; ports and `http_prefix` stay."""
        self._sockets.reload(settings)

    async def closed(self) -> None:
        """See `relay.doorkit.contract.Mounted`."""
        await self._admin.closed()
        await self._sockets.closed()


class CentrifugoDoor:
    """Serves Centrifugo's clients, HTTP API and administrators."""

    def mount(self, context: DoorContext, settings: CentrifugoSettings) -> MountedCentrifugo:
        """Return the protocol's routes, and log a warning for each insecure setting."""
        for name, who in _INSECURE.items():
            if getattr(settings, name):
                _log.warning("INSECURE: [protocol:centrifugo] %s: %s", name, who)
        return MountedCentrifugo(context, settings)


DOOR = CentrifugoDoor()
