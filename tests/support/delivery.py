"""An account of each event on several servers, while servers move channels, die or are frozen.

Real producers publish numbers, and real clients of every protocol follow them. At the end, the
streams and what each client received are compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import math
import random
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from redis import asyncio as aioredis
from redis.cluster import RedisCluster as ClusterClient
from redis.exceptions import RedisError

from relay.config.settings import RedisSettings
from relay.stream.shards.making import shard_map
from tests.contract.drivers import pydio as pydio_driver
from tests.contract.drivers import seafile as seafile_driver
from tests.support import pydio
from tests.support.centrifuge_js import JsClient, running_node
from tests.support.clients import Closed, Refused, native, stream_key
from tests.support.contract import WebSockets, websockets
from tests.support.polling import SECRET, SETTINGS
from tests.support.redis_cluster import RedisCluster
from tests.support.relay import RelayProcess
from tests.support.seafile import KEY as SEAFILE_KEY
from tests.support.seafile import sender_token, subscribe_token
from tests.support.socketio import CLIENTS as PACKAGES
from tests.support.socketio import (
    Emitter,
    NpmClient,
    axr_token,
    connect_options,
    emitter,
    npm_clients,
)
from tests.support.valkey import Server, running

_NUMBER = re.compile(rb'"n":\s*(\d+)|<note>(\d+) |"path":\s*"(\d+)"')
_CENTRIFUGO = [
    "protocol:centrifugo.recover=yes",
    "protocol:centrifugo.history_size=100000",
    "protocol:centrifugo.history_lifetime=3600",
]
_TRANSPORTS = ("xhr-polling", "xhr-streaming", "eventsource", "websocket")
_QUEUE = "centrifugo.api"
# Time until all clients have received the last event.
_CATCH_UP_S = 60.0
# Producers whose events are appended later than they are sent.
_LATER = ("queue", "emitter")
_START_S = 100.0
# The longest time between a message of PHP, or a command in the queue, and its append.
_IN_FLIGHT_S = 3.0
_NATIVE = ("http", "queue", "direct")


class Site(Protocol):
    """The servers."""

    url: str

    def start(self) -> None:
        """Start the servers."""

    def stop(self) -> None:
        """Stop those that still run."""

    def client(self) -> _Client:
        """Return a client that sends each command to the server that has its key."""

    def server_of(self, key: str) -> int:
        """Return the number of the server that has this key now."""


class _Client(Protocol):
    async def execute_command(self, *words: Any) -> Any: ...
    async def aclose(self) -> None: ...


class ClusterSite:
    """A Redis Cluster."""

    def __init__(self, folder: Path, rights: str = "") -> None:
        """`rights`: see `Server`."""
        self.cluster = RedisCluster(folder, replicas=1, acl=True, rights=rights)
        self.url = ""

    def start(self) -> None:
        self.cluster.start()
        self.allow_failover(is_allowed=False)
        # One node that is never killed, and one that may be.
        login, _, address = self.cluster.servers[0].url("relay").rpartition("@")
        self.url = f"{login}@{address}, 127.0.0.1:{self.cluster.servers[4].port}"

    def allow_failover(self, *, is_allowed: bool) -> None:
        """Forbid failovers only because the machine is busy."""
        value = "no" if is_allowed else "yes"
        for number in self.cluster.running():
            self.cluster.call(number, "CONFIG", "SET", "cluster-replica-no-failover", value)

    def stop(self) -> None:
        self.cluster.stop()

    def client(self) -> _Client:
        return _Threaded(self.cluster.servers[0].port)

    def server_of(self, key: str) -> int:
        return self.cluster.owner_of(key.encode())


class _Threaded:
    """redis-py's client for clusters, in threads."""

    def __init__(self, port: int) -> None:
        self._client = ClusterClient(
            "127.0.0.1", port, username="admin", password="any", socket_timeout=2
        )

    async def execute_command(self, *words: Any) -> Any:
        try:
            return await asyncio.to_thread(self._client.execute_command, *words)
        except AttributeError as exc:
            # redis-py 8.1 does not know a server that was added, and is sent to with ASK.
            raise RedisError("unknown server") from exc

    async def aclose(self) -> None:
        self._client.close()


class _Hashed:
    def __init__(self, site: ServersSite) -> None:
        self._site = site
        self._clients = [
            aioredis.Redis.from_url(server.url("admin"), socket_timeout=2)
            for server in site.servers
        ]

    async def execute_command(self, *words: Any) -> Any:
        client = self._clients[self._site.server_of(str(words[1]))]
        return await client.execute_command(*words)  # type: ignore[no-untyped-call]

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()


class ServersSite:
    """Three independent servers."""

    def __init__(self, folder: Path, rights: str = "") -> None:
        """`rights`: see `Server`."""
        self.servers = [Server(folder / name, rights=rights) for name in ("a", "b", "c")]
        self.url = ", ".join(server.url("relay") for server in self.servers)
        self._map = shard_map(RedisSettings(url=self.url))

    def start(self) -> None:
        for server in self.servers:
            server.start()

    def stop(self) -> None:
        for server in self.servers:
            server.kill()

    def client(self) -> _Client:
        return _Hashed(self)

    def server_of(self, key: str) -> int:
        name = self._map.shard_of(key.encode()).name
        return next(n for n, each in enumerate(self.servers) if name.endswith(f":{each.port}"))


# ---- what was published and received ------------------------------------------------------------


@dataclass
class Channel:
    """One channel with one producer."""

    name: str
    producer: str
    sent: int = 0
    acknowledged: dict[int, float] = field(default_factory=dict)
    # Published again, because the outcome was unknown.
    repeated: set[int] = field(default_factory=set)
    # Since when Redis may have lost what relay was to append.
    unsafe_since: float = math.inf
    # The numbers in the stream at the end.
    truth: list[int] = field(default_factory=list)

    @property
    def key(self) -> str:
        return stream_key(self.name)

    def unsafe(self) -> set[int]:
        """Return the numbers that relay may have appended again, or never received."""
        return {number for number, at in self.acknowledged.items() if at > self.unsafe_since}


@dataclass
class Follower:
    """What one client received, over all its connections."""

    name: str
    channel: Channel
    # Whether a client that could not resume may receive the history again.
    replays: bool = False
    # Numbers of events, and notices, each with its time.
    received: list[tuple[int | str, float]] = field(default_factory=list)
    # The number of received items when the connection was lost.
    lost_at: int | None = None
    is_connected: bool = False
    # What else the client reported, for a failure.
    log: list[str] = field(default_factory=list)

    def say(self, text: object) -> None:
        self.log.append(
            f"{time.strftime('%H:%M:%S')} after {len(self.received)}: {str(text)[:200]}"
        )

    def lose(self, reason: object) -> None:
        """Record that the connection was lost."""
        self.lost_at = len(self.received)
        self.say(f"lost: {reason}")

    def event(self, number: int) -> None:
        self.received.append((number, time.monotonic()))

    def notice(self, text: str) -> None:
        """Record that the client was notified that it may have missed events."""
        # A client of Centrifugo receives the history before the notice.
        at = self.lost_at if self.replays else None
        place = len(self.received) if at is None else at
        self.received.insert(place, (text, time.monotonic()))
        self.lost_at = None

    def notices(self) -> list[tuple[str, float]]:
        return [(what, at) for what, at in self.received if isinstance(what, str)]

    def has_last(self) -> bool:
        """Return True if the last event of the channel has arrived, or a notice was the last."""
        if not self.channel.truth or not self.received:
            return not self.channel.truth
        last = self.received[-1][0]
        seen = {what for what, _ in self.received}
        return self.channel.truth[-1] in seen or isinstance(last, str)

    def check(self) -> dict[str, list[int]]:
        """Compare with the stream. A notice excuses everything that is missing at its place."""
        places: dict[int, list[int]] = {}
        for place, number in enumerate(self.channel.truth):
            places.setdefault(number, []).append(place)
        found: dict[str, list[int]] = {"silent": [], "twice": [], "swapped": [], "notified": []}
        seen: set[int] = set()
        before: int | None = None
        is_notified = False
        repeated = self.channel.repeated | self.channel.unsafe()
        items = [what for what, _ in self.received]
        last = {what: place for place, what in enumerate(items)}
        last_notice = max((last[what] for what in items if isinstance(what, str)), default=-1)
        for index, what in enumerate(items):
            if isinstance(what, str):
                is_notified = True
                continue
            if what in repeated and index < last_notice < last[what]:
                # Redis has lost it after it was delivered, and it was appended again.
                continue
            if what not in places:
                # Redis has lost it after it was delivered.
                seen.add(what)
                continue
            place = next((p for p in places[what] if before is None or p > before), -1)
            if place < 0:
                if is_notified and (self.replays or what in repeated):
                    place = places[what][-1]
                else:
                    found["twice" if what in seen else "swapped"].append(what)
                    continue
            elif what in seen and not self.replays and what not in repeated:
                found["twice"].append(what)
            if before is not None and place > before + 1:
                missed = self.channel.truth[before + 1 : place]
                found["notified" if is_notified else "silent"] += missed
            before, is_notified = place, False
            seen.add(what)
        if before is not None and before + 1 < len(self.channel.truth):
            rest = self.channel.truth[before + 1 :]
            found["notified" if is_notified else "silent"] += rest
        return found

    def lost(self) -> list[int]:
        """Return the acknowledged numbers that neither the stream nor this client has."""
        known = {what for what, _ in self.received} | set(self.channel.truth)
        return [number for number in self.channel.acknowledged if number not in known]

    def silence(self, begin: float, end: float) -> float:
        """Return the longest time without an event that has begun or ended in this time."""
        times = [at for what, at in self.received if isinstance(what, int)]
        pairs = itertools.pairwise([*times, end] if times and times[-1] < end else times)
        return max((two - one for one, two in pairs if two > begin and one < end), default=0.0)


# ---- clients ------------------------------------------------------------------------------------


async def _again(follower: Follower, connect: Callable[[], Any]) -> None:
    """Connect repeatedly until cancelled."""
    while True:
        with contextlib.suppress(
            OSError, EOFError, TimeoutError, Closed, Refused, aiohttp.ClientError, AssertionError
        ):
            await connect()
        await asyncio.sleep(random.uniform(0.05, 0.25))


class _Native:
    """A native client. With `drops`, it disconnects at random and resumes."""

    def __init__(
        self, follower: Follower, relays: Sequence[Any], *, is_socket: bool, drops: bool
    ) -> None:
        self._follower = follower
        self._relays = itertools.cycle(relays)
        self._is_socket = is_socket
        self._drops = drops
        self._last: str | None = None

    async def connect(self) -> None:
        follow = self._socket if self._is_socket else self._sse
        async with asyncio.timeout(random.uniform(0.3, 4) if self._drops else None):
            await follow()

    async def _sse(self) -> None:
        client = await next(self._relays).sse(self._follower.channel.name, header=self._last)
        try:
            self._follower.is_connected = True
            self._last = client.last_id or self._last
            while True:
                block = await client.next(3600)
                if (block.event or "").startswith("relay:"):
                    if block.event in ("relay:gap", "relay:reset"):
                        self._follower.notice(f"{block.event} {block.data}")
                else:
                    self._follower.event(block.json()["n"])
                self._last = client.last_id or self._last
        finally:
            client.drop()

    async def _socket(self) -> None:
        client = await next(self._relays).ws(self._follower.channel.name, last=self._last)
        try:
            while True:
                found = await client.next(3600)
                if found.get("reply") == "subscribe":
                    self._follower.is_connected = True
                    self._last = self._last or found["id"]
                elif found.get("notice") in ("gap", "reset"):
                    self._follower.notice(json.dumps(found))
                elif "data" in found:
                    self._follower.event(found["data"]["n"])
                    self._last = found["id"]
                elif "error" in found:
                    return
        finally:
            await client.socket.close()


class _Seafile:
    """A Seafile client loads the state of its libraries whenever it connects."""

    def __init__(
        self, follower: Follower, relays: Sequence[RelayProcess], sockets: WebSockets
    ) -> None:
        self._follower = follower
        self._relays = itertools.cycle(relays)
        self._sockets = sockets
        self._token = subscribe_token(follower.channel.name.removeprefix("seafile:"))

    async def connect(self) -> None:
        connection = await self._sockets.open(
            seafile_driver.SeafileConnection,
            f"{next(self._relays).url}/notification",
            User_Agent="Seafile/9.0.20 (Linux)",
        )
        library = self._follower.channel.name.removeprefix("seafile:")
        await connection.subscribe(library, self._token)
        if self._follower.is_connected:
            self._follower.notice("connected")
        self._follower.is_connected = True
        try:
            while isinstance(found := await connection.receive(), int):
                self._follower.event(found)
            self._follower.lose(found)
        finally:
            connection.abort()


class _Pydio:
    """A page of Pydio with Socket.IO 4.6 or later."""

    def __init__(self, follower: Follower, clients: pydio_driver.PydioClients) -> None:
        self._follower = follower
        self._clients = clients
        self._position: Any = None

    async def connect(self) -> None:
        name = self._follower.channel.name
        user = self._follower.name.replace(" ", "-")
        position, self._position = self._position, None
        try:
            connection = await self._clients.connect(user, name, position)
        except AssertionError:
            if position is not None:
                return  # the session was not recovered; connect anew
            raise
        if position is None and self._follower.is_connected:
            self._follower.notice("new session")
        self._follower.is_connected = True
        try:
            while not str(found := await connection.receive()).startswith("close"):
                if isinstance(found, int):
                    self._follower.event(found)
                else:
                    self._follower.notice(found)
        finally:
            self._position = connection.position()
            connection.abort()


def _centrifuge_reader(follower: Follower) -> Callable[[dict[str, Any]], None]:
    def read(said: dict[str, Any]) -> None:
        match said["on"]:
            case "message":
                follower.event(said["data"]["n"])
            case "subscribe":
                if follower.is_connected and not said["recovered"]:
                    follower.notice("not recovered")
                follower.is_connected, follower.lost_at = True, None
                follower.say(f"subscribed, recovered: {said['recovered']}")
            case "disconnect":
                follower.lose(said.get("reason"))
            case "connect":
                follower.say("connected")
            case other:
                follower.say(f"{other}: {said}")

    return read


async def _read_socketio(client: NpmClient, follower: Follower) -> None:
    while True:
        said = await client.seen.get()
        if said["what"] == "event":
            follower.event(said["args"][1]["n"])
        elif said["what"] == "connect":
            if follower.is_connected and not said.get("recovered"):
                follower.notice("not recovered")
            follower.is_connected = True
            follower.say(said)
        else:
            follower.say(said)


# ---- producers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Means:
    """The connections of one producer."""

    client: _Client
    http: aiohttp.ClientSession


class Producers:
    """Publish numbers in each channel, one after the other."""

    def __init__(
        self,
        site: Site,
        relays: Sequence[RelayProcess],
        durability: str,
        events_per_s: float,
        emitting: Emitter,
    ) -> None:
        self._site = site
        self._relays = itertools.cycle(relays)
        self._durability = durability
        self._every_s = 1 / events_per_s
        self._emitting = emitting
        self.is_stopping = False
        self.errors: Counter[str] = Counter()

    async def run(self, channel: Channel) -> None:
        publish = getattr(self, f"_{channel.producer}")
        client = self._site.client()
        async with (
            contextlib.aclosing(client),
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(8)) as http,
        ):
            means = _Means(client, http)
            # PHP starts a process for each event.
            every_s = self._every_s * (5 if channel.producer == "php" else 1)
            due = time.monotonic() + random.uniform(0, every_s)
            while not self.is_stopping:
                due = max(due + every_s, time.monotonic())
                channel.sent += 1
                number = channel.sent
                try:
                    if await publish(channel, number, means):
                        channel.acknowledged[number] = time.monotonic()
                except (RedisError, OSError, TimeoutError, aiohttp.ClientError) as exc:
                    self.errors[f"{channel.producer}: {type(exc).__name__}"] += 1
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    def _command(self, channel: Channel, number: int) -> str:
        params = {
            "channel": channel.name,
            "data": {"n": number},
            "uid": f"{channel.name} {number}",
            "durability": self._durability,
        }
        return json.dumps({"method": "publish", "params": params})

    async def _http(self, channel: Channel, number: int, means: _Means) -> bool:
        """Repeat the request until it succeeds, as its `uid` allows."""
        body = self._command(channel, number).encode()
        headers = {
            "X-API-Sign": hmac.new(SECRET.encode(), body, "sha256").hexdigest(),
            "Content-Type": "application/json",
            "Prefer": "return=representation",
        }
        while not self.is_stopping:
            try:
                url = f"{next(self._relays).url}/api/"
                async with means.http.post(url, data=body, headers=headers) as answer:
                    (found,) = json.loads(await answer.text())
                if found["error"] is None:
                    return True
                self.errors[f"http: {found['error'][:60]}"] += 1
            except (OSError, TimeoutError, aiohttp.ClientError) as exc:
                self.errors[f"http: {type(exc).__name__}"] += 1
            channel.repeated.add(number)
            await asyncio.sleep(0.1)
        return False

    async def _queue(self, channel: Channel, number: int, means: _Means) -> bool:
        await means.client.execute_command("RPUSH", _QUEUE, self._command(channel, number))
        return True

    async def _direct(self, channel: Channel, number: int, means: _Means) -> bool:
        channel.repeated.add(number)
        data = json.dumps({"n": number})
        await means.client.execute_command("XADD", channel.key, "*", "data", data)
        return True

    async def _seafile(self, channel: Channel, number: int, means: _Means) -> bool:
        content = {
            "repo_id": channel.name.removeprefix("seafile:"),
            "path": str(number),
            "change_event": "locked",
            "lock_user": "bob@example.com",
        }
        headers = {"Authorization": f"Token {sender_token()}"}
        url = f"{next(self._relays).url}/events"
        body = json.dumps({"type": "file-lock-changed", "content": content})
        async with means.http.post(url, data=body, headers=headers) as answer:
            if answer.status != 200:
                self.errors[f"seafile: {answer.status}"] += 1
            return answer.status == 200

    async def _emitter(self, _: Channel, number: int, __: _Means) -> bool:
        await self._emitting.run(f'io.to("allusers").emit("msg", {{n: {number}}});')
        return True

    async def _php(self, channel: Channel, number: int, means: _Means) -> bool:
        workspace = channel.name.removeprefix("pydio:")
        message = {"REPO_ID": workspace, "CONTENT": pydio.tree(f"{number} ")}
        found = await pydio.publish(next(self._relays).port, [message])
        # The protocol has no acknowledgement.
        return "101" in "".join(found)


# ---- one run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A part of the run, and the server that it concerns."""

    name: str
    begin: float
    end: float
    # The channels of the server that failed. None if none has failed.
    concerned: frozenset[str] | None = None


class Run:
    """One run: the channels, their clients, and the faults."""

    def __init__(self, site: Site, relays: list[RelayProcess], services: Server) -> None:
        self.site = site
        self.relays = relays
        self.services = services
        self.channels: list[Channel] = []
        self.followers: list[Follower] = []
        self.phases: list[Phase] = []
        self.errors: Counter[str] = Counter()
        self.log: list[str] = []

    def note(self, text: str) -> None:
        self.log.append(f"{time.strftime('%H:%M:%S')} {text}")

    @contextmanager
    def phase(self, name: str, server: int | None = None) -> Iterator[None]:
        """Record that the code in this context is one phase."""
        on_it = None
        if server is not None:
            names = (c.name for c in self.channels if self.site.server_of(c.key) == server)
            on_it = frozenset(names)
        begin = time.monotonic()
        self.note(f"begin: {name}")
        try:
            yield
        finally:
            self.phases.append(Phase(name, begin, time.monotonic(), on_it))

    def may_lose(self, server: int, since: float) -> None:
        """Record that Redis may lose what this server has received since then."""
        has_queue = self.site.server_of(_QUEUE) == server
        for channel in self.channels:
            # Relay appends messages of PHP and emits again that were in flight, and executes
            # commands again that are in the queue again.
            if channel.producer in ("php", "emitter") or (
                channel.producer == "queue" and has_queue
            ):
                channel.unsafe_since = since - _IN_FLIGHT_S

    def choose_channels(self) -> None:
        """Choose names of channels, so that each server has channels of each producer."""
        names = (f"room{number}" for number in range(10_000))
        for producer in _NATIVE:
            wanted = {0, 1, 2}
            while wanted:
                name = next(names)
                number = self.site.server_of(stream_key(name))
                if number in wanted and (producer != "queue" or number == min(wanted)):
                    wanted.remove(number)
                    self.channels.append(Channel(name, producer))
        for number in (0, 1):
            library = next(
                each
                for each in (str(uuid.uuid5(uuid.NAMESPACE_DNS, next(names))) for _ in range(999))
                if self.site.server_of(stream_key(f"seafile:{each}")) == number
            )
            workspace = next(
                each for each in names if self.site.server_of(stream_key(f"pydio:{each}")) == number
            )
            self.channels.append(Channel(f"seafile:{library}", "seafile"))
            self.channels.append(Channel(f"pydio:{workspace}", "php"))
        self.channels.append(Channel("axr:allusers", "emitter"))

    def follow(self, name: str, channel: Channel, *, replays: bool = False) -> Follower:
        follower = Follower(f"{name} {channel.name}", channel, replays)
        self.followers.append(follower)
        return follower

    @asynccontextmanager
    async def clients(self, own_pydio: pydio.Pydio, *, are_all: bool) -> AsyncIterator[None]:
        """Connect clients of every protocol. `are_all`: of every kind in each channel."""
        async with contextlib.AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(native(relay)) for relay in self.relays]
            node = await stack.enter_async_context(running_node(SECRET))
            npm = await stack.enter_async_context(npm_clients())
            sockets = await stack.enter_async_context(websockets())
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            running_tasks: list[asyncio.Task[None]] = []
            sides = itertools.cycle(range(len(self.relays)))

            def start(follower: Follower, connect: Callable[[], Any]) -> None:
                running_tasks.append(tasks.create_task(_again(follower, connect)))

            kinds: list[JsClient] = []
            transports = itertools.cycle(_TRANSPORTS)
            for channel in self.channels:
                side = next(sides)
                relay = self.relays[side]
                order = [*opened[side:], *opened[:side]]
                relays = [*self.relays[side:], *self.relays[:side]]
                if channel.producer in _NATIVE:
                    for is_socket, drops in ((False, False), (True, False), (False, True)):
                        words = f"{'ws' if is_socket else 'sse'}{' dropping' if drops else ''}"
                        follower = self.follow(words, channel)
                        one = _Native(follower, order, is_socket=is_socket, drops=drops)
                        start(follower, one.connect)
                    chosen = _TRANSPORTS if are_all else [next(transports)]
                    for transport in chosen:
                        follower = self.follow(transport, channel, replays=True)
                        url = f"{relay.url}/connection"
                        if transport == "websocket":
                            url = url.replace("http:", "ws:") + "/websocket"
                            client = node.client(url, "ann", options={})
                        else:
                            client = node.client(url, "ann", transports=[transport], options={})
                        client.on_said = _centrifuge_reader(follower)
                        client.tell("subscribe", channel=channel.name, only=True)
                        client.tell("connect")
                        kinds.append(client)
                elif channel.producer == "seafile":
                    for number in range(2):
                        # Its positions are stored in Redis, and not while that is away.
                        follower = self.follow(f"seafile {number}", channel, replays=True)
                        start(follower, _Seafile(follower, relays, sockets).connect)
                elif channel.producer == "php":
                    follower = self.follow("pydio", channel)
                    pages = pydio_driver.PydioClients(relay, sockets, own_pydio)
                    start(follower, _Pydio(follower, pages).connect)
                else:
                    for package in PACKAGES:
                        for transport in ("polling", "websocket"):
                            relay = self.relays[next(sides)]
                            follower = self.follow(f"{package} {transport}", channel)
                            user = follower.name.replace(" ", "-").replace(":", "-")
                            said = await npm.open(
                                f"{relay.url}/axr",
                                package=package,
                                transports=[transport],
                                **connect_options(package, axr_token(user)),
                            )
                            reading = _read_socketio(said, follower)
                            running_tasks.append(tasks.create_task(reading))
            try:
                await self.wait_for("connected", lambda follower: follower.is_connected)
                yield
            finally:
                for task in running_tasks:
                    task.cancel()

    async def wait_for(self, what: str, is_true: Callable[[Follower], object]) -> None:
        """Wait until this is true of each client."""
        try:
            async with asyncio.timeout(_START_S):
                while not all(map(is_true, self.followers)):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            others = [f"{each.name} {each.log}" for each in self.followers if not is_true(each)]
            raise AssertionError(f"not {what}: {others}") from None

    async def read_truth(self) -> None:
        """Read the numbers in all streams."""
        async with contextlib.aclosing(self.site.client()) as client:
            for channel in self.channels:
                found = await client.execute_command("XRANGE", channel.key, "-", "+")
                channel.truth = [number for _, fields in found for number in _number(fields)]

    async def catch_up(self) -> list[str]:
        """Wait until all events are in the streams and all clients have received the last one.

        Return a line for each channel whose last event is still not in its stream.
        """
        before: list[list[int]] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CATCH_UP_S):
                while True:
                    await self.read_truth()
                    later = (each for each in self.channels if each.producer in _LATER)
                    are_appended = all(each.sent in each.truth for each in later)
                    truths = [channel.truth for channel in self.channels]
                    is_same = truths == before
                    if are_appended and is_same and all(each.has_last() for each in self.followers):
                        return []
                    before = truths
                    await asyncio.sleep(1)
        return [
            f"{each.name} ({each.producer}): {each.sent} was not appended within {_CATCH_UP_S:g} s"
            for each in self.channels
            if each.producer in _LATER and each.sent not in each.truth
        ]


def _number(fields: Any) -> list[int]:
    flat = (
        fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=True)
    )
    found = _NUMBER.search(dict(flat).get(b"data", b""))
    return [int(next(filter(None, found.groups())))] if found else []


@dataclass
class Report:
    """The result of one run."""

    figures: dict[str, Any]
    problems: list[str]
    details: list[str]


@asynccontextmanager
async def prepared(
    site: Site, folder: Path, durability: str, *settings: str, workers: int = 2
) -> AsyncIterator[tuple[Run, pydio.Pydio, Emitter]]:
    """Start servers and two relays, each with this number of workers."""
    services = Server(folder / "services", acl=False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(services))
        stack.callback(site.stop)
        await asyncio.to_thread(site.start)
        async with pydio.standing_in() as own_pydio:
            more = [
                *SETTINGS,
                *_CENTRIFUGO,
                "producer:queue.enabled=yes",
                f"producer:socketio_emitter.redis_url=redis://127.0.0.1:{services.port}/0",
                f"protocol:seafile.key={SEAFILE_KEY}",
                f"protocol:pydio.key={pydio.KEY}",
                f"protocol:pydio.auth_url={own_pydio.auth_url}",
                f"namespace.durability={durability}",
                *settings,
            ]
            relays = []
            for number in (1, 2):
                own = [f"node.name=host{number}", f"node.internal_address=127.0.0.{number}"]
                flags = ["--workers", str(workers), "--redis", site.url]
                relays.append(RelayProcess(services, settings=[*own, *more], flags=flags))
            for relay in relays:
                stack.callback(relay.kill)
                await asyncio.to_thread(relay.start)
            async with emitter("5", services.port) as emitting:
                yield Run(site, relays, services), own_pydio, emitting


async def account(
    site: Site,
    folder: Path,
    faults: Callable[[Run], Any],
    *,
    durability: str = "fast",
    events_per_s: float = 10,
    are_all: bool = False,
) -> Report:
    """Publish and follow while `faults` runs, and compare."""
    async with prepared(site, folder, durability) as (run, own_pydio, emitting):
        await asyncio.to_thread(run.choose_channels)
        producers = Producers(site, run.relays, durability, events_per_s, emitting)
        async with run.clients(own_pydio, are_all=are_all), asyncio.TaskGroup() as tasks:
            publishing = [tasks.create_task(producers.run(channel)) for channel in run.channels]
            try:
                await run.wait_for("receiving", lambda follower: follower.received)
                await asyncio.to_thread(faults, run)
            finally:
                producers.is_stopping = True
            await asyncio.wait(publishing)
            problems = await run.catch_up()
        run.errors = producers.errors
        return _report(run, problems)


def _report(run: Run, problems: list[str]) -> Report:
    figures: Counter[str] = Counter()
    details = list(run.log)
    for channel in run.channels:
        stored = set(channel.truth)
        lost = [number for number in channel.acknowledged if number not in stored]
        figures["sent"] += channel.sent
        figures["acknowledged"] += len(channel.acknowledged)
        figures["lost by Redis"] += len(lost)
        figures[f"acknowledged, {channel.producer}"] += len(channel.acknowledged)
        figures[f"lost by Redis, {channel.producer}"] += len(lost)
        if len(channel.truth) > len(stored):
            more = [n for n, count in Counter(channel.truth).items() if count > 1]
            figures["appended twice"] += len(more)
            # redis-py repeats a command whose outcome is unknown.
            if channel.producer != "direct":
                problems.append(f"{channel.name} ({channel.producer}): appended twice {more[:5]}")
    first_fault = min(each.begin for each in run.phases if each.concerned is not None)
    for follower in run.followers:
        for kind, numbers in follower.check().items():
            figures[kind] += len(numbers)
            if numbers and kind != "notified":
                problems.append(f"{follower.name}: {kind} {numbers[:5]} ({len(numbers)})")
                details.append(f"{follower.name}: {_around(follower, numbers[0])}")
                details += [f"{follower.name}: {text}" for text in follower.log[-20:]]
        lost_ones, notices = follower.lost(), follower.notices()
        if follower.channel.producer == "queue":
            # It was lost in the queue, before its channel was known.
            lost_ones = [each for each in lost_ones if each not in follower.channel.unsafe()]
        if lost_ones and not any(at > first_fault for _, at in notices):
            figures["silent"] += len(lost_ones)
            problems.append(f"{follower.name}: lost by Redis without a notice {lost_ones[:5]}")
        figures["clients"] += 1
        figures["clients with a notice"] += bool(notices)
        early = [text for text, at in notices if at < first_fault]
        figures["notices for moves"] += len(early)
        problems += [f"{follower.name}: {text}, but slots have only moved" for text in early]
        figures["deliveries"] += len(follower.received) - len(notices)
        details += [f"{follower.name}: {text}" for text, _ in notices[:2]]
    silences: dict[str, float] = {}
    worst: dict[str, str] = {}
    for phase in run.phases:
        for follower in run.followers:
            # PHP publishes too rarely.
            if follower.channel.producer == "php":
                continue
            where = phase.name
            if phase.concerned is not None:
                is_on_it = follower.channel.name in phase.concerned
                where += ", its channels" if is_on_it else ", other channels"
            silence = follower.silence(phase.begin, phase.end)
            if silence > silences.get(where, 0.0):
                silences[where], worst[where] = silence, follower.name
    details += [
        f"silence, {where}: {silences[where]:.2f} s, {name}" for where, name in worst.items()
    ]
    details += [f"error: {text} ({count})" for text, count in run.errors.most_common()]
    for number, relay in enumerate(run.relays, 1):
        details += [f"host{number} {line}" for line in relay.log]
        problems += [line for line in relay.log if "Traceback" in line]
    found: dict[str, Any] = dict(figures)
    found |= {f"silence, {where}": round(value, 2) for where, value in silences.items()}
    return Report(found, problems, details)


def _around(follower: Follower, number: int) -> str:
    received = [what for what, _ in follower.received]
    place = received.index(number) if number in received else len(received)
    truth = follower.channel.truth
    at = truth.index(number) if number in truth else 0
    around = truth[max(0, at - 3) : at + 4]
    return f"received {received[max(0, place - 5) : place + 5]}, stream {around}"


# ---- faults of a cluster ------------------------------------------------------------------------


def cluster_faults(
    moves: int, *, seed: int, settle_s: float, stall_s: float = 0.0, adds: bool
) -> Callable[[Run], None]:
    """Return faults: slots move, a primary is killed, and one is added and receives slots.

    `stall_s`: the replica of the primary receives nothing for this time before the kill.
    """
    rng = random.Random(seed)

    def move(run: Run, cluster: RedisCluster, target: int | None = None) -> None:
        channel = rng.choice(run.channels)
        key = channel.key.encode()
        source = cluster.owner_of(key)
        if target is None or target == source:
            target = rng.choice([n for n in cluster.present_primaries() if n != source])
        cluster.move(key, target)
        run.note(f"moved {channel.name} from {source} to {target}")
        time.sleep(0.1)

    def faults(run: Run) -> None:
        assert isinstance(run.site, ClusterSite)
        cluster = run.site.cluster
        with run.phase("moves"):
            for _ in range(moves):
                move(run, cluster)
        if adds:
            with run.phase("added primary"):
                added = cluster.add()
                for _ in range(max(3, moves // 4)):
                    move(run, cluster, added)
        # Not the first server: its bus is used to add others.
        victim = rng.choice([n for n in (1, 2) if run.site.cluster.role_of(n) == "master"])
        with run.phase("killed primary", victim):
            if stall_s:
                replica = victim + cluster.primaries
                cluster.call(replica, "CONFIG", "SET", "masteruser", "nobody")
                cluster.call(victim, "CLIENT", "KILL", "TYPE", "replica")
                run.may_lose(victim, time.monotonic())
                time.sleep(stall_s)
            run.site.allow_failover(is_allowed=True)
            at = time.monotonic()
            cluster.servers[victim].kill()
            run.note(f"killed {victim}")
            while cluster.role_of(victim + cluster.primaries) != "master":
                time.sleep(0.02)
            run.note(f"promoted after {time.monotonic() - at:.1f} s")
            time.sleep(settle_s)

    return faults


def server_faults(*, seed: int, freeze_s: float, settle_s: float) -> Callable[[Run], None]:
    """Return faults: one of three servers is killed and restarted, and another one is frozen."""
    rng = random.Random(seed)

    def faults(run: Run) -> None:
        assert isinstance(run.site, ServersSite)
        killed, frozen = rng.sample(range(3), 2)
        server = run.site.servers[killed]
        home = run.site.server_of("{site}")
        run.note(f"the keys of the site are on {home}")
        with run.phase("killed server", killed):
            server.kill()
            run.note(f"killed {killed}")
            time.sleep(1)
            server.start()
            run.note(f"started {killed}")
            time.sleep(settle_s)
        server = run.site.servers[frozen]
        with run.phase("frozen server", frozen):
            server.freeze()
            run.note(f"froze {frozen}")
            try:
                time.sleep(freeze_s)
            finally:
                server.thaw()
            run.note(f"continued {frozen}")
            time.sleep(settle_s)

    return faults
