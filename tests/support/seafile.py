"""Seafile's servers and clients: tokens as its servers sign them, and a client's socket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.support.clients import LIMIT_S, Answer
from tests.support.relay import RelayProcess

KEY = "M@O8VWUb81YvmtWLHGB2I_V7di5-@0p(MF*GrE!sIws23F"


def sign(key: str = KEY, algorithm: str = "HS256", **claims: Any) -> str:
    """Return a JWT with exactly these claims. The key may have any length."""
    head = _base64(json.dumps({"alg": algorithm, "typ": "JWT"}).encode())
    signed = f"{head}.{_base64(json.dumps(claims).encode())}"
    if algorithm == "none":
        return f"{signed}."
    digest = hmac.digest(key.encode(), signed.encode(), f"sha{algorithm[2:]}")
    return f"{signed}.{_base64(digest)}"


def subscribe_token(
    repo_id: str, user: str = "alice@example.com", *, ttl_s: float = 259_200, key: str = KEY
) -> str:
    """Return a client's token for one library, valid for 72 hours."""
    return sign(key, repo_id=repo_id, username=user, exp=int(time.time() + ttl_s))


def sender_token(ttl_s: float = 300, key: str = KEY) -> str:
    """Return a token as seaf-server signs it for each event."""
    return sign(key, exp=int(time.time() + ttl_s))


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def new_library() -> str:
    """Return a library ID that no other test uses."""
    return str(uuid.uuid4())


class HungUp(Exception):
    """The connection is closed. `code` is 1006 if there was no close frame."""

    def __init__(self, code: int) -> None:
        super().__init__(str(code))
        self.code = code


class Client:
    """The websocket of a sync client. It answers pings."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def send(self, kind: str, content: object) -> None:
        """Send one message."""
        await self.socket.send_str(json.dumps({"type": kind, "content": content}))

    async def subscribe(self, *repo_ids: str, user: str = "alice@example.com", **more: Any) -> None:
        """Subscribe with a valid token for each library. There is no reply."""
        repos = [
            {"id": repo_id, "jwt_token": subscribe_token(repo_id, user), **more}
            for repo_id in repo_ids
        ]
        await self.send("subscribe", {"repos": repos})

    async def settle(self) -> None:
        """Wait until earlier messages have been processed: a rejected token has a reply."""
        mark = new_library()
        await self.send("subscribe", {"repos": [{"id": mark, "jwt_token": "bad"}]})
        assert await self.next() == {"type": "jwt-expired", "content": {"repo_id": mark}}

    async def text(self, limit_s: float = LIMIT_S) -> str:
        """Return the next message as bytes."""
        async with asyncio.timeout(limit_s):
            while (message := await self.socket.receive()).type is aiohttp.WSMsgType.PING:
                # Received messages can still be read when the connection is closed for writing.
                with contextlib.suppress(ConnectionError):
                    await self.socket.pong(message.data)
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise HungUp(self.socket.close_code or 1006)
        text: str = message.data
        return text

    async def next(self, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """Return the next message."""
        found: dict[str, Any] = json.loads(await self.text(limit_s))
        return found

    async def take(self, count: int) -> list[dict[str, Any]]:
        """Return the next `count` messages."""
        return [await self.next() for _ in range(count)]

    async def hung_up(self) -> int:
        """Return the close code. No message may precede it."""
        try:
            unexpected = await self.text()
        except HungUp as exc:
            return exc.code
        raise AssertionError(unexpected)


@dataclass(frozen=True, slots=True)
class Seafile:
    """Servers and clients of one relay. They are closed at the end of the test."""

    port: int
    session: aiohttp.ClientSession
    relay: RelayProcess
    sockets: list[Client] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Return the URL without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    async def connect(
        self, path: str = "/notification", *, agent: str = "Seafile/9.0.20 (Linux)", **options: Any
    ) -> Client:
        """Connect as the sync client does."""
        socket = await self.session.ws_connect(
            self.url + path,
            headers={"User-Agent": agent},
            protocols=("notification.seafile.com",),
            max_msg_size=0,
            autoping=False,
            **options,
        )
        client = Client(socket)
        self.sockets.append(client)
        return client

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send one request with exactly this path."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))
        async with asyncio.timeout(LIMIT_S):
            head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        status, *fields = head.decode().split("\r\n")
        pairs = (line.partition(": ") for line in fields)
        return Answer(
            int(status.split()[1]), {name.lower(): value for name, _, value in pairs}, rest
        )

    async def post(self, kind: str, content: object, **headers: str) -> Answer:
        """Post an event as seaf-server of 12 and 13 does, unless headers are given."""
        body = json.dumps({"type": kind, "content": content}, separators=(",", ":")).encode()
        given = headers or {"Authorization": f"Token {sender_token()}"}
        return await self.request("POST", "/events", body, given)

    async def commit(self, repo_id: str, commit_id: str) -> None:
        """Post a repo-update."""
        answer = await self.post("repo-update", {"repo_id": repo_id, "commit_id": commit_id})
        assert answer.status == 200, answer

    async def lock(self, repo_id: str, path: str, change: str = "locked") -> None:
        """Post a file-lock-changed."""
        content = {
            "repo_id": repo_id,
            "path": path,
            "change_event": change,
            "lock_user": "bob@example.com",
        }
        assert (await self.post("file-lock-changed", content)).status == 200


@asynccontextmanager
async def seafile(relay: RelayProcess, port: int | None = None) -> AsyncIterator[Seafile]:
    """Yield the Seafile side of one test."""
    async with aiohttp.ClientSession() as session:
        one = Seafile(port or relay.port, session, relay)
        try:
            yield one
        finally:
            for client in one.sockets:
                await client.socket.close()


async def followed(
    door: Seafile, *repo_ids: str, user: str = "alice@example.com", **options: str
) -> Client:
    """Return a client that has received an event of each library."""
    client = await door.connect(**options)
    await client.subscribe(*repo_ids, user=user)
    for repo_id in repo_ids:
        await standing(door, client, repo_id)
    return client


async def standing(door: Seafile, client: Client, repo_id: str) -> None:
    """Wait until the client receives events: a subscription has no confirmation."""
    number = 0
    while True:
        mark = {"repo_id": repo_id, "mark": number}
        assert (await door.post("comment-update", mark)).status == 200
        number += 1
        try:
            while (await client.next(0.3))["content"] != mark:
                pass
        except TimeoutError:
            continue
        return
