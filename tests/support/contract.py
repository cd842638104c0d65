"""The contract that every protocol fulfils, as rules that run against a real relay.

A rule is a function that takes a `Site`: a running relay, its Valkey and the driver of the protocol
under test. A driver speaks one protocol as its clients do, and states in which words that protocol
reports each notice. To add a driver, write `tests/contract/drivers/<protocol>.py` with a function
`driver()` that returns a `Driver`.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp

from relay.cli import access
from relay.config.settings import RedisSettings
from relay.core.model import Channel
from tests.support.clients import LIMIT_S, redis, stream_key
from tests.support.relay import RelayProcess
from tests.support.valkey import Server

DRIVERS = Path(__file__).parents[1] / "contract" / "drivers"

# More than the socket buffers of client and server together hold.
_LARGE_BYTES = 20_000
_LARGE_EVENTS = 600
# If a client must receive nothing, the rule watches it for this time.
_QUIET_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The texts that `Connection.receive` returns for each notice.

    If `gap` is None, clients need no notice because they load their state whenever they connect.
    If `revoked` is None, events end without a notice.
    """

    rejected: str
    gap: str | None
    reset: str
    revoked: str | None
    stopping: str


class Connection(Protocol):
    """A client that is subscribed to one channel."""

    async def receive(self) -> int | str:
        """Return the number of the next event, or the words of a notice, a rejection or a close.

        Heartbeats are answered here and not returned.
        """

    def position(self) -> Any:
        """Return the position or session ID that the client sends when it resumes."""

    async def close(self) -> None:
        """Close the connection as clients do when they leave."""

    def abort(self) -> None:
        """Cut the TCP connection."""


class Clients(Protocol):
    """Opens connections to one relay during one test."""

    async def connect(self, user: str, channel: str, resume: Any = None) -> Connection:
        """Return a connection that receives the channel's events.

        Without `resume`, it receives new events only. `resume` is an earlier `Connection.position`.
        """

    async def connect_rejected(self, channel: str) -> Connection:
        """Try to connect and subscribe with bad credentials.

        The rejection may be the first message that the connection receives.
        """


class Driver(Protocol):
    """One protocol as its clients speak it."""

    terms: Terms
    # True if clients send no position when they resume. Data that reached the client's host before
    # the cut then counts as received.
    resumes_where_cut: bool

    @property
    def settings(self) -> Sequence[str]:
        """Return settings of the relay, each as `section.name=value`."""

    def channel(self, name: str) -> str:
        """Return a channel name that this protocol serves."""

    def entry(self, channel: str, number: int, filling: str) -> Mapping[str, str]:
        """Return the fields of an entry with this number and some filling."""

    def clients(self, relay: RelayProcess) -> AbstractAsyncContextManager[Clients]:
        """Return clients of `relay`. All connections are closed at exit."""


def load(protocol: str) -> Driver:
    """Return the driver of a protocol. Raises LookupError if it is not written yet."""
    if not (DRIVERS / f"{protocol}.py").exists():
        raise LookupError(
            f"the protocol {protocol} has no contract driver: write tests/contract/drivers/"
            f"{protocol}.py with a function driver() that returns a tests.support.contract.Driver"
        )
    made: Driver = importlib.import_module(f"tests.contract.drivers.{protocol}").driver()
    return made


_numbers = itertools.count()


class Site:
    """A relay that serves the protocol under test, and one channel of its own."""

    def __init__(
        self,
        protocol: str,
        driver: Driver,
        relay: RelayProcess,
        clients: Clients,
        *,
        limit_s: float = LIMIT_S,
    ) -> None:
        """Prepare the site. Clients wait at most `limit_s` for an event or notice."""
        self.driver = driver
        self.terms = driver.terms
        self.relay = relay
        self.server: Server = relay.server
        self.clients = clients
        self.protocol = protocol
        self.limit_s = limit_s
        self._number = next(_numbers)
        self.channel = driver.channel(f"contract-{self._number}")
        self._appended = 0

    def user(self, name: str) -> str:
        """Return the name of a user that no other rule has."""
        return f"{name}-{self._number}"

    async def append(self, count: int = 1, filling: str = "") -> range:
        """Append the next entries; return their numbers."""
        numbers = range(self._appended, self._appended + count)
        self._appended += count

        def append() -> None:
            # Keep the client as long as the pipeline, because it closes the connection.
            with self.server.client() as client, client.pipeline(transaction=False) as pipeline:
                for number in numbers:
                    fields = self.driver.entry(self.channel, number, filling)
                    words = itertools.chain.from_iterable(fields.items())
                    pipeline.execute_command("XADD", stream_key(self.channel), "*", *words)
                pipeline.execute()

        await asyncio.to_thread(append)
        return numbers

    async def redis(self, *words: str | int) -> Any:
        """Run one Redis command."""
        return await asyncio.to_thread(redis, self.server, *words)

    async def connect(self, user: str = "ann", resume: Any = None) -> Connection:
        """Return a connection that is subscribed to the channel."""
        return await self.clients.connect(self.user(user), self.channel, resume)

    async def metric(self, name: str) -> float:
        """Return a metric of the relay, 0 if it does not exist."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.relay.url}/metrics") as answer,
        ):
            lines = (await answer.text()).splitlines()
        samples = (line.rpartition(" ") for line in lines)
        return next((float(value) for sample, _, value in samples if sample == name), 0.0)

    async def wait_metric(self, name: str, accept: Callable[[float], bool]) -> None:
        """Wait until the metric has an accepted value."""
        value = 0.0
        try:
            async with asyncio.timeout(self.limit_s):
                while not accept(value := await self.metric(name)):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{name} stays at {value:g}") from None

    async def receive(self, connection: Connection, limit_s: float | None = None) -> int | str:
        """Return the next event or notice of the client, or "nothing" after the limit."""
        try:
            async with asyncio.timeout(limit_s or self.limit_s):
                return await connection.receive()
        except TimeoutError:
            return "nothing"

    async def receive_numbers(self, connection: Connection, count: int) -> list[int | str]:
        """Return the next events, up to the first notice."""
        received: list[int | str] = []
        while len(received) < count:
            received.append(await self.receive(connection))
            if isinstance(received[-1], str):
                break
        return received


# ---- rules ----------------------------------------------------------------------------------


async def connects(site: Site) -> None:
    """A subscribed client receives the next event."""
    client = await site.connect()
    await site.append()
    assert await site.receive(client) == 0


async def rejects_bad_credentials(site: Site) -> None:
    """A client with bad credentials is rejected in the protocol's terms and receives no event."""
    client = await site.clients.connect_rejected(site.channel)
    watching = await site.connect()
    await site.append()
    assert await site.receive(watching) == 0
    assert await site.receive(client) == site.terms.rejected


async def receives_in_order(site: Site) -> None:
    """A client receives every event once, in the order of the stream."""
    client = await site.connect()
    for count in (1, 50, 200):
        numbers = await site.append(count)
        assert await site.receive_numbers(client, count) == list(numbers)


async def resumes(site: Site) -> None:
    """A client that resumes receives every missed event once."""
    client = await site.connect()
    await site.append(10)
    seen = 10 if site.driver.resumes_where_cut else 5
    assert await site.receive_numbers(client, seen) == list(range(seen))
    position = client.position()
    client.abort()
    await site.append(5)
    client = await site.connect(resume=position)
    await site.append(5)
    assert await site.receive_numbers(client, 20 - seen) == list(range(seen, 20))


async def reports_gap(site: Site) -> None:
    """A client that resumes before the first existing entry receives a gap notice."""
    client = await site.connect()
    await site.append()
    assert await site.receive(client) == 0
    position = client.position()
    client.abort()
    numbers = await site.append(5)
    await site.redis("XTRIM", stream_key(site.channel), "MAXLEN", 2)
    client = await site.connect(resume=position)
    if site.terms.gap is not None:
        assert await site.receive(client) == site.terms.gap
    else:
        assert await site.receive_numbers(client, 2) == list(numbers[-2:])


async def reports_reset(site: Site) -> None:
    """A connected client receives a notice if its stream is deleted and created again."""
    client = await site.connect()
    await site.append()
    assert await site.receive(client) == 0
    await site.redis("DEL", stream_key(site.channel))
    await site.append()
    assert await site.receive(client) == site.terms.reset


async def reports_revocation(site: Site) -> None:
    """A user whose right is revoked receives the events before that point and none after it."""
    client, other = await site.connect("eve"), await site.connect("ann")
    numbers = list(await site.append(3))
    settings = RedisSettings(url=site.server.url("maintenance"))
    await access.revoke(settings, Channel(site.channel), site.user("eve"))
    numbers += await site.append()
    assert await site.receive_numbers(client, 3) == numbers[:3]
    if site.terms.revoked is not None:
        assert await site.receive(client) == site.terms.revoked
    assert await site.receive_numbers(other, 4) == numbers
    last = await site.receive(client, _QUIET_S)
    assert not isinstance(last, int), f"received event {last} after the revocation"


async def survives_a_full_socket(site: Site) -> None:
    """A client that stops reading does not delay others, and receives everything when it reads."""
    slow, other = await site.connect("eve"), await site.connect("ann")
    numbers = list(await site.append(_LARGE_EVENTS, "x" * _LARGE_BYTES))
    assert await site.receive_numbers(other, len(numbers)) == numbers
    # Proves that the socket was full: the relay serves this client from the stream.
    await site.wait_metric("relay_catch_up_clients", lambda value: value >= 1)
    assert await site.receive_numbers(slow, len(numbers)) == numbers
    await site.wait_metric("relay_catch_up_clients", lambda value: value == 0)
    numbers = list(await site.append())
    assert await site.receive_numbers(slow, 1) == await site.receive_numbers(other, 1) == numbers


async def leaks_nothing(site: Site) -> None:
    """Once all clients have left, connections, groups and keys are as they were before."""
    connections = f'relay_connections{{protocol="{site.protocol}"}}'
    await site.append()

    async def state() -> tuple[float, float, set[bytes], set[bytes]]:
        groups = await site.redis("XINFO", "GROUPS", stream_key(site.channel))
        return (
            await site.metric(connections),
            await site.metric("relay_subscriptions"),
            {group[b"name"] for group in groups},
            set(await site.redis("KEYS", "*")),
        )

    # The first clients create permanent objects, such as the stream's marker group.
    for number in range(3):
        await (await site.connect(f"user{number}")).close()
    await site.wait_metric(connections, lambda value: value == 0)
    await site.wait_metric("relay_subscriptions", lambda value: value == 0)
    before = await state()
    clients = [await site.connect(f"user{number % 3}") for number in range(9)]
    (number,) = await site.append()
    for client in clients:
        assert await site.receive(client) == number
    assert await site.metric(connections) == len(clients)
    for index, client in enumerate(clients):
        if index % 2:
            await client.close()
        else:
            client.abort()
    left: list[object] = []
    try:
        async with asyncio.timeout(site.limit_s):
            while True:
                now = await state()
                left = [now[0] - before[0], now[1] - before[1], now[2] - before[2]]
                left.append(now[3] - before[3])
                if not any(left):
                    return
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(
            f"left over (connections, subscriptions, groups, keys): {left}"
        ) from None


async def ends_at_shutdown(site: Site) -> None:
    """At SIGTERM the client is asked to reconnect in the protocol's terms, and the relay exits."""
    client = await site.connect()
    await site.append()
    assert await site.receive(client) == 0
    site.relay.send(signal.SIGTERM)
    assert await site.receive(client) == site.terms.stopping
    assert await asyncio.to_thread(site.relay.ended, LIMIT_S) == 0


RULES: tuple[Callable[[Site], Awaitable[None]], ...] = (
    connects,
    rejects_bad_credentials,
    receives_in_order,
    resumes,
    reports_gap,
    reports_reset,
    reports_revocation,
    survives_a_full_socket,
    leaks_nothing,
    ends_at_shutdown,
)


class Frames:
    """A websocket that reads one frame per call of `next`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        # Cancelling aiohttp's receive() closes the websocket, so keep the task and await it again.
        self._receiving: asyncio.Task[aiohttp.WSMessage] | None = None

    async def next(self) -> str:
        """Return the next text frame, or "close <code> <reason>"."""
        if self._receiving is None:
            self._receiving = asyncio.get_running_loop().create_task(self.socket.receive())
        message = await asyncio.shield(self._receiving)
        self._receiving = None
        if message.type is aiohttp.WSMsgType.TEXT:
            text: str = message.data
            return text
        reason = message.extra or "" if message.type is aiohttp.WSMsgType.CLOSE else ""
        return f"close {self.socket.close_code} {reason}".rstrip()

    async def close(self) -> None:
        """Close with a close frame."""
        if self._receiving is not None:
            self._receiving.cancel()
        await self.socket.close()

    def abort(self) -> None:
        """Cut the TCP connection."""
        if self._receiving is not None:
            self._receiving.cancel()
        response = self.socket._response  # aiohttp has no public way
        if response.connection is not None and response.connection.transport is not None:
            response.connection.transport.abort()
        response.close()


_Frames = TypeVar("_Frames", bound=Frames)


class WebSockets:
    """Opens websockets for the drivers."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._opened: list[Frames] = []

    async def open(self, kind: type[_Frames], url: str, **headers: str) -> _Frames:
        """Open a connection of this kind. Return it after the handshake."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        socket = await self._session.ws_connect(url, headers=names, max_msg_size=0)
        connection = kind(socket)
        self._opened.append(connection)
        return connection

    def cut_all(self) -> None:
        """Cut all connections that are still open."""
        for connection in self._opened:
            connection.abort()


@asynccontextmanager
async def websockets() -> AsyncIterator[WebSockets]:
    """Yield an opener of websockets. Cut its connections at exit."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        opened = WebSockets(session)
        try:
            yield opened
        finally:
            opened.cut_all()
