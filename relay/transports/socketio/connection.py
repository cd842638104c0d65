"""One Socket.IO connection: namespaces, events and acknowledgements. Sans-I/O.

The door behind it is a `Handler`, which decides who may connect to what. What the two generations
do differently (table E.1 of the captures) happens here: a 2.x client is connected to `/` unasked
and learns no ID, a 3.x or 4.x client names each namespace and is told its ID.
"""

from __future__ import annotations

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
    """The door's side of one connection."""

    def connecting(self, namespace: str, auth: Mapping[str, Any], query: str) -> None:
        """The client asks for a namespace; answer with `accept` or `refuse`, now or later. `auth`
        is what a 3.x or 4.x client gave (or {}), `query` what a 2.x client repeats here."""

    def event(
        self, namespace: str, name: str, args: list[Any], acknowledge: Acknowledge | None
    ) -> None:
        """Handle an event from the client, which waits for `acknowledge(*values)` unless it is
        None. Binary arguments are placeholders; events of more than 64 KB are ignored."""

    def left(self, namespace: str) -> None:
        """The client has left a namespace, or does not want to connect to it any more."""

    def closed(self, reason: str) -> None:
        """The connection is over, with everything it had."""


class SocketIoConnection:
    """What a door says to one client. Bytes go to `out`: to the engine itself at first, and once
    there is a session with the hub, through that session, so that they keep their order."""

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
        """Of Engine.IO: 3 for clients 2.x, 4 for 3.x and 4.x."""
        return self.engine.version

    def opened(self) -> None:
        """The engine is open. A 2.x client takes `/` as given (captured: `40` unasked)."""
        handler = self._handler
        if self.version == 3 and handler is not None:
            self._waiting.add("/")
            handler.connecting("/", {}, "")

    # ---- from the engine --------------------------------------------------------------------

    def on_message(self, data: bytes, binary: bool) -> None:
        """One message; Malformed closes the connection, as upstream does (captured)."""
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
            # A packet that crossed the refusal or the end of its namespace, or an event too early.
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
        # else: an acknowledgement; nobody here asks for one.

    def on_closed(self, reason: str) -> None:
        """Tell the handler that the engine has closed."""
        # Without this reference no cycle keeps the connection's objects in memory.
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.closed(reason)

    def _acknowledge(self, namespace: str, number: int) -> Acknowledge:
        def acknowledge(*values: object) -> None:
            if namespace in self._namespaces:
                payload, parts = codec.deconstruct(list(values))
                kind = codec.BINARY_ACK if parts else codec.ACK
                self._send(kind, namespace, payload, parts, id=number)

        return acknowledge

    # ---- for the handler --------------------------------------------------------------------

    def wants(self, namespace: str) -> bool:
        """Whether the client still waits for an answer about this namespace."""
        return namespace in self._waiting

    def accept(self, namespace: str, sid: str, **more: str) -> None:
        """The client is connected to `namespace`; a 2.x client makes its ID itself."""
        self._waiting.discard(namespace)
        self._namespaces.add(namespace)
        payload = b"" if self.version == 3 else orjson.dumps({"sid": sid, **more})
        self._send(codec.CONNECT, namespace, payload)

    def refuse(self, namespace: str, message: str, data: object = None) -> None:
        """The client may not connect to `namespace`. 2.x knows one value, the data or else the
        message; later ones both."""
        self._waiting.discard(namespace)
        if self.version == 3:
            payload = orjson.dumps(message if data is None else data)
        else:
            error = {"message": message} if data is None else {"message": message, "data": data}
            payload = orjson.dumps(error)
        self._send(codec.ERROR, namespace, payload)

    def emit(self, namespace: str, name: str, *args: object) -> None:
        """One event for this client; ValueError where it cannot be said in JSON and bytes."""
        payload, parts = codec.deconstruct([name, *args])
        self._send(codec.BINARY_EVENT if parts else codec.EVENT, namespace, payload, parts)

    def leave(self, namespace: str) -> None:
        """Put the client out of a namespace that it is in: it does not come back by itself."""
        if namespace in self._namespaces:
            self.put_out(namespace)

    def put_out(self, namespace: str) -> None:
        """As `leave`, also where it was never let in: a 2.x client needs that to stay away."""
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
