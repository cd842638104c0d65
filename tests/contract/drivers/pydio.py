"""The Pydio protocol over Socket.IO 4.6 or later. Only these clients can resume."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from tests.support.contract import Clients, Driver, Terms, WebSockets, websockets
from tests.support.engineio import EngineIo
from tests.support.pydio import KEY, Pydio, tree
from tests.support.relay import RelayProcess
from tests.support.valkey import free_port

_NUMBER = re.compile(r"<tree><note>(\d+) ")
_RELOAD = re.compile(r'<reload_instruction object="(\w+)"')


class PydioConnection(EngineIo):
    async def receive(self) -> int | str:
        kind, value = await self.packet()
        if kind == "3":
            return "registered" if value == [{"ok": True}] else "not registered"
        if kind != "2":
            return await self.notice(kind, value)
        if found := _NUMBER.match(value[1]):
            return int(found[1])
        reload = _RELOAD.search(value[1])
        assert reload, value
        return f"reload {reload[1]}"


class PydioClients:
    def __init__(self, relay: RelayProcess, sockets: WebSockets, pydio: Pydio) -> None:
        self._relay = relay
        self._sockets = sockets
        self._pydio = pydio

    async def _open(self, cookie: str, **auth: str) -> PydioConnection:
        url = f"{self._relay.url}/public?{EngineIo.QUERY}"
        connection = await self._sockets.open(
            PydioConnection, url, Origin=self._relay.url, Cookie=f"AjaXplorer={cookie}"
        )
        await connection.start("/", auth)
        return connection

    async def connect(self, user: str, channel: str, resume: Any = None) -> PydioConnection:
        workspace = channel.removeprefix("pydio:")
        self._pydio.login(user, **{f"w_{workspace}": "rw"})
        if resume is not None:
            connection = await self._open(user, pid=resume[0], offset=resume[1])
            assert await connection.receive() == "CONNECT"
            assert connection.pid == resume[0], "the session was not recovered"
            return connection
        connection = await self._open(user)
        assert await connection.receive() == "CONNECT"
        await connection.socket.send_str(f'420["register","{workspace}"]')
        assert await connection.receive() == "registered"
        return connection

    async def connect_rejected(self, channel: str) -> PydioConnection:
        return await self._open("mallory")


class PydioDriver:
    terms = Terms(
        rejected="CONNECT_ERROR unauthorized",
        gap="reload data",
        reset="reload data",
        revoked="reload repository_list",
        stopping="close 1000",
    )
    resumes_where_cut = False

    def __init__(self) -> None:
        self._pydio = Pydio()
        self._pydio.port = free_port()
        settings = {
            "key": KEY,
            "auth_url": self._pydio.auth_url,
            "drain_s": 0.2,
            "npm_recovery_s": 1,
        }
        self.settings = [f"protocol:pydio.{name}={value}" for name, value in settings.items()]

    def channel(self, name: str) -> str:
        return f"pydio:{name}"

    def entry(self, channel: str, number: int, filling: str) -> Mapping[str, str]:
        return {"data": tree(f"{number} {filling}")}

    @asynccontextmanager
    async def clients(self, relay: RelayProcess) -> AsyncIterator[Clients]:
        await self._pydio.start()
        try:
            async with websockets() as sockets:
                yield PydioClients(relay, sockets, self._pydio)
        finally:
            await self._pydio.stop()


def driver() -> Driver:
    return PydioDriver()
