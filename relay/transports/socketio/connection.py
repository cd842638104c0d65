"""One Socket.IO connection: namespaces, events and acknowledgements. Sans-I/O.

A protocol implements `SocketIoHandler`, which decides which client may connect to which namespace.
The differences between the protocol versions (table E.1 of the captures) are handled here: a 2.x
client is connected to `/` without a request and receives no ID. A 3.x or 4.x client requests each
namespace and receives its ID.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from relay.transports.engineio.packets import Malformed
from relay.transports.socketio import codec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from relay.transports.engineio.engine import Engine

Acknowledge = Callable[..., None]


class SocketIoHandler(Protocol):
    """The protocol's side of one connection."""

    def connecting(self, namespace: str, auth: Mapping[str, Any], query: str) -> None:
        """Decide on a request for a namespace: call `accept` or `refuse`, now or later.

        Args:
            namespace: The requested namespace.
            auth: The `auth` object of a 3.x or 4.x client, {} without one.
            query: The query string that a 2.x client repeats in its CONNECT packet.
        """

    def event(
        self, namespace: str, name: str, args: list[Any], acknowledge: Acknowledge | None
    ) -> None:
        """Handle an event from the client, which waits for `acknowledge(*values)` unless it is
        None. Binary arguments are placeholders; events of more than 64 KB are ignored."""

    def left(self, namespace: str) -> None:
        """Handle a DISCONNECT: the client has left a namespace or given up connecting to it."""

    def closed(self) -> None:
        """Handle the end of the connection, which ends all its namespaces."""


class SocketIoConnection:
    """The server's side of one Socket.IO connection.

    Packets are written to `out`. At first that is the engine. Once the client has a session in the
    hub, packets go through that session, so that they stay in order with its events.
    """

    __slots__ = ("_decoder", "_handler", "_namespaces", "_waiting", "engine", "out")

    def __init__(self, engine: Engine, handler: SocketIoHandler) -> None:
        self.engine = engine
        self.out: Callable[[bytes], None] = engine.write
        self._handler: SocketIoHandler | None = handler
        self._decoder = codec.Decoder()
        self._waiting: set[str] = set()
        self._namespaces: set[str] = set()

    @property
    def version(self) -> int:
        """The Engine.IO version: 3 for Socket.IO 2.x clients, 4 for 3.x and 4.x."""
        return self.engine.version

    def opened(self) -> None:
        """Start. A 2.x client is connected to `/` without a request (captured: `40`)."""
        handler = self._handler
        if self.version == 3 and handler is not None:
            self._waiting.add("/")
            handler.connecting("/", {}, "")

    # ---- from the engine --------------------------------------------------------------------

    def on_message(self, data: bytes, binary: bool) -> None:
        """Handle one message. Raises Malformed, which closes the connection as upstream does."""
        handler = self._handler
        found = self._decoder.feed(data, binary=binary)
        if found is None or handler is None:
            return
        namespace = found.namespace
        if found.kind == codec.CONNECT:
            if namespace not in self._namespaces and namespace not in self._waiting:
                self._waiting.add(namespace)
                handler.connecting(namespace, found.data or {}, found.query)
            return
        if namespace not in self._namespaces:
            # The packet was sent before the client received the rejection, or before it connected.
            if found.kind == codec.DISCONNECT:
                if namespace in self._waiting:
                    self._waiting.discard(namespace)
                    handler.left(namespace)
                return
            raise Malformed("not connected to this namespace")
        if found.kind == codec.DISCONNECT:
            self._namespaces.discard(namespace)
            handler.left(namespace)
        elif found.kind in (codec.EVENT, codec.BINARY_EVENT):
            if found.data is None:
                return
            name, *args = found.data
            acknowledge = None if found.id is None else self._acknowledge(namespace, found.id)
            handler.event(namespace, name, args, acknowledge)
        elif found.kind == codec.ERROR:
            raise Malformed("errors come from the server")
        # Otherwise it is an acknowledgement. None was requested.

    def on_closed(self) -> None:
        """Tell the handler that the engine has closed."""
        # Without this reference no cycle keeps the connection's objects in memory.
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.closed()

    def _acknowledge(self, namespace: str, number: int) -> Acknowledge:
        def acknowledge(*values: object) -> None:
            if namespace in self._namespaces:
                payload, parts = codec.deconstruct(list(values))
                kind = codec.BINARY_ACK if parts else codec.ACK
                self._send(kind, namespace, payload, parts, id=number)

        return acknowledge

    # ---- for the handler --------------------------------------------------------------------

    def wants(self, namespace: str) -> bool:
        """Return True if the client is waiting for an answer about this namespace."""
        return namespace in self._waiting

    @property
    def is_idle(self) -> bool:
        """Whether the client is connected to no namespace."""
        return not self._namespaces

    def accept(self, namespace: str, sid: str, **more: str) -> None:
        """Send CONNECT. A 2.x client derives its ID itself; `more` is sent to others."""
        self._waiting.discard(namespace)
        self._namespaces.add(namespace)
        payload = b"" if self.version == 3 else orjson.dumps({"sid": sid, **more})
        self._send(codec.CONNECT, namespace, payload)

    def answer_other(self, namespace: str) -> None:
        """Answer a request for a namespace that the protocol does not serve.

        `/` always exists, as in Socket.IO's server, because many clients connect to it first. The
        client receives no events there.
        """
        if namespace == "/":
            sid = self.engine.sid if self.version == 3 else secrets.token_urlsafe(15)
            self.accept("/", sid)
        else:
            self.refuse(namespace, "Invalid namespace")

    def refuse(self, namespace: str, message: str, data: object = None) -> None:
        """Send CONNECT_ERROR. A 2.x client receives `data`, or `message` without data; later
        versions receive both."""
        self._waiting.discard(namespace)
        if self.version == 3:
            payload = orjson.dumps(message if data is None else data)
        else:
            error = {"message": message} if data is None else {"message": message, "data": data}
            payload = orjson.dumps(error)
        self._send(codec.ERROR, namespace, payload)

    def emit(self, namespace: str, name: str, *args: object) -> None:
        """Send one event. Raises ValueError if an argument is neither JSON nor bytes."""
        payload, parts = codec.deconstruct([name, *args])
        self._send(codec.BINARY_EVENT if parts else codec.EVENT, namespace, payload, parts)

    def leave(self, namespace: str) -> None:
        """Send DISCONNECT if the client is connected. It will not reconnect by itself."""
        if namespace in self._namespaces:
            self.server_disconnect(namespace)

    def server_disconnect(self, namespace: str) -> None:
        """Send DISCONNECT. A 2.x client that was rejected needs it too, or it would reconnect."""
        self._namespaces.discard(namespace)
        self._waiting.discard(namespace)
        self._send(codec.DISCONNECT, namespace)

    def _send(
        self,
        kind: int,
        namespace: str,
        payload: bytes = b"",
        parts: list[bytes] | None = None,
        id: int | None = None,
    ) -> None:
        parts = parts or []
        text = codec.packet(kind, namespace, payload, id=id, attachments=len(parts))
        self.out(codec.frames(text, parts, self.version))
