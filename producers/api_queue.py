"""Execute the commands that programs RPUSH to `centrifugo.api` and its shards, once and in order.

A worker reads the head of a queue, prepares the entries, and in one step appends them and removes
the head (`relay/stream/write/queue.py`). If the worker dies, a command is either still in the queue
or executed. Commands that cannot be executed become dead letters in the same step. Order is kept
within a queue. One worker at a time serves a queue, and another one takes over within seconds. The
queues are distributed evenly over the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from producers.registry import RunningProducer
from producers.settings import QueueSettings
from relay.core import tracing
from relay.core.durability import FAST, Durability
from relay.core.errors import LimitExceeded, RedisUnavailable
from relay.core.slices import in_slices
from relay.protocols.centrifugo import commands
from relay.stream.connection.connect import CommandRefused, discover
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.connection.reconnecting import (
    Backoff,
    keep_connected,
    loss_of_connection,
    wait_for,
)
from relay.stream.format import entry
from relay.stream.shards.hash_map import HashMap
from relay.stream.shards.links import ShardLinks
from relay.stream.write import control, dead_letters
from relay.stream.write.append import AppendCommands
from relay.stream.write.confirmations import UnconfirmedLog
from relay.stream.write.queue import CommandQueues, Head, Operation
from relay.stream.write.queue_steps import QueuePlace, SteppedQueues

if TYPE_CHECKING:
    from producers.registry import ProducerContext
    from relay.config.settings import NamespaceSettings, PublishSettings, RedisSettings
    from relay.core.model import Channel
    from relay.core.tracing import AppendSpan, AppendTracer
    from relay.stream.format.keys import Keys
    from relay.stream.shards.shard import ShardMap

_log = logging.getLogger(__name__)

_LEASE_MS = 1500
_RENEW_S = 0.5
# Interval between checks of all queues, in case an invalidation was lost.
_SWEEP_S = 5.0
# The same if a slot of a Redis Cluster may be moved: Redis sends no invalidation then.
_SWEEP_STEPPED_S = 1.0
# Interval between checks if Redis rejects CLIENT TRACKING.
_POLL_S = 0.1
_BATCH_BYTES = 1 << 20
_FIRST_PAUSE_S = 0.1
_RETRY_S = 1.0

# `unsubscribe` and `disconnect` apply to clients of this protocol only.
_DOOR = "centrifugo"
# v1 accepts these in a queue as well, although there is no reply. They have no effect.
_QUERIES = ("presence", "history", "channels", "stats", "node")

Queues = CommandQueues | SteppedQueues

# Returns the entries that a command appends. Raises InvalidCommand if it cannot be executed.
Handler = Callable[[commands.CentrifugoCommand, int], Iterable[Operation]]


class Dispatcher:
    """Translates commands into entries."""

    def __init__(
        self,
        *,
        keys: Keys,
        namespace_of: Callable[[Channel], NamespaceSettings],
        max_entry_bytes: int,
        uid_window_s: float,
        tracer: AppendTracer | None = None,
    ) -> None:
        self._keys = keys
        self._namespace_of = namespace_of
        self._max_entry_bytes = max_entry_bytes
        self._commands = AppendCommands(keys, namespace_of, uid_window_s=uid_window_s)
        self._tracer = tracer
        # Of the operations that were created since the last time.
        self.spans: list[AppendSpan] = []
        self._handlers: dict[str, Handler] = {
            "publish": self._publish,
            "broadcast": self._broadcast,
            "unsubscribe": self._unsubscribe,
            "disconnect": self._disconnect,
            **dict.fromkeys(_QUERIES, _ignore),
        }

    async def operations(self, item: bytes, index: int) -> tuple[list[Operation], list[str]]:
        """Return the entries for an item of a queue, and the reasons why commands in it failed."""
        try:
            plain = commands.plain_publish(item)
            if plain is not None:
                return [self.operation(plain, index)], []
            parts = commands.queued(item)
            # Parse all commands first: an item is executed only if all of them can be parsed.
            queued = [commands.one(part) async for part in in_slices(parts)]
        except commands.InvalidCommand as exc:
            return [], [str(exc)]
        operations: list[Operation] = []
        reasons: list[str] = []
        async for command in in_slices(queued):
            try:
                handler = self._handlers.get(command.method)
                if handler is None:
                    raise commands.InvalidCommand(f"unknown method {command.method[:50]!r}")  # noqa: TRY301  # one way to a reason
                # Collect a command's entries first: it is executed completely or not at all.
                operations += [each async for each in in_slices(handler(command, index))]
            except commands.InvalidCommand as exc:
                reasons.append(str(exc))
        return operations, reasons

    def operation(self, publication: commands.PublishParams, index: int) -> Operation:
        """Return the append of one publication. Raise InvalidCommand if it cannot be an entry."""
        channel, data, client, uid, kind, to, durability, parent = publication
        fields = [b"data", data]
        if client is not None or uid is not None or kind is not None or to is not None:
            fields = entry.encode(data, type=kind, uid=uid, to=to, client=client, checked=True)
        traced = None if parent is None else tracing.field_of(parent)
        if self._tracer is not None:
            span = self._tracer.append(channel, (traced or {}).get(tracing.FIELD), source="queue")
            self.spans.append(span)
            traced = {tracing.FIELD: span.traceparent}
        if traced is not None:
            fields += next(iter(traced.items()))
        if entry.size(fields) > self._max_entry_bytes:
            raise commands.InvalidCommand(f"too large: {entry.size(fields)} bytes")
        try:
            uid_key = None if uid is None else self._commands.uid_key(channel, uid)
        except LimitExceeded as exc:
            raise commands.InvalidCommand(str(exc)) from exc
        rules = self._namespace_of(channel)
        durability = durability or Durability.parse(rules.durability)
        stream, keep = self._keys.stream(channel), rules.retention_count
        return Operation(stream, fields, index, keep, uid_key, None, durability)

    def _publish(self, command: commands.CentrifugoCommand, index: int) -> list[Operation]:
        return [self.operation(commands.publish(command.params), index)]

    def _broadcast(self, command: commands.CentrifugoCommand, index: int) -> Iterator[Operation]:
        broadcast = commands.broadcast(command.params)
        if not broadcast.channels or not broadcast.data:
            raise commands.InvalidCommand("broadcast without channels or data")
        # v1 publishes the channels before an invalid one. Here a queued command is executed
        # completely or not at all.
        for name in broadcast.channels:
            yield self.operation(broadcast.publication(name), index)

    def _unsubscribe(self, command: commands.CentrifugoCommand, index: int) -> list[Operation]:
        params = commands.fields(command.params, strings=("channel", "user"))
        name = params.get("channel")
        channel = commands.checked_channel(name) if name else None
        return [
            self._control(
                control.UnsubscribeUser(user=_user(params), channel=channel, door=_DOOR), index
            )
        ]

    def _disconnect(self, command: commands.CentrifugoCommand, index: int) -> list[Operation]:
        params = commands.fields(command.params, strings=("user",))
        return [self._control(control.DisconnectUser(user=_user(params), door=_DOOR), index)]

    def _control(self, command: control.ControlCommand, index: int) -> Operation:
        channel = command.channel if isinstance(command, control.UnsubscribeUser) else None
        fields = control.encode(command)
        return Operation(self._keys.control, fields, index, control.KEEP, position_in=channel)


def _ignore(_command: commands.CentrifugoCommand, _index: int) -> list[Operation]:
    return []


def _user(params: Mapping[str, str]) -> str:
    if not params.get("user"):
        raise commands.InvalidCommand("user is missing")
    return params["user"]


class _Shard:
    """One queue: whether this worker has its lease, and whether it may have changed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.held = asyncio.Event()
        self.changed = asyncio.Event()
        self.average_bytes = 1024.0


class ApiQueueConsumer(RunningProducer):
    """Executes the commands of all queues whose leases this worker has."""

    def __init__(
        self,
        *,
        shards: ShardMap,
        keys: Keys,
        redis: RedisSettings,
        settings: QueueSettings,
        publish: PublishSettings,
        instance: str,
        namespace_of: Callable[[Channel], NamespaceSettings],
        max_entry_bytes: int,
        on_applied: Callable[[int, int], None] = lambda _applied, _broken: None,
        tracer: AppendTracer | None = None,
    ) -> None:
        """`on_applied` is called with the numbers of executed items and of dead letters."""
        self._keys = keys
        self._map = shards
        self._redis = redis
        self._settings = settings
        self._instance = instance
        self._namespace_of = namespace_of
        self._window_ms = int(publish.uid_window_s * 1000)
        self._on_applied = on_applied
        self._unconfirmed = UnconfirmedLog("API queue")
        self._dispatcher = Dispatcher(
            keys=keys,
            namespace_of=namespace_of,
            max_entry_bytes=max_entry_bytes,
            uid_window_s=publish.uid_window_s,
            tracer=tracer,
        )
        self._names = settings.names()
        self._shards = {name.encode(): _Shard(name) for name in self._names}
        # On several shards.
        self._places: list[QueuePlace] = []

    @override
    async def run(self) -> None:
        if self._keys.has_site_tag:
            await self._run_stepped()
            return
        # The pauses also grow if Redis rejects the leases, for example because its memory is full.
        await keep_connected(
            self._connected,
            lambda exc: _log.warning("API queue stopped: %s; retrying", exc),
            Backoff(_FIRST_PAUSE_S),
        )

    async def _run_stepped(self) -> None:
        """Execute the commands on several shards, see `queue_steps`."""
        if isinstance(self._map, HashMap):
            # Each server may have its own list of each name. The label is the same on all hosts,
            # which `shard.name` is not if they list the Sentinels in another order.
            self._places = [
                QueuePlace(f"{name}@{shard.id}", name, shard)
                for name in self._names
                for shard in self._map.shards
            ]
        else:
            self._places = [QueuePlace(name, name, None) for name in self._names]
        self._shards = {place.label.encode(): _Shard(place.label) for place in self._places}
        links = ShardLinks(self._map, self._redis, on_invalidated=self._on_invalidated)
        queues = SteppedQueues(links, self._keys, self._instance, self._places)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(links.run(), name="queue connections")
            try:
                await links.wait_open()
                tasks.create_task(self._keep_leases(queues, True, _SWEEP_STEPPED_S), name="leases")
                for shard in self._shards.values():
                    tasks.create_task(self._serve(queues, shard), name=f"queue {shard.name}")
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                # Release the leases, so that another worker can take over at once.
                with contextlib.suppress(RedisUnavailable, CommandRefused):
                    await queues.hold([shard.name for shard in self._shards.values()], 0)
                raise

    def _on_invalidated(self, names: Sequence[bytes] | None) -> None:
        for place in self._places:
            if names is None or place.name.encode() in names:
                self._shards[place.label.encode()].changed.set()

    async def _connected(self, established: Callable[[], None]) -> None:
        lost, on_lost = loss_of_connection()
        connection = await PipelineConnection.open(
            await discover(self._redis),
            settings=self._redis,
            on_push=self._on_push,
            on_lost=on_lost,
            name="relay-queue",
        )
        try:
            queues = CommandQueues(connection, self._keys, self._instance)
            await queues.prepare()
            try:
                await connection.call("CLIENT", "TRACKING", "ON")
                tracking = True
            except CommandRefused:
                tracking = False
                _log.warning(
                    "API queue: Redis rejects CLIENT TRACKING; polling the queues every %d ms",
                    _POLL_S * 1000,
                )
            established()
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(wait_for(lost), name="queue connection lost")
                    tasks.create_task(self._keep_leases(queues, tracking), name="queue leases")
                    for shard in self._shards.values():
                        tasks.create_task(self._serve(queues, shard), name=f"queue {shard.name}")
            except asyncio.CancelledError:
                # Release the leases, so that another worker can take over at once.
                with contextlib.suppress(RedisUnavailable, CommandRefused):
                    await queues.hold([shard.name for shard in self._shards.values()], 0)
                raise
        finally:
            for shard in self._shards.values():
                shard.held.clear()
            connection.close()

    def _on_push(self, push: list[object]) -> None:
        if push[0] != b"invalidate":
            return
        names = push[1]
        for name in names if isinstance(names, list) else self._shards:
            if name in self._shards:
                self._shards[name].changed.set()

    async def _keep_leases(self, queues: Queues, tracking: bool, sweep_s: float = _SWEEP_S) -> None:
        shards = list(self._shards.values())
        loop = asyncio.get_running_loop()
        renew_at = sweep_at = loop.time()
        problem = ""
        while True:
            now = loop.time()
            if now >= renew_at:
                renew_at = now + _RENEW_S
                try:
                    held = await queues.hold([shard.name for shard in shards], _LEASE_MS)
                    problem = ""
                except (RedisUnavailable, CommandRefused) as exc:
                    if isinstance(queues, CommandQueues):
                        raise
                    if problem != str(exc):
                        _log.warning("API queue stopped: %s; retrying", exc)
                    problem = str(exc)
                    held = [False] * len(shards)
                for shard, mine in zip(shards, held, strict=True):
                    if not mine:
                        shard.held.clear()
                    elif not shard.held.is_set():
                        shard.held.set()
                        shard.changed.set()
            if not tracking or now >= sweep_at:
                sweep_at = now + sweep_s
                for shard in shards:
                    shard.changed.set()
            await asyncio.sleep(_RENEW_S if tracking else _POLL_S)

    async def _serve(self, queues: Queues, shard: _Shard) -> None:
        while True:
            await shard.held.wait()
            await shard.changed.wait()
            shard.changed.clear()
            try:
                while shard.held.is_set():
                    most = max(1, int(_BATCH_BYTES / shard.average_bytes))
                    head = await queues.head(shard.name, min(self._settings.batch, most))
                    if not head.items:
                        break
                    shard.average_bytes = sum(map(len, head.items)) / len(head.items) + 1
                    await self._apply(queues, shard, head)
            except RedisUnavailable as exc:
                if isinstance(queues, CommandQueues):
                    raise
                _log.warning(
                    "API queue %s stopped: %s; retrying in %g s", shard.name, exc, _RETRY_S
                )
                await asyncio.sleep(_RETRY_S)
                shard.changed.set()
            except CommandRefused as exc:
                # Redis is out of memory, the key has another type, or the user lacks a permission.
                # The commands stay in the queue.
                _log.error(
                    "API queue %s: Redis rejected its commands: %s; retrying in %g s",
                    shard.name,
                    exc,
                    _RETRY_S,
                )
                await asyncio.sleep(_RETRY_S)
                shard.changed.set()

    async def _apply(self, queues: Queues, shard: _Shard, head: Head) -> None:
        operations: list[Operation] = []
        broken = 0
        wanted: set[Durability] = set()
        async for index, item in in_slices(enumerate(head.items)):
            appends, reasons = await self._dispatcher.operations(item, index)
            operations += appends
            wanted |= {each.durability for each in appends if each.durability is not FAST}
            for reason in reasons:
                broken += 1
                operations.append(self._dead_letter(shard.name, item, reason, index))
        spans, self._dispatcher.spans = self._dispatcher.spans, []
        failed = await queues.apply(shard.name, head, operations, window_ms=self._window_ms)
        async for span in in_slices(spans):
            span.end("")
        if wanted and failed is not None:
            # No producer waits for a reply. The wait keeps the queue from running ahead of the
            # replicas. If a failover loses the entries, it also loses their removal from the queue,
            # unless that is on another server.
            most_ms = int(self._redis.command_timeout_s * 500)
            missing = await queues.confirm(shard.name, wanted, most_ms)
            self._unconfirmed.report(missing)
        if failed is not None:
            self._on_applied(len(head.items), broken + failed)

    def _dead_letter(self, queue: str, item: bytes, reason: str, index: int) -> Operation:
        letter = dead_letters.of_command(queue, item, reason, node=self._instance)
        return Operation(self._keys.dead_letters, letter, index, dead_letters.KEEP)


def build(context: ProducerContext, settings: QueueSettings) -> ApiQueueConsumer:
    """Create the producer. Raise ConfigError if its settings are incomplete."""

    def on_applied(taken: int, broken: int) -> None:
        context.count("taken", taken)
        context.count("broken", broken)

    return ApiQueueConsumer(
        shards=context.shards,
        keys=context.keys,
        redis=context.redis,
        settings=settings,
        publish=context.publish,
        instance=context.instance,
        namespace_of=context.namespace_of,
        max_entry_bytes=context.max_entry_bytes,
        on_applied=on_applied,
        tracer=context.tracer,
    )
