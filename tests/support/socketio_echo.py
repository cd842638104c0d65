"""A server with the handlers of tests/wire/socketio/cases.py, on relay's transports.

By hand: `python -m tests.support.socketio_echo PORT`
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from relay.doorkit.origins import any_origin
from relay.transports.between_workers.session_ids import SessionIds
from relay.transports.engineio.endpoint import Endpoint, Opened, Timing
from relay.transports.engineio.engine import Engine
from relay.transports.engineio.packets import MESSAGE, Packet, frame
from relay.transports.socket.exchange import HttpRequest
from relay.transports.socketio.connection import Acknowledge, SocketIoConnection
from tests.support.sockjs import forward_nothing, serving

_TIMING = Timing(ping_interval_s=0.5, ping_timeout_s=1.5)
_NAMESPACES = ("/", "/custom")
_JOIN_S = 2.0


class Echo:
    """One Socket.IO connection."""

    def __init__(self, engine: Engine) -> None:
        self.connection = SocketIoConnection(engine, self)
        engine.on_message = self.connection.on_message
        engine.on_closed = self.connection.on_closed
        self._timer = asyncio.get_running_loop().call_later(_JOIN_S, engine.close)

    def connecting(self, namespace: str, auth: Mapping[str, Any], query: str) -> None:
        """Accept two namespaces."""
        if namespace in _NAMESPACES:
            self._timer.cancel()
            self.connection.accept(namespace, f"sid of {namespace}")
            self.connection.emit(namespace, "auth", auth)
        else:
            self.connection.answer_other(namespace)

    def event(
        self, namespace: str, name: str, args: list[Any], acknowledge: Acknowledge | None
    ) -> None:
        """Send the arguments back."""
        if acknowledge is not None:
            acknowledge(*args)
        else:
            self.connection.emit(namespace, "message-back", *args)

    def left(self, namespace: str) -> None:
        """Do nothing: the client may be in other namespaces."""

    def closed(self) -> None:
        """Forget the connection."""
        self._timer.cancel()


def _echo(engine: Engine, _asked: HttpRequest) -> None:
    def on_message(data: bytes, binary: bool) -> None:
        engine.write(frame(Packet(MESSAGE, data, binary), engine.version))

    engine.on_message = on_message


def _connect(engine: Engine, _asked: HttpRequest) -> None:
    Echo(engine)


def _endpoint(opened: Opened) -> Endpoint:
    return Endpoint(
        address="5f0c9a31",
        ids=SessionIds("5f0c9a31", lambda: (b"key",)),
        timing=_TIMING,
        buffer_bytes=1_000_000,
        opened=opened,
        cors=any_origin,
        forward=forward_nothing,
    )


@asynccontextmanager
async def echo_server(port: int = 0) -> AsyncIterator[int]:
    """Serve, and yield the port."""
    engines, sockets = _endpoint(_echo), _endpoint(_connect)
    routes: list[web.AbstractRouteDef] = [
        web.route("*", "/engine.io/", engines.handle),
        web.route("*", "/socket.io/", sockets.handle),
    ]
    async with serving(routes, port) as listening:
        yield listening


async def main() -> None:
    """Serve on the port of the command line."""
    async with echo_server(int(sys.argv[1])):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
