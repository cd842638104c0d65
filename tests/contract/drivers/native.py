"""The native protocol over its websocket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import urlencode

import aiohttp

from tests.support.contract import Clients, Driver, Frames, Terms, WebSockets, websockets
from tests.support.relay import RelayProcess


class NativeConnection(Frames):
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        super().__init__(socket)
        self._position = ""

    async def receive(self) -> int | str:
        while True:
            text = await self.next()
            if text.startswith("close"):
                # The reason of a stop is a random delay.
                return text.partition(" retry_ms=")[0]
            frame = json.loads(text)
            if "reply" in frame or "id" in frame:
                self._position = frame["id"]
            if "data" in frame:
                number: int = frame["data"]["n"]
                return number
            if "error" in frame:
                return f"error {frame['error']['code']}"
            if "notice" in frame and frame["notice"] != "closing":
                return f"notice {frame['notice']}"
            if frame.get("reply") == "subscribe":
                return "subscribed"

    def position(self) -> str:
        return self._position


class NativeClients:
    def __init__(self, relay: RelayProcess, sockets: WebSockets) -> None:
        self._relay = relay
        self._sockets = sockets

    async def _open(self, **query: str) -> NativeConnection:
        url = f"{self._relay.url}/ws?{urlencode(query)}"
        return await self._sockets.open(NativeConnection, url)

    async def connect(self, user: str, channel: str, resume: str | None = None) -> NativeConnection:
        last = {} if resume is None else {"last_event_id": resume}
        token = self._relay.token(user)
        connection = await self._open(channel=channel, token=token, **last)
        assert await connection.receive() == "subscribed"
        return connection

    async def connect_rejected(self, channel: str) -> NativeConnection:
        return await self._open(channel=channel, token=self._relay.token(key="k" * 32))


class NativeDriver:
    settings = ()
    terms = Terms(
        rejected="error unauthorized",
        gap="notice gap",
        reset="notice reset",
        revoked="notice revoked",
        stopping="close 1001",
    )
    resumes_where_cut = False

    def channel(self, name: str) -> str:
        return name

    def entry(self, channel: str, number: int, filling: str) -> Mapping[str, str]:
        return {"data": json.dumps({"n": number, "filling": filling})}

    @asynccontextmanager
    async def clients(self, relay: RelayProcess) -> AsyncIterator[Clients]:
        async with websockets() as sockets:
            yield NativeClients(relay, sockets)


def driver() -> Driver:
    return NativeDriver()
