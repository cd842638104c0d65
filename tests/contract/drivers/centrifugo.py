"""The Centrifugo v1 protocol over its websocket."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.support.centrifugo_client import SECRET, sign
from tests.support.contract import Clients, Driver, Frames, Terms, WebSockets, websockets
from tests.support.relay import RelayProcess

_SETTINGS = {
    "secret": SECRET,
    "recover": "yes",
    "history_size": 2000,
    "history_lifetime": 600,
    "client_queue_max_size": 262_144,
}


class CentrifugoConnection(Frames):
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        super().__init__(socket)
        self._last = ""
        self._messages: list[dict[str, Any]] = []

    async def receive(self) -> int | str:
        if not self._messages:
            text = await self.next()
            if text.startswith("close"):
                return text
            frame = json.loads(text)
            body = frame.get("body", {})
            if frame["method"] == "message":
                self._messages.append(body)
            elif frame["method"] == "subscribe":
                self._last = body["last"]
                self._messages += reversed(body["messages"] or ())
                if not body["recovered"]:
                    return "subscribed, not recovered"
                return await self.receive()
            else:
                return str(frame["method"])
        message = self._messages.pop(0)
        self._last = message["uid"]
        number: int = message["data"]["n"]
        return number

    async def send(self, method: str, **params: object) -> None:
        await self.socket.send_str(json.dumps({"uid": "1", "method": method, "params": params}))

    def position(self) -> str:
        return self._last


class CentrifugoClients:
    def __init__(self, relay: RelayProcess, sockets: WebSockets) -> None:
        self._url = f"{relay.url}/connection/websocket"
        self._sockets = sockets

    async def _open(self, user: str, secret: str = SECRET) -> CentrifugoConnection:
        connection = await self._sockets.open(CentrifugoConnection, self._url)
        timestamp = str(int(time.time()))
        token = sign(user, timestamp, secret=secret)
        await connection.send("connect", user=user, timestamp=timestamp, info="", token=token)
        return connection

    async def connect(
        self, user: str, channel: str, resume: str | None = None
    ) -> CentrifugoConnection:
        connection = await self._open(user)
        assert await connection.receive() == "connect"
        if resume is not None:
            await connection.send("subscribe", channel=channel, recover=True, last=resume)
            return connection
        await connection.send("subscribe", channel=channel)
        assert await connection.receive() == "subscribed, not recovered"
        return connection

    async def connect_rejected(self, channel: str) -> CentrifugoConnection:
        return await self._open("ann", secret="another secret")


class CentrifugoDriver:
    settings = tuple(f"protocol:centrifugo.{name}={value}" for name, value in _SETTINGS.items())
    terms = Terms(
        rejected='close 3000 {"reason":"invalid token","reconnect":false}',
        gap="subscribed, not recovered",
        reset='close 3000 {"reason":"insufficient state","reconnect":true}',
        revoked="unsubscribe",
        stopping='close 3000 {"reason":"shutting down","reconnect":true}',
    )
    resumes_where_cut = False

    def channel(self, name: str) -> str:
        return name

    def entry(self, channel: str, number: int, filling: str) -> Mapping[str, str]:
        return {"data": json.dumps({"n": number, "filling": filling})}

    @asynccontextmanager
    async def clients(self, relay: RelayProcess) -> AsyncIterator[Clients]:
        async with websockets() as sockets:
            yield CentrifugoClients(relay, sockets)


def driver() -> Driver:
    return CentrifugoDriver()
