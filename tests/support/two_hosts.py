"""Two relays with several workers behind nginx, disturbed at random, and what their clients see."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis
from redis.exceptions import RedisError

from tests.support.centrifuge_js import JsClient, running_node
from tests.support.clients import redis as redis_command
from tests.support.nginx import nginx
from tests.support.polling import SECRET, SETTINGS
from tests.support.relay import RelayProcess
from tests.support.socketio import CLIENTS as PACKAGES
from tests.support.socketio import NpmClient, axr_token, connect_options, npm_clients
from tests.support.valkey import Server, running
from tests.support.workers import workers

TRANSPORTS = ("xhr-polling", "xhr-streaming", "eventsource")
# A new connection for each request, to the hosts in turn. The kernel chooses the worker.
_PROXY = """
upstream relay { server 127.0.0.1:PORT1 max_fails=0; server 127.0.0.1:PORT2 max_fails=0; }
map $http_upgrade $connection_header { default upgrade; "" ""; }
server {
    listen 80;
    location / {
        proxy_pass http://relay;
        proxy_http_version 1.1;
        proxy_set_header Host $http_host;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $connection_header;
        proxy_buffering off;
    }
}
"""
_EVENTS_PER_S = 20
_PUBLISH_EVERY_S = 0.5


@contextmanager
def two_hosts(
    server: Server, folder: Path, count: int, *settings: str
) -> Iterator[tuple[str, list[RelayProcess]]]:
    """Yield the address of the proxy, and the relays, with `count` workers each."""
    relays = []
    for number in (1, 2):
        own = [f"node.name=host{number}", f"node.internal_address=127.0.0.{number}"]
        flags = ["--workers", str(count)]
        relays.append(RelayProcess(server, settings=[*own, *SETTINGS, *settings], flags=flags))
    try:
        for relay in relays:
            relay.start()
        recipe = _PROXY
        for number, relay in enumerate(relays, 1):
            recipe = recipe.replace(f"PORT{number}", str(relay.port))
        with nginx(folder, recipe, {}) as url:
            yield url, relays
    finally:
        for relay in relays:
            relay.kill()


# ---- what happens in Redis ----------------------------------------------------------------------


class Ownership:
    """Follows the registrations of SockJS sessions, in the order of Redis.

    `twice` has the sessions that a worker took over from another one whose process was alive.
    """

    _COMMAND = re.compile(rb'^[0-9.]+ \[[^]]*\] "(\w+)" (.*)$')

    def __init__(self, server: Server) -> None:
        self.twice: list[str] = []
        self.sessions = 0
        self.killed: set[int] = set()
        self._owners: dict[str, str] = {}
        self._pids: dict[str, int] = {}
        self._server = server
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_stopping = True
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopping:
            with contextlib.suppress(RedisError, OSError), self._server.client() as client:
                # redis-py does not return the unquoted words of a command.
                connection = client.connection_pool.get_connection()
                connection.send_command("MONITOR")
                while not self._is_stopping:
                    if connection.can_read(timeout=0.2):
                        self._see(connection.read_response())
            time.sleep(0.01)

    def _see(self, line: bytes) -> None:
        found = self._COMMAND.match(line)
        if found is None:
            return
        words = [
            each.encode().decode("unicode_escape")
            for each in re.findall(r'"((?:[^"\\]|\\.)*)"', found[2].decode())
        ]
        name = found[1].upper()
        if name == b"SET" and words[0].startswith("relay:node:"):
            info = json.loads(words[1])
            self._pids[info["instance"].rpartition(":")[2]] = info["pid"]
        elif name == b"SET" and re.search(r":sockjs:\w+$", words[0]):
            self._claim(words[0], words[1], is_new="NX" in words)
        elif name == b"DEL":
            self._owners.pop(words[0], None)

    def _claim(self, session: str, owner: str, *, is_new: bool) -> None:
        before = self._owners.get(session)
        if is_new and before is not None:
            return
        self.sessions += before is None
        self._owners[session] = owner
        if before not in (None, owner) and self._pids.get(before or "") not in self.killed:
            self.twice.append(f"{session}: {before}, then {owner}")


@contextmanager
def subscriber_to_everything(server: Server) -> Iterator[None]:
    """Subscribe to `*` until the end, also after the connection is killed."""
    is_stopping = threading.Event()

    def run() -> None:
        while not is_stopping.is_set():
            with contextlib.suppress(RedisError, OSError), server.client() as client:
                subscriber = client.pubsub()
                subscriber.psubscribe("*")
                while not is_stopping.is_set():
                    subscriber.get_message(timeout=0.2)
            time.sleep(0.01)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_stopping.set()
        thread.join()


class Producer:
    """Appends numbers to two channels. A number is never repeated, even if Redis did not answer."""

    def __init__(self, server: Server, channel: str) -> None:
        self._server = server
        self._channel = channel
        self._number = 0
        self.is_stopping = threading.Event()

    def run(self) -> None:
        client = self._server.client()
        due = time.monotonic()
        while not self.is_stopping.is_set():
            due += 1 / _EVENTS_PER_S
            with contextlib.suppress(RedisError):
                self.append(client)
            time.sleep(max(0.0, due - time.monotonic()))

    def append(self, client: redis.Redis) -> None:
        self._number += 1
        data = json.dumps({"n": self._number})
        for key, kind in ((self._channel, ""), ("axr:allusers", "msg")):
            words = ["data", data, *(["type", kind] if kind else [])]
            client.execute_command("XADD", f"relay:stream:{{{key}}}", "*", *words)  # type: ignore[no-untyped-call]


# ---- clients ------------------------------------------------------------------------------------


def _when(monotonic: float) -> str:
    at = time.time() - time.monotonic() + monotonic
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def _now() -> str:
    return _when(time.monotonic())


@dataclass
class Seen:
    """What one client received."""

    name: str
    # Whether the client asks for missed events after it has reconnected.
    recovers: bool
    # Whether a client that could not recover receives the whole history.
    replays: bool = False
    received: list[object] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    connected_at: list[float] = field(default_factory=list)
    # Number of received events at each connection that was not recovered, and its time.
    anew: dict[int, float] = field(default_factory=dict)
    lost_at: list[float] = field(default_factory=list)
    # Connections, losses and errors with their times, for the report of a failure.
    log: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    _lost_after: int = 0

    def event(self, what: object) -> None:
        self.received.append(what)
        self.times.append(time.monotonic())

    def note(self, text: object) -> None:
        self.log.append(f"{_now()} {self.name}: {text}")

    def connect(self, *, recovered: bool) -> None:
        self.note(f"connected, {recovered=}")
        self.connected_at.append(time.monotonic())
        if not recovered:
            # centrifuge-js reports the history before the subscription.
            index = self._lost_after if self.replays else len(self.received)
            self.anew[index] = self.connected_at[-1]

    def lose(self, reason: object) -> None:
        self.lost_at.append(time.monotonic())
        self._lost_after = len(self.received)
        self.note(f"lost: {reason}")

    @property
    def is_anew(self) -> bool:
        """Whether the client has received nothing since it started anew."""
        return len(self.received) in self.anew

    def problems(self, truth: Sequence[object]) -> dict[str, list[object]]:
        """Compare with all events in their order.

        A connection that was reported as not recovered may begin at another position.
        """
        position = {event: index for index, event in enumerate(truth)}
        found: dict[str, list[object]] = {"lost": [], "twice": [], "swapped": [], "unknown": []}
        before: int | None = None
        for index, event in enumerate(self.received):
            at = position.get(event)
            if at is None:
                found["unknown"].append(event)
                continue
            if before is not None and index not in self.anew:
                found["lost"] += truth[before + 1 : at]
                if at != before + 1:
                    self.log.append(
                        f"{_when(self.times[index])} {self.name}: received {event!r}"
                        f" after {truth[before]!r} of {_when(self.times[index - 1])}"
                    )
                if at <= before:
                    kind = "twice" if event in self.received[:index] else "swapped"
                    found[kind].append(event)
            before = at
        if self.replays:
            # A new start begins with the whole history.
            found["lost"] += set(truth[position[self.received[0]] :]) - set(self.received)
        elif len(set(self.received)) < len(self.received):
            counts = Counter(self.received)
            found["twice"] += [event for event, count in counts.items() if count > 1]
        if before is not None and not self.is_anew:
            found["lost"] += truth[before + 1 :]
        return found


class Clients:
    """Real clients of two protocols, all connected through the proxy."""

    def __init__(self) -> None:
        self.centrifuge: list[tuple[Seen, JsClient]] = []
        self.socketio: list[Seen] = []
        self.sent: list[str] = []

    def all(self) -> list[Seen]:
        return [seen for seen, _ in self.centrifuge] + self.socketio

    async def publish(self, channel: str) -> None:
        """Let the Centrifugo clients publish in turn. Runs until cancelled."""
        number = 0
        while True:
            for seen, client in self.centrifuge:
                number += 1
                text = f"{seen.name} {number}"
                self.sent.append(text)
                client.tell("publish", channel=channel, data=text)
                await asyncio.sleep(_PUBLISH_EVERY_S / len(self.centrifuge))


@asynccontextmanager
async def clients(server: Server, url: str, channel: str, each: int) -> AsyncIterator[Clients]:
    """Connect `each` clients of each kind."""
    found = Clients()
    async with running_node(SECRET) as node, npm_clients() as npm, asyncio.TaskGroup() as tasks:
        reading = []
        for number in range(each):
            for transport in TRANSPORTS:
                seen = Seen(f"{transport} {number}", recovers=True, replays=True)
                client = node.client(
                    f"{url}/connection", seen.name, transports=[transport], options={}
                )
                client.on_said = _centrifuge_reader(seen)
                client.tell("subscribe", channel=channel, only=True)
                client.tell("connect")
                found.centrifuge.append((seen, client))
            for package in PACKAGES:
                for transports in (["polling"], ["polling", "websocket"]):
                    name = f"{package} {'+'.join(transports)} {number}"
                    seen = Seen(name, recovers=package == "socket.io-client")
                    user = name.replace(" ", "-")
                    # Relay removes a stream without any entry if nobody follows it for a moment.
                    # Then it cannot exclude that events were lost, and the client starts anew.
                    words = ("data", "{}", "type", "msg")
                    redis_command(server, "XADD", f"relay:stream:{{axr:{user}}}", "*", *words)
                    options = connect_options(package, axr_token(user))
                    opened = await npm.open(
                        f"{url}/axr", package=package, transports=transports, **options
                    )
                    reading.append(tasks.create_task(_read_socketio(opened, seen)))
                    found.socketio.append(seen)
        async with asyncio.timeout(30):
            while not all(seen.connected_at for seen in found.all()):
                await asyncio.sleep(0.05)
        try:
            yield found
        finally:
            for task in reading:
                task.cancel()


def _centrifuge_reader(seen: Seen) -> Callable[[dict[str, Any]], None]:
    def read(said: dict[str, Any]) -> None:
        match said["on"]:
            case "message":
                seen.event(said["data"]["n"] if isinstance(said["data"], dict) else said["data"])
            case "subscribe":
                seen.connect(recovered=said["recovered"])
            case "disconnect":
                seen.lose(said.get("reason"))
            case "publish" if "answer" in said:
                seen.acknowledged.append(said["data"])
            case "error" | "failure" | "publish":
                seen.note(f"{said['on']}: {said.get('failed', said.get('error'))}")
            case _:
                pass

    return read


async def _read_socketio(client: NpmClient, seen: Seen) -> None:
    while True:
        said = await client.seen.get()
        match said["what"]:
            case "event":
                seen.event(said["args"][1]["n"])
            case "connect":
                seen.connect(recovered=bool(said.get("recovered")))
            case "disconnect":
                seen.lose(said["reason"])
            case "connect_error" | "error":
                seen.note(said.get("message"))
            case _:
                pass


# ---- disturbances -------------------------------------------------------------------------------


class Chaos:
    """Kills and freezes workers and connections at random, and records when."""

    def __init__(
        self, server: Server, relays: Sequence[RelayProcess], owners: Ownership, seed: int
    ) -> None:
        self._server = server
        self._relays = relays
        self._owners = owners
        self._random = random.Random(seed)
        self._frozen: set[int] = set()
        self.kills: list[float] = []
        # Begin and end.
        self.freezes: list[tuple[float, float]] = []
        self.outages: list[tuple[float, float]] = []
        self.cuts = 0
        # What was done to which process, for the report of a failure.
        self.log: list[str] = []

    async def run(self, duration_s: float, freeze_s: tuple[float, float]) -> None:
        async with asyncio.TaskGroup() as freezes:
            await self._disturb(freezes, duration_s, freeze_s)

    async def _disturb(
        self, freezes: asyncio.TaskGroup, duration_s: float, freeze_s: tuple[float, float]
    ) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + duration_s
        restart = loop.time() + duration_s / 2
        while loop.time() < end:
            await asyncio.sleep(self._random.uniform(0.3, 1.7))
            if restart is not None and loop.time() > restart:
                restart = float("inf")
                begun = time.monotonic()
                await asyncio.to_thread(self._server.restart)
                self.outages.append((begun, time.monotonic()))
                self._note("restarted Redis")
                continue
            action = self._random.choice(("kill", "kill", "freeze", "cut"))
            if action == "cut":
                self.cuts += 1
                self._note("cut pub/sub connections")
                client = self._server.client()
                await asyncio.to_thread(client.execute_command, "CLIENT", "KILL", "TYPE", "pubsub")
                continue
            pids = [
                pid
                for relay in self._relays
                for pid in workers(relay).values()
                if pid not in self._frozen
            ]
            pid = self._random.choice(pids)
            if action == "kill":
                self._owners.killed.add(pid)
                os.kill(pid, signal.SIGKILL)
                self.kills.append(time.monotonic())
                self._note(f"killed {pid}")
            elif len(self._frozen) < 2:
                left_s = max(0.0, end - loop.time())
                freezing = self._freeze(pid, min(left_s, self._random.uniform(*freeze_s)))
                self._frozen.add(pid)
                freezes.create_task(freezing)

    def _note(self, text: str) -> None:
        self.log.append(f"{_now()} {text}")

    async def _freeze(self, pid: int, duration_s: float) -> None:
        begun = time.monotonic()
        self._note(f"froze {pid} for {duration_s:.1f} s")
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(duration_s)
        finally:
            os.kill(pid, signal.SIGCONT)
            self.freezes.append((begun, time.monotonic()))
            self._frozen.discard(pid)


def silences(seen: Seen, chaos: Chaos, since: float, until: float) -> tuple[float, float]:
    """Return the longest time without an event: at all, and without a known reason.

    Reasons are a freeze or a restart of Redis at that time, and a lost connection of this client.
    """
    times = [since, *seen.times[bisect.bisect(seen.times, since) :]]
    times = [*(each for each in times if each < until), until]
    longest = unexplained = 0.0
    for begin, end in itertools.pairwise(times):
        longest = max(longest, end - begin)
        reasons = [
            # Some seconds until all clients have reconnected.
            *((start, stop + 3) for start, stop in [*chaos.freezes, *chaos.outages]),
            *((lost - 1, lost + 3) for lost in seen.lost_at),
        ]
        if not any(start < end and begin < stop for start, stop in reasons):
            unexplained = max(unexplained, end - begin)
    return longest, unexplained


# ---- one run ------------------------------------------------------------------------------------

CHANNEL = "chaos"
_OPTIONS = [
    "protocol:centrifugo.recover=yes",
    "protocol:centrifugo.history_size=100000",
    "protocol:centrifugo.history_lifetime=3600",
    # If a WebSocket is lost at the end of its upgrade, socket.io-client waits for its ping timeout.
    "protocol:socketio.ping_interval_s=5",
    "protocol:socketio.ping_timeout_s=5",
]
# Time until all clients have received the last event. Reconnecting may take some attempts.
_CATCH_UP_S = 30.0
# Connections that begin within this time after a restart of Redis may still be interrupted by it.
_SETTLED_S = 5.0


@dataclass(frozen=True)
class Scale:
    """Workers of each host, clients of each kind, and the duration of freezes."""

    workers: int
    clients: int
    freeze_s: tuple[float, float]


@dataclass
class Report:
    """The result of one run."""

    figures: dict[str, int]
    # Promises that were not kept, and everything that helps to find the reason.
    problems: list[str]
    details: list[str]


async def run_chaos(folder: Path, scale: Scale, *, duration_s: float, seed: int) -> Report:
    """Run two hosts and clients, and disturb them."""
    server = Server(folder / "redis")
    with (
        running(server),
        contextlib.closing(Ownership(server)) as owners,
        subscriber_to_everything(server),
        two_hosts(server, folder, scale.workers, *_OPTIONS) as (url, relays),
    ):
        async with (
            clients(server, url, CHANNEL, scale.clients) as found,
            asyncio.TaskGroup() as tasks,
        ):
            producer = Producer(server, CHANNEL)
            producing = tasks.create_task(asyncio.to_thread(producer.run))
            publishing = tasks.create_task(found.publish(CHANNEL))
            chaos = Chaos(server, relays, owners, seed)
            await asyncio.sleep(1)
            begun = time.monotonic()
            try:
                await chaos.run(duration_s, scale.freeze_s)
                ended = time.monotonic()
            finally:
                publishing.cancel()
                # Publications in transit are carried out meanwhile.
                await asyncio.sleep(2)
                producer.is_stopping.set()
                await producing
            channels = {
                CHANNEL: [seen for seen, _ in found.centrifuge],
                "axr:allusers": found.socketio,
            }
            truth = {name: _numbers(server, name) for name in channels}

            def has_all(seen: Seen, events: list[object]) -> bool:
                return events[-1] in seen.received or seen.is_anew

            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CATCH_UP_S):
                    while not all(
                        has_all(seen, truth[name]) for name in channels for seen in channels[name]
                    ):
                        await asyncio.sleep(0.1)
            # Nothing may arrive twice afterwards.
            await asyncio.sleep(1)
            truth = {name: _numbers(server, name) for name in channels}
    figures: Counter[str] = Counter()
    problems = [f"owned twice: {each}" for each in owners.twice]
    details = list(chaos.log)
    for name, seens in channels.items():
        for seen in seens:
            for kind, events in seen.problems(truth[name]).items():
                figures[kind] += len(events)
                if events:
                    problems.append(f"{seen.name}: {kind} {events[:5]} ({len(events)})")
            late = [at for at in seen.anew.values() if seen.recovers and at > begun]
            figures["not recovered"] += len(late)
            if not all(_is_after_restart(seen, at, chaos.outages) for at in late):
                problems.append(f"{seen.name}: not recovered without a restart of Redis")
            longest, unexplained = silences(seen, chaos, begun, ended)
            figures["deliveries"] += len(seen.received)
            figures["reconnects"] += len(seen.connected_at) - 1
            for label, value in (
                ("longest silence", longest),
                ("unexplained silence", unexplained),
            ):
                figures[f"{label}, ms"] = max(figures[f"{label}, ms"], int(value * 1000))
            details.append(
                f"{seen.name}: {len(seen.received)} events, {len(seen.connected_at)} connections,"
                f" silent {longest:.1f} s, {unexplained:.1f} s without reason"
            )
            details += seen.log
    executed = Counter(event for event in truth[CHANNEL] if isinstance(event, str))
    acknowledged = [text for seen, _ in found.centrifuge for text in seen.acknowledged]
    twice = [text for text, times in executed.items() if times > 1]
    lost = [text for text in acknowledged if text not in executed]
    problems += [f"carried out twice: {text}" for text in twice]
    problems += [f"acknowledged, but not carried out: {text}" for text in lost]
    for relay in relays:
        details += [f"host{relays.index(relay) + 1} {line}" for line in relay.log]
        problems += [line for line in relay.log if "Traceback" in line]
    figures.update(
        {
            "commands": len(found.sent),
            "acknowledged": len(acknowledged),
            "commands twice": len(twice),
            "commands lost": len(lost),
            "sessions": owners.sessions,
            "sessions owned twice": len(owners.twice),
            "kills": len(chaos.kills),
            "freezes": len(chaos.freezes),
            "cuts": chaos.cuts,
        }
    )
    return Report(dict(figures), problems, details)


def _is_after_restart(seen: Seen, at: float, outages: Sequence[tuple[float, float]]) -> bool:
    """Return True if the connection is the first one that began after a restart of Redis."""
    earlier = max(each for each in seen.connected_at if each < at)
    return any(begun < at and earlier < ended + _SETTLED_S for begun, ended in outages)


def _numbers(server: Server, channel: str) -> list[object]:
    """Return the numbers and texts in the stream."""
    entries = server.client().execute_command("XRANGE", f"relay:stream:{{{channel}}}", "-", "+")  # type: ignore[no-untyped-call]
    found = [json.loads(fields[b"data"]) for _, fields in entries]
    return [each["n"] if isinstance(each, dict) else each for each in found]
