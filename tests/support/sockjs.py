"""SockJS endpoints that sockjs-protocol requires: one echoes, one closes the session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from relay.core.errors import Unavailable
from relay.transports.between_workers.forwarder import Forward
from relay.transports.socket.exchange import HttpRequest
from relay.transports.socket.listener import GuardedSite
from relay.transports.sockjs.frames import element
from relay.transports.sockjs.registry import ClaimStore
from relay.transports.sockjs.routes import SockJs
from relay.transports.sockjs.session import SockJsSession
from relay.transports.sockjs.sessions import SockJsOptions

OPTIONS = SockJsOptions(
    sockjs_url="/sockjs.min.js",
    heartbeat_s=25.0,
    max_request_bytes=65536,
    buffer_bytes=65536,
    response_limit_bytes=4096,
)


class MemoryStore:
    """`Store` in memory. `asked` counts requests."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.asked = 0
        self.away = False

    async def claim(self, name: str, value: bytes, ttl_s: float) -> bytes | None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("away")
        found = self.values.get(name)
        if found is None:
            self.values[name] = value
        return found

    async def put(self, name: str, value: bytes, ttl_s: float) -> None:
        self.asked += 1
        self.values[name] = value

    async def put_many(self, values: Mapping[str, bytes], ttl_s: float) -> None:
        self.asked += 1
        self.values.update(values)

    async def get(self, name: str) -> bytes | None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("away")
        return self.values.get(name)

    async def delete(self, name: str) -> None:
        self.asked += 1
        self.values.pop(name, None)


async def forward_nothing(
    request: web.Request, owner: str, limit_bytes: int
) -> web.StreamResponse | None:
    """Return None: this door has no other workers."""
    return None


class EchoDoor:
    """Sends each message back at /echo, and closes each session at /close."""

    def __init__(
        self,
        address: str,
        store: ClaimStore,
        options: SockJsOptions = OPTIONS,
        forward: Forward = forward_nothing,
    ) -> None:
        self.sessions: list[SockJsSession] = []
        self.texts: list[bytes] = []
        self.closed = 0
        self.oversized = 0
        self.changed = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

        self.echo = SockJs(
            door="echo",
            prefix="/echo",
            options=options,
            accept=self._accept,
            address=address,
            store=store,
            forward=forward,
            spawn=self._spawn,
        )
        self.close = SockJs(
            door="close",
            prefix="/close",
            options=options,
            accept=lambda session, asked: session.close(),
            address=address,
            store=store,
            forward=forward,
            spawn=self._spawn,
        )
        self.routes = [*self.echo.routes, *self.close.routes]

    def _spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> object:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def _accept(self, session: SockJsSession, asked: HttpRequest) -> None:
        self.sessions.append(session)

        def on_text(text: bytes) -> None:
            self.texts.append(text)
            if text == b"close please":
                session.close_with(3001, "as you wish")
            else:
                session.write(element(text))

        def on_oversized() -> None:
            self.oversized += 1
            session.close_with(3000, "limit exceeded")

        def on_closed() -> None:
            self.closed += 1
            self.changed.set()

        session.on_text = on_text
        session.on_oversized = on_oversized
        session.on_closed = on_closed
        self.changed.set()

    async def until_closed(self, count: int) -> None:
        while self.closed < count:
            self.changed.clear()
            await self.changed.wait()


@asynccontextmanager
async def serving(routes: list[web.AbstractRouteDef], port: int = 0) -> AsyncIterator[int]:
    """Serve the routes on their own port."""
    app = web.Application()
    app.router.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=1.0, access_log=None)
    await runner.setup()
    site = GuardedSite(runner, "127.0.0.1", port)
    await site.start()
    try:
        yield site.port
    finally:
        await runner.cleanup()
