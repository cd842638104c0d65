"""The npm clients of this worker: connections and saved sessions.

The messages of Pydio's own npm server were never published, so these are defined by relay (see
README.md): `register` and `unregister` with the workspace, acknowledged on request, and `message`
with the content. A client of Socket.IO 4.6 or later that reconnects receives what it missed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relay.doorkit.engineio_clients import EngineIoClients
from relay.doorkit.recoverable_sessions import RecoverableSessions
from relay.protocols.pydio.npm.client import NpmClient
from relay.protocols.pydio.npm.encoders import Encoders
from relay.transports.engineio.endpoint import Timing

if TYPE_CHECKING:
    from relay.doorkit.contract import DoorContext
    from relay.doorkit.open_connections import OpenConnections
    from relay.protocols.pydio.accounts import Accounts
    from relay.protocols.pydio.credentials import CredentialsReader
    from relay.protocols.pydio.registration import BrowserServices
    from relay.protocols.pydio.settings import PydioSettings

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
        self.clients = EngineIoClients(
            context,
            timing=_timing(settings),
            cors=lambda headers: self.reader().origins.cors(headers, settings.public_path),
            open_connections=open_connections,
            sessions=self.sessions,
            create=lambda engine, request: NpmClient(self, engine, request),
        )

    def reload(self, settings: PydioSettings) -> None:
        """Apply new settings to new connections. The namespace changes at a restart only."""
        self.clients.endpoint.reload(_timing(settings))


def _read_workspace(state: Any) -> str | None:
    return None if state is None else str(state)


def _timing(settings: PydioSettings) -> Timing:
    return Timing(
        ping_interval_s=settings.heartbeat_s,
        ping_timeout_s=settings.pong_timeout_s,
        max_payload_bytes=_MAX_PAYLOAD_BYTES,
    )
