"""The Seafile protocol, as the desktop client speaks it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from tests.support.contract import Clients, Driver, Frames, Terms, WebSockets, websockets
from tests.support.relay import RelayProcess
from tests.support.seafile import KEY, subscribe_token

_PREFIX = "seafile:"
_PROBE = "comment-update"


class SeafileConnection(Frames):
    token = ""

    async def subscribe(self, library: str, token: str) -> None:
        repos = [{"id": library, "jwt_token": token}]
        text = json.dumps({"type": "subscribe", "content": {"repos": repos}})
        await self.socket.send_str(text)

    async def receive(self) -> int | str:
        while not (text := await self.next()).startswith("close"):
            message = json.loads(text)
            if message["type"] == "file-lock-changed":
                return int(message["content"]["path"])
            if message["type"] != _PROBE:
                return str(message["type"])
        return text

    async def wait_subscribed(self, relay: RelayProcess, channel: str) -> None:
        """Append probes until one is delivered, because a subscription is not acknowledged."""
        content = json.dumps({"repo_id": channel.removeprefix(_PREFIX)})
        reading = asyncio.get_running_loop().create_task(self.next())
        while not reading.done():
            await asyncio.to_thread(relay.xadd, channel, type=_PROBE, data=content)
            await asyncio.wait((reading,), timeout=0.1)
        assert _PROBE in reading.result()

    def position(self) -> str:
        # The relay recognizes a client that reconnects by its token.
        return self.token


class SeafileClients:
    def __init__(self, relay: RelayProcess, sockets: WebSockets) -> None:
        self._relay = relay
        self._sockets = sockets

    async def _open(self, channel: str, token: str) -> SeafileConnection:
        url = f"{self._relay.url}/notification"
        agent = "Seafile/9.0.20 (Linux)"
        connection = await self._sockets.open(SeafileConnection, url, User_Agent=agent)
        connection.token = token
        await connection.subscribe(channel.removeprefix(_PREFIX), token)
        return connection

    async def connect(
        self, user: str, channel: str, resume: str | None = None
    ) -> SeafileConnection:
        token = resume or subscribe_token(channel.removeprefix(_PREFIX), user)
        connection = await self._open(channel, token)
        if resume is None:
            await connection.wait_subscribed(self._relay, channel)
        return connection

    async def connect_rejected(self, channel: str) -> SeafileConnection:
        library = channel.removeprefix(_PREFIX)
        return await self._open(channel, subscribe_token(library, key="another key"))


class SeafileDriver:
    settings = (f"protocol:seafile.key={KEY}",)
    terms = Terms(
        rejected="jwt-expired",
        # A client fetches the state of its libraries whenever it connects, so it needs no notice.
        gap=None,
        reset="close 1001",
        revoked=None,
        stopping="close 1001 stopping",
    )
    resumes_where_cut = True

    def channel(self, name: str) -> str:
        return f"{_PREFIX}{uuid.uuid5(uuid.NAMESPACE_DNS, name)}"

    def entry(self, channel: str, number: int, filling: str) -> Mapping[str, str]:
        content = {
            "repo_id": channel.removeprefix(_PREFIX),
            "path": str(number),
            "change_event": "locked",
            "lock_user": "bob@example.com",
            "filling": filling,
        }
        return {"type": "file-lock-changed", "data": json.dumps(content)}

    @asynccontextmanager
    async def clients(self, relay: RelayProcess) -> AsyncIterator[Clients]:
        async with websockets() as sockets:
            yield SeafileClients(relay, sockets)


def driver() -> Driver:
    return SeafileDriver()
