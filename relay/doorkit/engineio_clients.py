"""The Engine.IO clients of one protocol on this worker, from the handshake to the close."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from relay.doorkit.recoverable_sessions import SessionOwner
from relay.transports.engineio.endpoint import Endpoint

if TYPE_CHECKING:
    from multidict import MultiMapping

    from relay.doorkit.contract import DoorContext
    from relay.doorkit.open_connections import OpenConnections
    from relay.doorkit.recoverable_sessions import RecoverableSessions
    from relay.transports.engineio.endpoint import Timing
    from relay.transports.engineio.engine import Engine
    from relay.transports.socket.exchange import HttpRequest
    from relay.transports.socketio.connection import SocketIoConnection


class EngineIoClient(SessionOwner[Any], Protocol):
    """A client of one protocol. It calls `EngineIoClients.remove` when its connection is closed."""

    engine: Engine
    connection: SocketIoConnection


Client = TypeVar("Client", bound=EngineIoClient)


class EngineIoClients(Generic[Client]):
    """The open connections of a protocol that uses Socket.IO, and the endpoint that opens them."""

    def __init__(
        self,
        context: DoorContext,
        *,
        timing: Timing,
        cors: Callable[[MultiMapping[str]], dict[str, str]],
        open_connections: OpenConnections,
        sessions: RecoverableSessions[Any],
        create: Callable[[Engine, HttpRequest], Client],
    ) -> None:
        """`create` returns the protocol's client for a new Engine.IO session."""
        self._open = open_connections
        self._sessions = sessions
        self._create = create
        self._clients: set[Client] = set()
        self.endpoint = Endpoint(
            address=context.bus.address,
            ids=context.session_ids,
            timing=timing,
            buffer_bytes=context.client_buffer_bytes,
            opened=self._opened,
            cors=cors,
            forward=context.forward,
        )

    def __iter__(self) -> Iterator[Client]:
        """Iterate over the clients at the time of the call."""
        return iter(list(self._clients))

    def remove(self, client: Client) -> None:
        """Remove a client whose connection is closed. Its session can be resumed for a while."""
        self._clients.discard(client)
        self._open.closed()
        self._sessions.left(client)

    async def closed(self) -> None:
        """Close connections that have not joined yet, and wait until all are closed.

        The hub disconnects the clients that have a session.
        """
        for client in self:
            client.engine.close()
        await self.endpoint.closed()

    def _opened(self, engine: Engine, request: HttpRequest) -> None:
        client = self._create(engine, request)
        self._clients.add(client)
        self._open.opened()
        client.connection.opened()
