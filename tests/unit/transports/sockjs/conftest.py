"""Two workers that echo messages. A client talks to one of them or to both in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvloop
from aiohttp import ClientResponse, ClientSession, TCPConnector

from relay.transports.sockjs.sessions import SockJsOptions
from tests.support.siblings import Cluster
from tests.support.sockjs import OPTIONS, EchoDoor, MemoryStore

ADDRESSES = ("0000000a", "0000000b")


class Site:
    """The workers and a client that cannot choose between them."""

    def __init__(self, mode: str, options: SockJsOptions) -> None:
        self.mode = "local" if mode == "local" else "turns"
        self.cluster = Cluster(ADDRESSES, on_its_own_host=mode == "spliced")
        self.workers = list(self.cluster.workers.values())
        self.store = MemoryStore()
        self.doors = [
            EchoDoor(each.address, self.store, options, each.forward) for each in self.workers
        ]
        self.ports: list[int] = []
        self.http: ClientSession
        self._turn = 0
        self._ids = 0

    @property
    def door(self) -> EchoDoor:
        """Return the handler of the worker that has the sessions."""
        return self.doors[0]

    def session(self, door: str = "echo") -> str:
        """Return the path of a new session."""
        self._ids += 1
        return f"/{door}/000/s{self._ids}"

    def url(self, path: str) -> str:
        """Return a URL at the first worker, or with `turns` at each worker in turn."""
        port = self.ports[self._turn % 2 if self.mode == "turns" else 0]
        self._turn += 1
        return f"http://127.0.0.1:{port}{path}"

    @asynccontextmanager
    async def request(
        self, method: str, path: str, data: bytes | None = None, **headers: str
    ) -> AsyncIterator[ClientResponse]:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.http.request(
            method, self.url(path), data=data, headers=names, allow_redirects=False
        ) as response:
            yield response

    async def fetch(
        self, method: str, path: str, data: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        async with self.request(method, path, data, **headers) as response:
            return response.status, await response.read()

    async def get(self, path: str) -> bytes:
        status, body = await self.fetch("GET", path)
        assert status == 200
        return body

    async def post(self, path: str, data: bytes = b"") -> bytes:
        status, body = await self.fetch("POST", path, data)
        assert status == 200
        return body

    async def send(self, session: str, *messages: str) -> None:
        body = ("[" + ",".join(f'"{each}"' for each in messages) + "]").encode()
        assert await self.fetch("POST", session + "/xhr_send", body) == (204, b"")


Main = Callable[[Site], Awaitable[None]]
RunSite = Callable[..., None]


@pytest.fixture(
    params=[
        f"{mode}-{loop}"
        for mode in ("local", "passed", "spliced")
        for loop in ("asyncio", "uvloop")
    ]
)
def on_site(request: pytest.FixtureRequest) -> RunSite:
    """Run a test with requests to the session's worker, or passed on by another worker."""
    mode, _, kind = str(request.param).partition("-")
    factory = uvloop.new_event_loop if kind == "uvloop" else asyncio.new_event_loop
    reported: list[object] = []

    def go(main: Main, options: SockJsOptions = OPTIONS) -> None:
        async def all_of_it() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, what: reported.append(what))
            site = Site(mode, options)
            async with (
                asyncio.timeout(30),
                site.workers[0].serving(site.doors[0].routes) as one,
                site.workers[1].serving(site.doors[1].routes) as two,
                # Otherwise passed connections would stay with the session's worker.
                ClientSession(
                    connector=TCPConnector(limit=0, force_close=mode == "passed")
                ) as site.http,
            ):
                site.ports = [one, two]
                await main(site)
            site.cluster.close()

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(all_of_it())
        assert not reported

    return go
