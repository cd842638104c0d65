"""Real Socket.IO clients and emitters from npm, and AcceleratXR's tokens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt

from tests.support.clients import LIMIT_S
from tests.support.npm import environment, node

SECRET = "a secret of AcceleratXR that is long enough"
CLIENTS = ("socket.io-client-2", "socket.io-client-3", "socket.io-client")
_DRIVER = Path(__file__).with_name("socketio_client.cjs")
_EMITTER = Path(__file__).with_name("socketio_emitter.cjs")
GENERATIONS = ("3", "5")


def axr_token(
    uid: str = "u1", *, secret: str = SECRET, as_text: bool = False, **claims: Any
) -> str:
    """Return a token as AcceleratXR's account service signs it."""
    profile: object = {"uid": uid, "name": uid.title(), "roles": ["player"]}
    if as_text:
        profile = json.dumps(profile)
    ends = {"exp": time.time() + 3600} | claims
    return jwt.encode({"profile": profile, **ends}, secret, algorithm="HS256")


class NpmClient:
    """One client of the driver."""

    def __init__(self, driver: Driver, name: str) -> None:
        self._driver = driver
        self.name = name
        self.seen: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.events: list[list[Any]] = []

    async def next(self, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """Return the next report of the client."""
        async with asyncio.timeout(limit_s):
            return await self.seen.get()

    async def until(self, what: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """Return the next report of this kind. Earlier events are kept in `events`."""
        async with asyncio.timeout(limit_s):
            while True:
                found = await self.seen.get()
                if found["what"] == what:
                    return found
                if found["what"] == "event":
                    self.events.append(found["args"])

    async def event(self, limit_s: float = LIMIT_S) -> list[Any]:
        """Return the name and arguments of the next event."""
        if self.events:
            return self.events.pop(0)
        args: list[Any] = (await self.until("event", limit_s))["args"]
        return args

    async def do(self, what: str, *args: Any) -> None:
        """Send a command to the client."""
        await self._driver.send({"do": self.name, "what": what, "args": args})


class Driver:
    """A Node process with any number of clients."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._clients: dict[str, NpmClient] = {}

    async def open(
        self,
        url: str,
        *,
        package: str = "socket.io-client",
        path: str = "/notifications",
        **options: Any,
    ) -> NpmClient:
        """Create a client that connects. Its reports start with the connection."""
        name = f"c{len(self._clients)}"
        client = self._clients[name] = NpmClient(self, name)
        options = {"path": path, "reconnectionDelay": 20, "reconnectionDelayMax": 100, **options}
        await self.send({"open": name, "package": package, "url": url, "options": options})
        return client

    async def send(self, command: object) -> None:
        """Send one line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        await self._process.stdin.drain()

    async def read(self) -> None:
        """Read the reports of the clients. Runs until cancelled."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            found = json.loads(line)
            self._clients[found["name"]].seen.put_nowait(found)


@asynccontextmanager
async def npm_clients() -> AsyncIterator[Driver]:
    """Run clients for one test."""
    process = await asyncio.create_subprocess_exec(
        node(),
        str(_DRIVER),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=await asyncio.to_thread(environment),
        limit=1 << 24,
    )
    driver = Driver(process)
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(driver.read())
        try:
            yield driver
        finally:
            reading.cancel()
            process.kill()
            await process.wait()


def connect_options(package: str, token: str) -> dict[str, Any]:
    """Return the options with which a client of this generation sends its token."""
    if package == "socket.io-client-2":
        return {"query": {"jwt_token": token}}
    return {"auth": {"token": token}}


class Emitter:
    """A Node process with an emitter of /axr: socket.io-emitter 3.2 or 5.x."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def run(self, script: str) -> None:
        """Run JavaScript with the emitter `io`. Return when Redis has received its messages."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(script.replace("\n", " ").encode() + b"\n")
        async with asyncio.timeout(LIMIT_S):
            assert await self._process.stdout.readline() == b"done\n"


@asynccontextmanager
async def emitter(generation: str, port: int) -> AsyncIterator[Emitter]:
    """Run an emitter that publishes to Redis on this port."""
    process = await asyncio.create_subprocess_exec(
        node(),
        str(_EMITTER),
        generation,
        "127.0.0.1",
        str(port),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=await asyncio.to_thread(environment),
    )
    try:
        yield Emitter(process)
    finally:
        process.kill()
        await process.wait()
