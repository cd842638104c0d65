"""The Socket.IO protocol of AcceleratXR, as a client of Socket.IO 4.6 or later speaks it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp

from tests.support.contract import Clients, Driver, Terms, WebSockets, websockets
from tests.support.engineio import EngineIo
from tests.support.relay import RelayProcess
from tests.support.socketio import SECRET, axr_token

_NEW_SESSION = "new session"


class SocketIoConnection(EngineIo):
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        super().__init__(socket)
        # The session ID that the client has requested to resume.
        self.resumed = ""

    async def receive(self) -> int | str:
        while True:
            kind, value = await self.packet()
            if kind == "2":
                number: int = value[1]["n"]
                return number
            if kind != "0":
                return await self.notice(kind, value)
            if self.resumed and self.pid != self.resumed:
                return _NEW_SESSION
            if not self.resumed:
                return "CONNECT"


class SocketIoClients:
    def __init__(self, relay: RelayProcess, sockets: WebSockets) -> None:
        self._url = f"{relay.url}/notifications/?{EngineIo.QUERY}"
        self._sockets = sockets

    async def _open(self, **auth: str) -> SocketIoConnection:
        connection = await self._sockets.open(SocketIoConnection, self._url)
        await connection.start("/axr", auth)
        return connection

    async def connect(
        self, user: str, channel: str, resume: tuple[str, str] | None = None
    ) -> SocketIoConnection:
        token = axr_token(user)
        if resume is not None:
            pid, offset = resume
            connection = await self._open(token=token, pid=pid, offset=offset)
            connection.resumed = pid
            return connection
        connection = await self._open(token=token)
        assert await connection.receive() == "CONNECT"
        return connection

    async def connect_rejected(self, channel: str) -> SocketIoConnection:
        return await self._open(token=axr_token(secret="another secret that is long enough"))


class SocketIoDriver:
    settings = (f"protocol:socketio.secret={SECRET}", "protocol:socketio.recovery_s=1")
    terms = Terms(
        rejected="CONNECT_ERROR",
        gap=_NEW_SESSION,
        reset="close 1000",
        revoked=None,
        stopping="close 1000",
    )
    resumes_where_cut = False

    def channel(self, name: str) -> str:
        return "axr:allusers"

    def entry(self, channel: str, number: int, filling: str) -> Mapping[str, str]:
        return {"type": "msg", "data": json.dumps({"n": number, "filling": filling})}

    @asynccontextmanager
    async def clients(self, relay: RelayProcess) -> AsyncIterator[Clients]:
        async with websockets() as sockets:
            yield SocketIoClients(relay, sockets)


def driver() -> Driver:
    return SocketIoDriver()
