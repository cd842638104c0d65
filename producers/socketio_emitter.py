"""The tap on Node's Socket.IO emitters: every emit becomes an entry of its room's stream.

Pub/sub keeps nothing, so what is published while no relay listens is lost. All processes with this
tap listen and one of them appends, under a lease; whoever takes over goes on exactly behind what
was appended last (`producers.socketio_heard`). The streams emitter's entries are read from where
the last one left off: there nothing is lost as long as they are not trimmed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

from producers import socketio_wire as wire
from producers.settings import EmitterSettings
from producers.socketio_append import EMITS, EmitBatch
from producers.socketio_heard import Heard
from producers.socketio_wire import Control
from relay.core.errors import ConfigError, RedisUnavailable, RelayError, Unavailable
from relay.core.model import EntryID
from relay.protocols.socketio.entry_format import Emit, UnusableEmit, channel_of
from relay.stream.cluster.leases import Lease
from relay.stream.connection import connect
from relay.stream.connection.connect import CommandRefused, redis_client
from relay.stream.connection.reconnecting import ReconnectingConnection

if TYPE_CHECKING:
    from collections.abc import Iterable

    from producers.registry import ProducerContext
    from relay.config.settings import RedisSettings
    from relay.protocols.socketio.settings import SocketIoSettings

_log = logging.getLogger(__name__)

_LEASE = "socketio_emitter"
_LEASE_S = 1.5
_RENEW_S = 0.5
# Before it takes a lease a tap has listened for longer than one outlives its holder: whoever was
# there before has heard more, and comes first.
_LISTEN_S = _LEASE_S + 2 * _RENEW_S
_BATCH = 200
_BLOCK_MS = 1000
_PAUSE_S = 0.2


class _Read(NamedTuple):
    """One message of an emitter, and where it came from."""

    read: Callable[[], Emit | Control | None]
    source: str
    message: bytes


class EmitterListener:
    """See `producers.registry.Running`."""

    def __init__(
        self, context: ProducerContext, settings: EmitterSettings, source: RedisSettings
    ) -> None:
        self._context = context
        protocol = cast("SocketIoSettings", context.protocols["protocol:socketio"])
        self._namespace = protocol.namespace
        pattern, self._start, self._requests = wire.channels(settings.key, self._namespace)
        self._source = ReconnectingConnection(
            source,
            subscribe_to=[self._requests],
            patterns=[pattern],
            on_message=self._on_message,
        )
        self._reading = ReconnectingConnection(source)
        self._target = ReconnectingConnection(context.redis)
        self._streams = settings.stream_names()
        self._heard = Heard()
        self._news = asyncio.Event()
        self._holds = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled; survives everything that both Redis do."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._target.run(), name="emits target")
            tasks.create_task(self._source.run(), name="emits source")
            tasks.create_task(self._reading.run(), name="emits streams")
            tasks.create_task(self._hold(), name="emits lease")
            tasks.create_task(self._steadily(self._append_heard), name="emits")
            for name in self._streams:
                tasks.create_task(self._steadily(self._follow(name)), name=f"emits {name}")

    async def _hold(self) -> None:
        context = self._context
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RENEW_S + _LISTEN_S):
                await self._source.wait_open()
        await asyncio.sleep(_LISTEN_S)
        async with redis_client(context.redis) as client:
            lease = Lease(
                client=client,
                keys=context.keys,
                name=_LEASE,
                instance=context.instance,
                ttl_s=_LEASE_S,
            )
            try:
                while True:
                    try:
                        held = await lease.hold()
                    except RelayError as exc:
                        # Nothing can be appended while Redis is away: it stays as it is.
                        _log.debug("emits: %s", exc)
                    else:
                        if held and not self._holds.is_set():
                            _log.info("emits: this process appends them")
                            self._holds.set()
                        elif not held:
                            self._holds.clear()
                    await asyncio.sleep(_RENEW_S)
            finally:
                self._holds.clear()
                try:
                    async with asyncio.timeout(1.0):
                        await lease.release()
                except (RelayError, TimeoutError) as exc:
                    _log.info("emits: the lease is left to expire: %s", exc)

    async def _steadily(self, work: Callable[[], object]) -> None:
        """For ever; whatever Redis refuses or loses, it begins again from the mark."""
        while True:
            await self._holds.wait()
            try:
                await cast("asyncio.Future[None]", work())
            except (RedisUnavailable, Unavailable, CommandRefused) as exc:
                _log.warning("emits: %s", exc)
                await asyncio.sleep(_PAUSE_S)

    # ---- pub/sub ----------------------------------------------------------------------------

    def _on_message(self, name: bytes, payload: bytes) -> None:
        self._heard.add(name, payload, round(time.time() * 1000))
        self._news.set()

    async def _append_heard(self) -> None:
        key = self._context.keys.tap(_LEASE)
        mark = await self._mark(key)
        heard = self._heard
        heard.after(mark)
        heard.dropped = 0
        while self._holds.is_set():
            self._news.clear()
            messages = heard.waiting(_BATCH)
            if not messages:
                if self._holds.is_set():
                    await self._wait_for_news()
                continue
            count = len(messages)
            new = heard.mark(count)
            until = heard.next + count
            found = [
                _Read(
                    partial(self._of_message, each.name, each.payload),
                    each.name.decode(errors="replace"),
                    each.payload,
                )
                for each in messages
            ]
            if not await self._apply(found, key, mark, new):
                # Another process appended meanwhile: this one was frozen, or cut off.
                return
            mark, heard.next = new, max(heard.next, until)
            if heard.dropped:
                _log.error(
                    "Dropped %d Socket.IO emits: Redis was unreachable for too long", heard.dropped
                )
                self._context.count("lost", heard.dropped)
                heard.dropped = 0

    async def _wait_for_news(self) -> None:
        try:
            async with asyncio.timeout(_RENEW_S):
                await self._news.wait()
        except TimeoutError:
            pass

    def _of_message(self, name: bytes, payload: bytes) -> Emit | Control | None:
        if name == self._requests:
            return wire.request(payload)
        return wire.broadcast(payload, self._namespace) if name.startswith(self._start) else None

    # ---- streams ----------------------------------------------------------------------------

    def _follow(self, name: str) -> Callable[[], object]:
        async def follow() -> None:
            key = self._context.keys.tap(f"{_LEASE}:{name}")
            mark = await self._mark(key)
            if not mark:
                # The first time ever: from here on.
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
                entries = [wire.flat(cast("list[bytes]", fields)) for _, fields in found]
                new = cast(bytes, found[-1][0])
                readers = [
                    _Read(partial(wire.entry, each, self._namespace), name, each.get(b"data", b""))
                    for each in entries
                ]
                if not await self._apply(readers, key, mark, new):
                    return
                mark = new

        return follow

    # ---- both -------------------------------------------------------------------------------

    async def _mark(self, key: bytes) -> bytes:
        """Where the one before had come to."""
        await self._target.call("SCRIPT", "LOAD", EMITS.text)
        return cast("bytes | None", await self._target.call("GET", key)) or b""

    async def _apply(
        self,
        found: Iterable[_Read],
        key: bytes,
        old: bytes,
        new: bytes,
    ) -> bool:
        batch = self._batch()
        taken = broken = 0
        for each in found:
            try:
                what = each.read()
                if isinstance(what, Control):
                    batch.command(what, await self._places(what))
                elif what is not None:
                    batch.add(what)
            except UnusableEmit as exc:
                broken += 1
                batch.reject(each.source, each.message, str(exc))
                _log.warning(
                    "Socket.IO emit on %s rejected: %s; it is in the dead letters",
                    each.source,
                    exc,
                )
                continue
            taken += what is not None
        rejected = await batch.apply(self._target, key, old, new)
        if rejected is None:
            return False
        if rejected:
            broken += rejected
            _log.error("Redis rejected %d Socket.IO emits; they are in the dead letters", rejected)
        self._context.count("taken", taken)
        self._context.count("broken", broken)
        return True

    def _batch(self) -> EmitBatch:
        context = self._context
        return EmitBatch(
            context.keys, context.namespace_of, context.max_entry_bytes, context.instance
        )

    async def _places(self, command: Control) -> list[tuple[str, str]]:
        """Where the streams of rooms to be joined are: emits after this command reach them."""
        if command.what != "join":
            return []
        keys = self._context.keys
        streams = [keys.stream(channel_of(room)) for room in command.names]
        replies = await self._target.execute([("XINFO", "STREAM", key) for key in streams])
        places = []
        for room, reply in zip(command.names, replies, strict=True):
            # Without a stream: from its beginning.
            last = reply[b"last-generated-id"] if isinstance(reply, dict) else b"0-0"
            places.append((room, str(EntryID.parse(last))))
        return places


def build(context: ProducerContext, settings: EmitterSettings) -> EmitterListener:
    """Return the producer. Raise ConfigError if its settings cannot work."""
    url = settings.redis_url
    if not url or url == "embedded":
        raise ConfigError(
            "[producer:socketio_emitter] redis_url: needs the address of the emitters' Redis"
        )
    source = context.redis.model_copy(update={"url": url, "password": settings.redis_password})
    connect.check(source, "[producer:socketio_emitter] redis_url")
    return EmitterListener(context, settings, source)
