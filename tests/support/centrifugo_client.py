"""A Centrifugo v1 client over a raw websocket, and a client of its HTTP API."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.support.clients import LIMIT_S, Answer

SECRET = "a secret of the door"
Frame = dict[str, Any]


def sign(*parts: str | bytes, secret: str = SECRET) -> str:
    """Return v1's HMAC of the concatenated parts."""
    text = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hmac.digest(secret.encode(), text, "sha256").hex()


class V1Client:
    """One connection. Received pushes are stored in `pushes`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.id = ""
        self.pushes: list[Frame] = []
        # Code and reason of the close frame, once it has been received.
        self.closed: tuple[int, str] | None = None
        self._replies: dict[str, Frame] = {}
        self._news = asyncio.Event()
        self._uids = itertools.count(1)
        self._task = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        async for message in self.socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                break
            frame = json.loads(message.data)
            for each in frame if isinstance(frame, list) else [frame]:
                if "uid" in each:
                    self._replies[each["uid"]] = each
                else:
                    self.pushes.append(each)
            self._news.set()
        self.closed = self.socket.close_code or 0, getattr(self.socket, "close_reason", "") or ""
        self._news.set()

    async def _until(self, found: Any, limit_s: float) -> Any:
        async with asyncio.timeout(limit_s):
            while (answer := found()) is None:
                self._news.clear()
                await self._news.wait()
        return answer

    async def ask(self, method: str, **params: Any) -> Frame:
        """Send one command and return its reply."""
        uid = str(next(self._uids))
        await self.socket.send_str(json.dumps({"uid": uid, "method": method, "params": params}))
        found: Frame = await self._until(lambda: self._replies.pop(uid, None), LIMIT_S)
        return found

    async def push(self, method: str, limit_s: float = LIMIT_S) -> Any:
        """Return the body of the next push of this kind."""

        def next_one() -> Frame | None:
            found = (each for each in self.pushes if each["method"] == method)
            return next(found, None)

        frame = await self._until(next_one, limit_s)
        self.pushes.remove(frame)
        return frame["body"]

    async def until_closed(self, limit_s: float = LIMIT_S) -> tuple[int, str]:
        """Wait for the close frame, and return its code and reason."""
        found: tuple[int, str] = await self._until(lambda: self.closed, limit_s)
        return found

    async def connect(self, user: str, info: str = "") -> V1Client:
        """Authenticate."""
        timestamp = str(int(time.time()))
        token = sign(user, timestamp, info)
        reply = await self.ask("connect", user=user, timestamp=timestamp, info=info, token=token)
        self.id = reply["body"]["client"]
        return self

    async def subscribe(self, channel: str, **params: Any) -> Frame:
        """Subscribe, and return the body of the reply."""
        reply = await self.ask("subscribe", channel=channel, **params)
        assert "error" not in reply, reply
        body: Frame = reply["body"]
        return body

    async def stop(self) -> None:
        """Close the connection."""
        await self.socket.close()
        await self._task


class Centrifugo:
    """Clients and backends of one or several relays."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url
        self.clients: list[V1Client] = []

    async def client(self, user: str = "anna", info: str = "", *, url: str = "") -> V1Client:
        """Return an authenticated connection."""
        address = f"{url or self.url}/connection/websocket"
        one = V1Client(await self._session.ws_connect(address))
        self.clients.append(one)
        return await one.connect(user, info)

    async def request(
        self,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        url: str = "",
        path: str = "/api/",
        method: str = "POST",
    ) -> Answer:
        """Send a signed JSON request, unless `headers` are given."""
        if headers is None:
            headers = {"Content-Type": "application/json", "X-API-Sign": sign(body)}
        async with self._session.request(
            method, (url or self.url) + path, data=body, headers=headers, allow_redirects=False
        ) as answer:
            return Answer(answer.status, dict(answer.headers), await answer.read())

    async def api(self, method: str, *, url: str = "", **params: Any) -> Any:
        """Send one command and return its reply."""
        body = json.dumps({"method": method, "params": params}).encode()
        answer = await self.request(body, url=url)
        assert answer.status == 200, answer
        (reply,) = json.loads(answer.body)
        return reply


@asynccontextmanager
async def centrifugo(url: str) -> AsyncIterator[Centrifugo]:
    """Yield clients and backends, and close them at the end."""
    async with aiohttp.ClientSession() as session:
        one = Centrifugo(session, url)
        try:
            yield one
        finally:
            for client in one.clients:
                await client.stop()
