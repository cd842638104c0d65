"""Listen to Node's Socket.IO emitters and append every emit to the stream of its room.

Redis does not store pub/sub messages: those published while no relay process listens are lost. All
processes with this producer listen, and the one that holds a lease appends. A process that takes
over continues exactly after the last appended message (`producers.socketio_log`). Entries of the
streams emitter are read from the last appended position on, so that none is lost unless the stream
was trimmed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

from typing_extensions import override

from producers import socketio_wire as wire
from producers.registry import RunningProducer
from producers.settings import EmitterSettings
from producers.socketio_append import EmitBatch
from producers.socketio_log import PubSubLog, first_count, split_count, with_count
from producers.socketio_wire import Control
from relay.core.errors import ConfigError, RedisUnavailable, Unavailable
from relay.core.model import EntryID
from relay.protocols.socketio.entry_format import Emit, UnusableEmit, channel_of
from relay.stream.cluster.leases import Lease
from relay.stream.connection import connect
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.reconnecting import ReconnectingConnection
from relay.stream.shards.clients import shard_clients
from relay.stream.shards.links import ShardLinks
from relay.stream.write.confirmations import UnconfirmedLog

if TYPE_CHECKING:
    from collections.abc import Iterable

    from producers.registry import ProducerContext
    from relay.config.settings import RedisSettings
    from relay.protocols.socketio.settings import SocketIoSettings

_log = logging.getLogger(__name__)

_LEASE = "socketio_emitter"
_LEASE_S = 1.5
_RENEW_S = 0.5
# A process listens for this time before it tries to get the lease. It is longer than a lease
# outlives its holder, so that processes that have listened for longer get it first.
_LISTEN_S = _LEASE_S + 2 * _RENEW_S
_BATCH = 200
_BLOCK_MS = 1000
_PAUSE_S = 0.2
# Appended messages are kept for this time, so that a process that takes over finds its position.
_KEEP_S = 30.0
_FORGET_S = 10.0


class _Message(NamedTuple):
    """One message of an emitter, its parser, the channel or stream that it was read from, and its
    identity (see `EmitBatch`)."""

    parse: Callable[[], Emit | Control | None]
    source: str
    message: bytes
    identity: bytes


class EmitterListener(RunningProducer):
    """Appends the emits of Socket.IO emitters."""

    def __init__(
        self, context: ProducerContext, settings: EmitterSettings, source: RedisSettings
    ) -> None:
        self._context = context
        self._unconfirmed = UnconfirmedLog("socket.io emitter")
        protocol = cast("SocketIoSettings", context.protocols["protocol:socketio"])
        self._namespace = protocol.namespace
        pattern, self._prefix, self._requests = wire.channels(settings.key, self._namespace)
        self._source = ReconnectingConnection(
            source,
            subscribe_to=[self._requests],
            patterns=[pattern],
            on_message=self._on_message,
        )
        self._reading = ReconnectingConnection(source)
        self._target = ShardLinks(context.shards, context.redis)
        self._streams = settings.stream_names()
        self._messages = PubSubLog()
        self._received = asyncio.Event()
        self._holds = asyncio.Event()

    @override
    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._target.run(), name="emits target")
            tasks.create_task(self._source.run(), name="emits source")
            tasks.create_task(self._reading.run(), name="emits streams")
            tasks.create_task(self._keep_lease(), name="emits lease")
            tasks.create_task(self._forget_appended(), name="emits appended")
            tasks.create_task(self._repeat(self._append_messages), name="emits")
            for name in self._streams:
                tasks.create_task(self._repeat(self._follow(name)), name=f"emits {name}")

    async def _forget_appended(self) -> None:
        """Remove messages that this or another process has appended. Runs until cancelled."""
        key = self._context.keys.source_position(_LEASE)
        while True:
            await asyncio.sleep(_FORGET_S)
            with contextlib.suppress(Unavailable):
                mark = cast("bytes | None", await self._target.call("GET", key)) or b""
                before_ms = round((time.time() - _KEEP_S) * 1000)
                self._messages.forget(self._split(mark)[0], before_ms)

    async def _keep_lease(self) -> None:
        context = self._context
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RENEW_S + _LISTEN_S):
                await self._source.wait_open()
        await asyncio.sleep(_LISTEN_S)
        async with shard_clients(context.redis, context.shards) as clients:
            lease = Lease(
                client=clients.home,
                keys=context.keys,
                name=_LEASE,
                instance=context.instance,
                ttl_s=_LEASE_S,
            )
            try:
                while True:
                    held = await lease.renew()
                    if held and not self._holds.is_set():
                        _log.info("This process appends Socket.IO emits")
                        self._holds.set()
                    elif held is False:
                        self._holds.clear()
                    await asyncio.sleep(_RENEW_S)
            finally:
                self._holds.clear()
                await lease.give_up()

    async def _repeat(self, work: Callable[[], object]) -> None:
        """Run `work` while this process holds the lease. After an error it starts again at the
        mark. Runs until cancelled."""
        while True:
            await self._holds.wait()
            try:
                await cast("asyncio.Future[None]", work())
            except (RedisUnavailable, Unavailable, CommandRefused) as exc:
                _log.warning(
                    "Could not append Socket.IO emits: %s; retrying in %g s", exc, _PAUSE_S
                )
                await asyncio.sleep(_PAUSE_S)

    # ---- pub/sub ----------------------------------------------------------------------------

    def _on_message(self, name: bytes, payload: bytes) -> None:
        self._messages.add(name, payload, round(time.time() * 1000))
        self._received.set()

    async def _append_messages(self) -> None:
        key = self._context.keys.source_position(_LEASE)
        mark = await self._mark(key)
        log = self._messages
        own, done = self._split(mark)
        log.resume_after(own)
        log.dropped = 0
        while self._holds.is_set():
            self._received.clear()
            pending = log.pending(_BATCH)
            if not pending:
                if self._holds.is_set():
                    await self._wait_for_message()
                continue
            if done is None:
                # Stored before any entry is appended: a listener that takes over appends the same
                # messages with the same numbers.
                done = first_count()
                numbered = with_count(own, done)
                if not await self._apply([], key, mark, numbered):
                    return
                mark = numbered
            count = len(pending)
            new = log.mark(count)
            if self._context.keys.has_site_tag:
                new = with_count(new, done + count)
            until = log.next + count
            messages = [
                _Message(
                    partial(self._parse_message, each.name, each.payload),
                    each.name.decode(errors="replace"),
                    each.payload,
                    b"%d" % number,
                )
                for number, each in enumerate(pending, done)
            ]
            if not await self._apply(messages, key, mark, new):
                # Another process has appended, because this one was suspended or disconnected.
                return
            mark, log.next = new, max(log.next, until)
            done += count
            if log.dropped:
                _log.error(
                    "Dropped %d Socket.IO emits: Redis was unreachable for too long", log.dropped
                )
                self._context.count("lost", log.dropped)
                log.dropped = 0

    def _split(self, mark: bytes) -> tuple[bytes, int | None]:
        """Return the mark for the log, and the number of messages up to it if it has one.

        On one server a batch and its mark are one step, and messages need no numbers.
        """
        return split_count(mark) if self._context.keys.has_site_tag else (mark, 0)

    async def _wait_for_message(self) -> None:
        try:
            async with asyncio.timeout(_RENEW_S):
                await self._received.wait()
        except TimeoutError:
            pass

    def _parse_message(self, name: bytes, payload: bytes) -> Emit | Control | None:
        if name == self._requests:
            return wire.parse_request(payload)
        if name.startswith(self._prefix):
            return wire.parse_broadcast(payload, self._namespace)
        return None

    # ---- streams ----------------------------------------------------------------------------

    def _follow(self, name: str) -> Callable[[], object]:
        async def follow() -> None:
            key = self._context.keys.source_position(f"{_LEASE}:{name}")
            mark = await self._mark(key)
            if not mark:
                # No position is stored yet: start after the newest entry.
                newest = await self._reading.call("XREVRANGE", name, "+", "-", "COUNT", 1)
                start = cast("list[list[bytes]]", newest)[0][0] if newest else b"0-0"
                if await self._batch().apply(self._target, key, b"", start) is None:
                    return
                mark = start
            while self._holds.is_set():
                reply = await self._reading.call(
                    "XREAD", "COUNT", _BATCH, "BLOCK", _BLOCK_MS, "STREAMS", name, mark
                )
                if not reply:
                    continue
                found = cast("dict[bytes, list[list[object]]]", reply)[name.encode()]
                entries = [wire.fields_by_name(cast("list[bytes]", fields)) for _, fields in found]
                new = cast(bytes, found[-1][0])
                messages = [
                    _Message(
                        partial(wire.parse_entry, each, self._namespace),
                        name,
                        each.get(b"data", b""),
                        cast(bytes, entry_id),
                    )
                    for (entry_id, _), each in zip(found, entries, strict=True)
                ]
                if not await self._apply(messages, key, mark, new):
                    return
                mark = new

        return follow

    # ---- both -------------------------------------------------------------------------------

    async def _mark(self, key: bytes) -> bytes:
        """Return the position up to which messages were appended, empty if there is none."""
        return cast("bytes | None", await self._target.call("GET", key)) or b""

    async def _apply(
        self,
        messages: Iterable[_Message],
        key: bytes,
        old: bytes,
        new: bytes,
    ) -> bool:
        batch = self._batch()
        taken = broken = 0
        for each in messages:
            try:
                parsed = each.parse()
                if isinstance(parsed, Control):
                    newest = await self._newest_ids(parsed)
                    batch.add_command(parsed, newest, each.identity)
                elif parsed is not None:
                    batch.add(parsed, each.identity)
            except UnusableEmit as exc:
                broken += 1
                batch.reject(each.source, each.message, str(exc), each.identity)
                _log.warning(
                    "Socket.IO emit on %s rejected: %s; saved as a dead letter",
                    each.source,
                    exc,
                )
                continue
            taken += parsed is not None
        rejected = await batch.apply(self._target, key, old, new)
        if rejected is None:
            return False
        if rejected:
            broken += rejected
            _log.error("Redis rejected %d Socket.IO emits; saved as dead letters", rejected)
        self._context.count("taken", taken)
        self._context.count("broken", broken)
        return True

    def _batch(self) -> EmitBatch:
        context = self._context
        return EmitBatch(
            context.keys,
            context.namespace_of,
            context.max_entry_bytes,
            context.instance,
            self._unconfirmed,
        )

    async def _newest_ids(self, command: Control) -> list[tuple[str, str]]:
        """Return the newest entry IDs of the rooms to join. Clients receive later emits only."""
        if command.action != "join":
            return []
        keys = self._context.keys
        streams = [keys.stream(channel_of(room)) for room in command.names]
        replies = await self._target.execute([("XINFO", "STREAM", key) for key in streams])
        newest = []
        for room, reply in zip(command.names, replies, strict=True):
            # If there is no stream, clients receive it from its beginning.
            last = reply[b"last-generated-id"] if isinstance(reply, dict) else b"0-0"
            newest.append((room, str(EntryID.parse(last))))
        return newest


def build(context: ProducerContext, settings: EmitterSettings) -> EmitterListener:
    """Create the producer. Raise ConfigError if its settings are incomplete."""
    url = settings.redis_url
    if not url or url == "embedded":
        raise ConfigError(
            "[producer:socketio_emitter] redis_url must be the address of the emitters' Redis"
        )
    source = context.redis.model_copy(update={"url": url, "password": settings.redis_password})
    connect.check(source, "[producer:socketio_emitter] redis_url")
    return EmitterListener(context, settings, source)
