"""Polling clients of two protocols. They don't reuse connections, so any worker may reply."""

from __future__ import annotations

import hashlib
import hmac
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from aiohttp import ClientSession, TCPConnector

from tests.support.relay import RelayProcess
from tests.support.socketio import SECRET as SOCKETIO_SECRET
from tests.support.socketio import axr_token

SECRET = "a secret of the application"
SETTINGS = (
    f"protocol:centrifugo.secret={SECRET}",
    "protocol:centrifugo.publish=yes",
    f"protocol:socketio.secret={SOCKETIO_SECRET}",
)
OPENED = b"o\n"


@asynccontextmanager
async def fresh_connections(
    tls: ssl.SSLContext | None = None, *, keep: bool = False
) -> AsyncIterator[ClientSession]:
    """Yield an HTTP session that, unless `keep`, opens a connection for each request."""
    connector = TCPConnector(limit=0, force_close=not keep, ssl=tls or True)
    async with ClientSession(connector=connector) as http:
        yield http


class Xhr:
    """A Centrifugo v1 client over SockJS polling."""

    def __init__(self, http: ClientSession, relay: RelayProcess, name: str) -> None:
        self._http = http
        self._url = f"{relay.url}/connection/000/{name}"

    async def poll(self) -> tuple[int, bytes]:
        """Return the status and the next frame other than a heartbeat."""
        while True:
            async with self._http.post(f"{self._url}/xhr") as answer:
                frame = await answer.read()
                if frame != b"h\n":
                    return answer.status, frame

    async def send(self, method: str, **params: object) -> int:
        """Send a command and return the status of the request."""
        command = json.dumps({"uid": "1", "method": method, "params": params})
        body = json.dumps([command]).encode()
        async with self._http.post(f"{self._url}/xhr_send", data=body) as answer:
            return answer.status

    async def follow(self, count: int) -> list[bytes]:
        """Poll until the frames contain `count` messages of the channel. Return the frames."""
        frames: list[bytes] = []
        while b"".join(frames).count(b'\\"method\\":\\"message\\"') < count:
            status, frame = await self.poll()
            assert (status, frame[:1]) == (200, b"a"), frame
            frames.append(frame)
        return frames

    async def connect(self, user: str, channel: str) -> None:
        """Open the session, connect and subscribe."""
        assert await self.poll() == (200, OPENED)
        sign = hmac.new(SECRET.encode(), f"{user}1500000000".encode(), hashlib.sha256).hexdigest()
        for method, params in (
            ("connect", {"user": user, "timestamp": "1500000000", "info": "", "token": sign}),
            ("subscribe", {"channel": channel}),
        ):
            assert await self.send(method, **params) == 204
            assert f'\\"method\\":\\"{method}\\"'.encode() in (await self.poll())[1]


class EngineIoPolling:
    """A Socket.IO 4 client over polling, in the namespace /axr."""

    def __init__(self, http: ClientSession, relay: RelayProcess, url: str = "") -> None:
        """Prepare a client. `url` is the address of the relay if it uses TLS."""
        self._http = http
        self.url = f"{url or relay.url}/socket.io/?EIO=4&transport=polling"

    async def open(self, user: str) -> None:
        """Open the session and join the namespace."""
        async with self._http.get(self.url) as answer:
            self.url += "&sid=" + json.loads((await answer.text())[1:])["sid"]
        assert await self.post("40/axr," + json.dumps({"token": axr_token(user)})) == 200
        assert "sid" in await self.poll()

    async def post(
        self, body: str, headers: Mapping[str, str] | None = None, *, chunked: bool = False
    ) -> int:
        """Send packets and return the status of the request."""
        sending = self._http.post(
            self.url, data=body.encode(), headers=headers, chunked=chunked or None
        )
        async with sending as answer:
            return answer.status

    async def poll(self) -> str:
        """Return the next packets other than a ping."""
        while True:
            async with self._http.get(self.url) as answer:
                packets = await answer.text()
            if packets != "2":
                return packets
            await self.post("3")
