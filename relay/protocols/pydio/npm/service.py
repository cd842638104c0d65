"""The npm clients of this worker: connections and saved sessions.

The messages of Pydio's own npm server were never published, so these are defined by relay (see
README.md): `register` and `unregister` with the workspace, acknowledged on request, and `message`
with the content. A client of Socket.IO 4.6 or later that reconnects receives what it missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relay.doorkit.recoverable_sessions import RecoverableSessions
from relay.protocols.pydio.npm.client import NpmClient
from relay.protocols.pydio.npm.encoders import Encoders
from relay.transports.engineio.endpoint import Endpoint, Timing

if TYPE_CHECKING:
    from relay.doorkit.contract import DoorContext
    from relay.doorkit.open_connections import OpenConnections
    from relay.protocols.pydio.accounts import Accounts
    from relay.protocols.pydio.credentials import CredentialsReader
    from relay.protocols.pydio.registration import BrowserServices
    from relay.protocols.pydio.settings import PydioSettings
    from relay.transports.engineio.engine import Engine
    from relay.transports.socket.exchange import HttpRequest

_MAX_PAYLOAD_BYTES = 65536


class NpmService:
    """Serves the npm clients of this worker."""

    def __init__(
        self,
        context: DoorContext,
        settings: PydioSettings,
        accounts: Accounts,
        services: BrowserServices,
        reader: Callable[[], CredentialsReader],
        open_connections: OpenConnections,
    ) -> None:
        self.context = context
        self.accounts = accounts
        self.browser_services = services
        self.namespace = settings.npm_namespace
        self.encoders = Encoders(settings.npm_namespace)
        self.sessions: RecoverableSessions[str | None] = RecoverableSessions(
            context, "pydio", settings.npm_recovery_s, _read_workspace
        )
        self.reader = reader
        self._open = open_connections
        self._clients: set[NpmClient] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.endpoint = Endpoint(
            address=context.bus.address,
            timing=_timing(settings),
            buffer_bytes=context.client_buffer_bytes,
            opened=self._opened,
            cors=lambda headers: self.reader().origins.cors(headers, settings.public_path),
            forward=context.forward,
        )

    def reload(self, settings: PydioSettings) -> None:
        """Apply new settings to new connections. The namespace changes at a restart only."""
        self.endpoint.reload(_timing(settings))

    def spawn(self, coroutine: Any, name: str) -> None:
        """Start a task that ends with the worker."""
        task = self.context.spawn(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def closed(self) -> None:
        """Close connections that have not joined yet, and wait until all are closed."""
        for client in list(self._clients):
            client.engine.close()
        await self.endpoint.closed()

    def _opened(self, engine: Engine, request: HttpRequest) -> None:
        client = NpmClient(self, engine, request)
        self._clients.add(client)
        self._open.opened()
        client.connection.opened()

    def remove(self, client: NpmClient) -> None:
        """Remove a client whose connection is closed. Its session can be resumed for a while."""
        self._clients.discard(client)
        self._open.closed()
        self.sessions.left(client)


def _read_workspace(state: Any) -> str | None:
    return None if state is None else str(state)


def _timing(settings: PydioSettings) -> Timing:
    return Timing(
        ping_interval_s=settings.heartbeat_s,
        ping_timeout_s=settings.pong_timeout_s,
        max_payload_bytes=_MAX_PAYLOAD_BYTES,
    )
