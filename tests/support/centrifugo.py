"""Centrifugo's clients without sockets and without Redis.

A hub reads streams in memory. Transcripts are replayed against it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

from relay.config.settings import NamespaceSettings
from relay.core.clock import RedisClock
from relay.core.connection import ConnectionInfo
from relay.core.durability import Durability
from relay.core.errors import LimitExceeded
from relay.core.metrics import Metrics
from relay.core.model import (
    ZERO_ID,
    Channel,
    EntryID,
    Event,
    EventFields,
    Position,
    Principal,
    Record,
    StreamState,
)
from relay.core.reasons import Reason
from relay.core.stream_interface import Examined, Followed, Page, Snapshot
from relay.doorkit.contract import DoorContext
from relay.hub.hub import Hub
from relay.hub.session import Client, Encoder, Session
from relay.protocols.centrifugo import tokens
from relay.protocols.centrifugo.clients.connection import CentrifugoConnection
from relay.protocols.centrifugo.clients.interfaces import ReadControl
from relay.protocols.centrifugo.encoders import CentrifugoEncoder
from relay.protocols.centrifugo.server_state import ServerState
from relay.protocols.centrifugo.settings import CentrifugoNamespace, CentrifugoSettings
from relay.rights.policy import Policy
from relay.stream.format import entry

SECRET = "a secret of the application"
NOW = 1_700_000_000
_ENTRY_BYTES = 1 << 20


class Stream:
    """One stream in memory."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.added = 0
        self.last = ZERO_ID
        self.rights: dict[str, bytes] = {}
        self.history = 1
        self.failover: EntryID | None = None

    def state(self) -> StreamState:
        return StreamState(
            exists=True,
            first=self.records[0].id if self.records else None,
            last=self.last,
            length=len(self.records),
            added=self.added,
            max_deleted=ZERO_ID,
            incarnation=1 << 32 | self.history,
            failover=self.failover,
        )


class Streams:
    """`StreamReads` in memory; replies follow in a later turn of the loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.streams: dict[Channel, Stream] = {}
        self.followed: dict[Channel, Followed] = {}
        self.hub: Hub | None = None
        # While this is set, no replies are sent.
        self.frozen = False
        self._waiting: list[tuple[str, Followed]] = []

    def stream(self, channel: Channel) -> Stream:
        return self.streams.setdefault(channel, Stream())

    def follow(self, stream: Followed) -> None:
        self.followed[stream.channel] = stream

    def release(self, stream: Followed) -> None:
        del self.followed[stream.channel]

    def want_join(self, stream: Followed) -> None:
        self._soon("examine", stream)

    def want_examine(self, stream: Followed) -> None:
        self._soon("examine", stream)

    def want_read(self, stream: Followed) -> None:
        pass

    def want_page(self, stream: Followed) -> None:
        self._soon("page", stream)

    def _soon(self, what: str, stream: Followed) -> None:
        self._waiting.append((what, stream))
        asyncio.get_running_loop().call_soon(self.answer)

    def answer(self) -> None:
        if self.frozen or self.hub is None:
            return
        waiting, self._waiting = self._waiting, []
        for what, followed in dict.fromkeys(waiting):
            if followed.alive:
                self._examine(followed) if what == "examine" else self._page(followed)
        self.hub.flush()
        for channel in list(self.followed):
            self._deliver(channel)

    def _examine(self, followed: Followed) -> None:
        stream = self.stream(followed.channel)
        request = followed.examine_request()
        own = {record.id: record.digest for record in stream.records if record.id in request.own}
        rights = {user: stream.rights.get(user) for user in request.users}
        examined = Examined(state=stream.state(), rights=rights, own=own)
        followed.on_examined(request, examined)

    def _page(self, followed: Followed) -> None:
        request = followed.page_request()
        if request is not None:
            stream = self.stream(followed.channel)
            records = [record for record in stream.records if record.id > request.start]
            state = stream.state()
            page = Page(state=state, records=records, complete=True)
            followed.on_page(request, page)

    def append(self, channel: Channel, fields: list[bytes]) -> EntryID:
        stream = self.stream(channel)
        ms = self._clock.now * 1000
        entry_id = EntryID(ms, 0) if stream.last.ms < ms else EntryID(ms, stream.last.seq + 1)
        record = entry.decode(channel, entry_id, fields, _ENTRY_BYTES)
        stream.records.append(record)
        stream.last, stream.added = entry_id, stream.added + 1
        self._deliver(channel)
        return entry_id

    def _deliver(self, channel: Channel) -> None:
        followed = self.followed.get(channel)
        if followed is None or not followed.settled or self.frozen or self.hub is None:
            return
        news = [each for each in self.streams[channel].records if each.id > followed.position]
        if news:
            followed.on_records(news)
            self.hub.flush()

    def promote(self) -> None:
        """Replace the primary by a replica that may lack its last entries."""
        for stream in self.streams.values():
            stream.history, stream.failover = stream.history + 1, stream.last
        for followed in list(self.followed.values()):
            followed.on_unsettled()

    async def history(self, channel: Channel, count: int) -> Snapshot:
        await asyncio.sleep(0)
        stream = self.stream(channel)
        records = stream.records[: -max(count, 1) - 1 : -1]
        events = [record.body for record in records if isinstance(record.body, Event)]
        return Snapshot(
            state=stream.state(),
            records=records,
            events=events,
            whole=len(records) == len(stream.records),
        )


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = NOW
        self._timers: list[_Timer] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, call: Any) -> asyncio.TimerHandle:
        timer = _Timer(self.now + delay, call)
        self._timers.append(timer)
        return cast("asyncio.TimerHandle", timer)

    def pass_(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            due = [timer for timer in self._timers if timer.at <= self.now]
            self._timers = [timer for timer in self._timers if timer.at > self.now]
            for timer in due:
                if not timer.cancelled:
                    timer.call()


class _Timer:
    def __init__(self, at: float, call: Any) -> None:
        self.at = at
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class _Rights:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._policy = Policy(lambda _: NamespaceSettings(), None)

    def allowed(
        self, principal: Principal, channel: Channel, hash_value: bytes | None, *, admitted: bool
    ) -> bool:
        del admitted
        return self._policy.allowed(principal, channel, hash_value, None, now=self._clock.now)

    def asks_again(self, principal: Principal, channel: Channel) -> bool:
        del principal, channel
        return False


class Presence:
    """`relay.doorkit.contract.Presence` in memory."""

    def __init__(self) -> None:
        self.there: dict[Channel, dict[str, bytes]] = {}
        self.gone: list[Callable[[Channel, Mapping[str, bytes]], None]] = []
        self.own_removed: list[Callable[[set[str]], None]] = []

    def add(self, channel: Channel, client: str, info: bytes) -> None:
        self.there.setdefault(channel, {})[client] = info

    def remove(self, channel: Channel, client: str) -> None:
        self.there.get(channel, {}).pop(client, None)

    async def read(self, channel: Channel) -> Mapping[str, bytes]:
        await asyncio.sleep(0)
        return self.there.get(channel, {})

    def on_clients_lost(self, gone: Callable[[Channel, Mapping[str, bytes]], None]) -> None:
        self.gone.append(gone)

    def on_own_removed(self, removed: Callable[[set[str]], None]) -> None:
        self.own_removed.append(removed)


class Store:
    """`relay.doorkit.contract.Store` in memory."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    async def put(self, name: str, value: bytes, ttl_s: float) -> None:
        self.values[name] = value

    async def put_many(self, values: Mapping[str, bytes], ttl_s: float) -> None:
        self.values.update(values)

    async def get(self, name: str) -> bytes | None:
        return self.values.get(name)


class Context:
    """The part of `DoorContext` that a connection uses."""

    def __init__(self, clock: Clock) -> None:
        self.streams = Streams(clock)
        self.metrics = Metrics()
        # Redis and the host have the same time.
        self.clock = RedisClock(monotonic=clock.time, wall=clock.time)
        self.hub = self.streams.hub = Hub(
            rights=_Rights(clock),
            metrics=self.metrics,
            call_soon=lambda call: asyncio.get_running_loop().call_soon(call),
            spawn=lambda work: asyncio.get_running_loop().create_task(work),
        )
        self.hub.reads = self.streams
        self.history = self.streams.history
        self.presence = Presence()
        self.store = Store()
        self.tasks: set[asyncio.Task[None]] = set()
        self.is_ready = True
        # Channels of a server that is unreachable, while the others are read.
        self.away: set[Channel] = set()
        self.refusing: Exception | None = None

    def not_reading(self, channels: Sequence[Channel]) -> str:
        is_read = self.is_ready and self.away.isdisjoint(channels)
        return "" if is_read else "Redis is not connected"

    def turned_away(self, info: ConnectionInfo | None, *reason: str) -> None:
        pass

    async def open(
        self,
        principal: Principal,
        encoder: Encoder,
        client: Client,
        *,
        info: ConnectionInfo | None = None,
        limit: int | None = None,
    ) -> Session:
        await asyncio.sleep(0)
        user = principal.user
        if limit and user and self.hub.count(user) >= limit:
            raise LimitExceeded("too many")
        return self.hub.open(principal, encoder, client, info)

    def subscribe(self, session: Session, channel: Channel, asked: Position | None) -> None:
        self.hub.subscribe(session, channel, asked)

    def publish(
        self,
        channel: Channel,
        data: bytes,
        *,
        unless_latest: bytes | None = None,
        durability: Durability | None = None,
        **fields: Unpack[EventFields],
    ) -> asyncio.Future[EntryID]:
        assert unless_latest is None
        assert durability is None
        encoded = entry.encode(data, **fields)
        done: asyncio.Future[EntryID] = asyncio.get_running_loop().create_future()
        if self.refusing is not None:
            done.set_exception(self.refusing)
        else:
            done.set_result(self.streams.append(channel, encoded))
        return done

    def publish_ephemeral(self, event: Event) -> None:
        def arrive() -> None:
            followed = self.streams.followed.get(event.channel)
            if followed is not None:
                followed.on_ephemeral(event)
            self.hub.flush()

        asyncio.get_running_loop().call_soon(arrive)

    def spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self.tasks.add(task)
        return task


class Socket:
    """Stores the written bytes. `lines` are complete frames."""

    def __init__(self) -> None:
        self.full = False
        self.info: ConnectionInfo | None = None
        self.transport_name = "memory"
        self.close_code: int | None = None
        self.ending: Reason | None = None
        self.lines: list[str] = []
        self.waiting = 0

    def write(self, data: bytes) -> None:
        self.lines += [f"< {line}" for line in data.decode().splitlines()]

    def close(self, last: bytes = b"") -> None:
        self.lines.append(f"x {last.decode()}")

    def close_with(self, code: int, reason: str = "") -> None:
        self.lines.append(f"x {code} {reason}")

    def abort(self) -> None:
        self.lines.append("x cut")

    def waiting_bytes(self) -> int:
        return self.waiting


class Bench:
    """Named connections over one hub."""

    def __init__(
        self, settings: CentrifugoSettings, context: Callable[[Clock], Context] = Context
    ) -> None:
        self.clock = Clock()
        self.context = context(self.clock)
        self.server = ServerState(
            cast("DoorContext", self.context),
            settings,
            clock=self.clock.time,
            call_later=self.clock.call_later,
        )
        self.format = CentrifugoEncoder(lambda text: text + b"\n")
        self.connections: dict[str, CentrifugoConnection] = {}
        self.sockets: dict[str, Socket] = {}

    def connection(
        self, name: str, read_control: ReadControl | None = None
    ) -> CentrifugoConnection:
        if name not in self.connections:
            connection = CentrifugoConnection(self.server, self.format, f"client-{name}")
            self.connections[name], self.sockets[name] = connection, Socket()
            connection.on_open(self.sockets[name], read_control)
        return self.connections[name]

    def send(self, name: str, text: str) -> None:
        """Send one frame of a client."""
        self.connection(name).on_frame(text.encode())

    async def settle(self) -> None:
        """Wait until all effects of the last step have happened."""
        for _ in range(50):
            await asyncio.sleep(0)
        for task in self.context.tasks:
            if task.done() and task.exception() is not None:
                raise RuntimeError("a task has failed") from task.exception()

    def pass_(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.pass_(1)
            for session in self.context.hub.sessions_expiring(self.clock.now):
                self.context.hub.expire(session)

    def do(self, words: Sequence[str]) -> None:
        """Execute an action of another program."""
        hub, streams = self.context.hub, self.context.streams
        match words:
            case ["append", channel, data]:
                streams.append(Channel(channel), entry.encode(data.encode()))
            case ["entry", channel, *fields]:
                streams.append(Channel(channel), [field.encode() for field in fields])
            case ["trim", channel, count]:
                stream = streams.stream(Channel(channel))
                del stream.records[: len(stream.records) - int(count)]
            case ["hole", channel]:
                feed = streams.followed[Channel(channel)]
                feed.on_gap(streams.stream(Channel(channel)).state(), None, None)
            case ["right", channel, user, value]:
                streams.stream(Channel(channel)).rights[user] = value.encode()
                hub.recheck(Channel(channel))
            case ["whisper", channel, kind, data]:
                event = Event(Channel(channel), None, data.encode(), is_json=True, type=kind)
                self.context.publish_ephemeral(event)
            case ["time", seconds]:
                self.pass_(int(seconds))
            case ["unsubscribe", user, *channel]:
                only = Channel(channel[0]) if channel else None
                hub.drop_subscription(only, user, Reason.UNSUBSCRIBED, "centrifugo")
            case ["disconnect", user]:
                hub.disconnect_user(user, Reason.DISCONNECTED, "centrifugo")
            case ["stop"]:
                for session in hub.sessions():
                    session.client.disconnect(Reason.STOPPING)
                for connection in list(self.server.unauthenticated):
                    connection.abort()
            case ["away"]:
                self.context.is_ready = False
            case ["died", channel, client, info]:
                for gone in self.context.presence.gone:
                    gone(Channel(channel), {client: info.encode()})
            case ["gone", name]:
                self.connections[name].on_closed()
            case _:
                raise ValueError(f"unknown step {words}")


class Transcript:
    """Steps of one test.

    - `A> frame`: client A sends a frame.
    - `A< frame`: client A must receive this frame.
    - `Ax`: the connection of client A is closed.
    - `@ words`: an action of another program.
    - `! key value`: a setting.

    `$token(user,timestamp,info)` and `$sign(client,channel,info)` are replaced by signatures.
    """

    bench: Callable[[CentrifugoSettings], Bench] = Bench

    def __init__(self, name: str, lines: Sequence[str]) -> None:
        self.name = name
        self._lines = [line for line in lines if line and not line.startswith("#")]

    def settings(self) -> CentrifugoSettings:
        """Return the settings in the `!` lines: `! key value`, `! namespace.key value`."""
        values: dict[str, Any] = {"secret": SECRET}
        namespaces: dict[str, dict[str, str]] = {}
        for line in self._lines:
            if line.startswith("! "):
                key, _, value = line[2:].partition(" ")
                name, dot, option = key.partition(".")
                if dot:
                    namespaces.setdefault(name, {})[option] = value
                else:
                    values[key] = value
        found = {
            name: CentrifugoNamespace.model_validate({k: v for k, v in options.items() if k})
            for name, options in namespaces.items()
        }
        return CentrifugoSettings.model_validate({**values, "namespaces": found})

    async def replay(self) -> None:
        """Execute all steps. Fail if a frame is missing or not expected."""
        bench = self.bench(self.settings())
        for line in (_filled(line) for line in self._lines if not line.startswith("!")):
            if line.startswith("@ "):
                self._nothing_left(bench, line)
                bench.do(_words(line[2:]))
            elif line[1] == ">":
                self._nothing_left(bench, line)
                bench.send(line[0], line[3:])
            else:
                lines = bench.sockets[line[0]].lines
                assert lines, f"{self.name}: nothing came for {line}"
                assert f"{line[0]}{lines.pop(0)}" == line
                continue
            await bench.settle()
        self._nothing_left(bench, "the end")

    def _nothing_left(self, bench: Bench, before: str) -> None:
        left = {name: socket.lines for name, socket in bench.sockets.items() if socket.lines}
        assert not left, f"{self.name}: not expected before {before}: {left}"


def transcripts(path: Path, kind: type[Transcript] = Transcript) -> Iterator[Transcript]:
    """Return the transcripts in one file. Each begins with a line `== name`."""
    parts = re.split(r"^== (.*)\n", path.read_text(), flags=re.MULTILINE)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        yield kind(name, [line.rstrip("\n") for line in text.split("\n")])


def _words(line: str) -> list[str]:
    # White space separates words, except within braces. shlex would remove the quotes of JSON.
    return re.findall(r"\{.*?\}(?=\s|$)|\"[^\"]*\"|\S+", line)


def _filled(line: str) -> str:
    line = line.replace("$now", str(NOW))
    line = re.sub(r"\$token\((.*?)\)", lambda m: tokens.sign(SECRET.encode(), *_parts(m[1])), line)
    return re.sub(r"\$sign\((.*?)\)", lambda m: tokens.sign(SECRET.encode(), *_parts(m[1])), line)


def _parts(text: str) -> list[str]:
    return [part.replace("\\;", ",") for part in text.split(",")]
