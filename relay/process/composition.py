"""Build the parts of a relay process in their order.

    Redis ── StreamReader ── Hub ── protocols ── Server
                              └── Admission (rights)

Nothing is started here: no task runs and no listener opens before `relay.process.app`.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Unpack, cast

from producers.registry import RunningProducer
from producers.registry import build as build_producer
from producers.settings import PRODUCERS, QueueSettings
from relay import __version__
from relay.config.lists import split
from relay.console.routes import Console
from relay.console.services import ConsoleServices
from relay.core.client_address import TrustedProxies
from relay.core.errors import LimitExceeded, RelayError, StartError
from relay.core.reasons import Reason
from relay.core.tracing import FIELD
from relay.core.worker_deaths import WorkerDeaths
from relay.doorkit.contract import DoorContext
from relay.doorkit.first_subscriptions import NOT_READING
from relay.hub.hub import Hub
from relay.inspect.connections import QUESTION as CONNECTIONS
from relay.inspect.connections import ConnectionDirectory
from relay.inspect.disconnects import CLOSE, CLOSED_BY, ConnectionCloser
from relay.inspect.followers import QUESTION as FOLLOWERS
from relay.inspect.followers import Followers
from relay.inspect.journal import Journal
from relay.inspect.questions import Questions
from relay.inspect.tap import QUESTION as TAP
from relay.inspect.tap import Tap
from relay.process import clean_stop
from relay.process.admission import Admission, ReadRights
from relay.process.cluster_services import ClusterServices
from relay.process.control_commands import ControlCommands
from relay.process.embedded import data_folder
from relay.process.freezes import FreezeDetector
from relay.process.garbage import RareCollections
from relay.process.host_metrics import HostMetrics
from relay.process.incoming import Incoming
from relay.process.jobs import JobScheduler, shared_jobs, worker_jobs
from relay.process.server import Server, node_name
from relay.process.shared_listeners import SharedListeners
from relay.process.site_metrics import SiteMetrics
from relay.process.tokens import Tokens
from relay.protocols import load_door, protocol_names
from relay.rights.http import HttpRights
from relay.rights.policy import Policy
from relay.stream.cluster.connection_limits import ConnectionLimiter
from relay.stream.cluster.directory import WorkerDirectory
from relay.stream.cluster.login_attempts import LoginAttempts
from relay.stream.cluster.workers import (
    WorkerHeartbeat,
    WorkerLoad,
    describe_this_worker,
    new_instance,
    resident_bytes,
)
from relay.stream.connection.primary import Primaries
from relay.stream.connection.refusals import Refusals
from relay.stream.format import entry
from relay.stream.read.control_reader import ControlReader
from relay.stream.read.reader import StreamReader
from relay.stream.read.shard_readers import ShardReaders
from relay.stream.shards.making import is_single, keys_of, refusals_of
from relay.stream.upkeep.unused import UnusedStreams
from relay.stream.write.appender import Appender
from relay.transports.between_workers.forwarder import Forwarder
from relay.transports.between_workers.internal import InternalListener
from relay.transports.between_workers.session_ids import SessionIds

if TYPE_CHECKING:
    import aiohttp

    from producers.settings import ProducerSection
    from relay.config.loading import Config
    from relay.config.settings import NamespaceSettings, RedisSettings, Section
    from relay.core.clock import RedisClock
    from relay.core.connection import ConnectionInfo
    from relay.core.durability import Durability
    from relay.core.metrics import Metrics
    from relay.core.model import Channel, EntryID, EventFields, Principal, Record
    from relay.core.worker_memory import Worker
    from relay.doorkit.contract import Mounted, OpenSession, Publish, Spawn
    from relay.hub.session import Client, Encoder, Session
    from relay.process.doctor.finding import Finding
    from relay.process.tracing import Tracing
    from relay.stream.connection.primary import Continued
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients
    from relay.stream.shards.shard import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Foundation:
    """Configuration and services for building the parts. `is_stopping` is True during a stop."""

    config: Config
    redis: RedisSettings
    clients: ShardClients
    # For the console: clients with an operator's rights.
    operators: ShardClients
    current_config: Callable[[], Config]
    # The findings of the doctor.
    examine: Callable[[], Awaitable[list[Finding]]]
    http: aiohttp.ClientSession
    # None if traces are disabled.
    tracing: Tracing | None
    metrics: Metrics
    worker: Worker | None
    namespace_of: Callable[[Channel], NamespaceSettings]
    is_stopping: Callable[[], bool]
    spawn: Spawn
    spawn_for_protocol: Spawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of one relay process, in the order in which they are built."""

    node: str
    keys: Keys
    rights: ReadRights
    hub: Hub
    admission: Admission
    incoming: Incoming
    unused: UnusedStreams
    reader: ShardReaders
    not_ready: Callable[[], str]
    appender: Appender
    limiter: ConnectionLimiter
    cluster: ClusterServices
    questions: Questions
    journal: Journal
    server: Server
    internal: InternalListener
    deaths: WorkerDeaths
    freezes: FreezeDetector
    tokens: Tokens
    doors: Mapping[str, Mounted]
    console: Console
    listeners: SharedListeners | None
    heartbeat: WorkerHeartbeat
    collections: RareCollections
    jobs: JobScheduler
    producers: Mapping[str, RunningProducer]


def build(base: Foundation) -> Parts:
    """Build all parts. Raise ConfigError or StartError if the configuration is unusable."""
    config = base.config
    node = node_name(config) + (f"-{base.worker.number}" if base.worker else "")
    instance = new_instance(node)
    keys, shards = keys_of(base.redis), base.clients.shards
    # With several servers, `refusals` has those that concern no channel.
    of_server = refusals_of(shards)
    refusals = of_server(shards.shards[0]) if is_single(shards) else Refusals()

    # From Redis to the local clients.
    rights = ReadRights(Policy(config.namespace, http_rights(config, base.http)))
    incoming = Incoming(metrics=base.metrics, max_entry_bytes=config.stream.max_entry_bytes)
    hub = _hub(base, rights, incoming)
    admission = Admission(rights=rights, hub=hub, spawn=base.spawn)
    commands = ControlCommands(
        hub=hub, rights=rights, spawn=lambda work: base.spawn(work, name="commands")
    )
    unused = UnusedStreams(base.clients, keys)
    reader = _reader(base, keys, instance, hub, commands, incoming, unused, refusals, of_server)
    # The only circular reference: the hub requests streams from the reader that serves it.
    hub.reads = reader

    # From the local clients and producers to Redis, and to other workers.
    appender = Appender(
        shards=shards,
        keys=keys,
        redis=base.redis,
        settings=config.publish,
        namespace_of=base.namespace_of,
        refusals=of_server,
    )
    deaths = WorkerDeaths(base.worker.memory if base.worker else None)
    limiter = _limiter(base, keys, instance, hub, refusals, deaths)
    cluster = ClusterServices(
        shards=shards,
        redis=base.redis,
        keys=keys,
        instance=instance,
        decode=_decode(config),
        spawn=base.spawn,
        max_entry_bytes=config.stream.max_entry_bytes,
        dead=deaths.is_dead,
        continued=_continued(base),
    )
    directory = WorkerDirectory(
        client=base.clients.home,
        keys=keys,
        deaths=deaths,
        # `relay status`, `/readyz` and the log name the problem.
        on_conflict=partial(refusals.note, "schema"),
    )
    journal = hub.observer = Journal(
        links=cluster.bus.links,
        keys=keys,
        instance=instance,
        events=config.journal.events,
        now_ms=base.metrics.clock.now_ms,
        rights_of=lambda channel: base.namespace_of(channel).rights,
    )
    questions = _questions(base, keys, cluster, hub, commands, journal, instance)

    # The protocols, on the HTTP server.
    host_metrics = HostMetrics(
        base.metrics, base.worker, SiteMetrics(base.clients, keys, _queues(config))
    )
    base.metrics.redis.connected = reader.connected
    base.metrics.pending_appends.set_function(appender.__len__)
    server = Server(
        metrics=base.metrics,
        middlewares=[base.tracing.middleware] if base.tracing else [],
        exposition=host_metrics.exposition,
        ready=lambda: _not_ready(base, reader) or _workers_not_ready(base),
        limits=lambda: _limits(reader, refusals),
        on_rejected=journal.answered,
        proxies=TrustedProxies(split(config.server.trusted_proxies)),
    )
    tokens = Tokens(config.jwt)
    publish = _publish(appender, config.stream.max_entry_bytes)
    hub.trace = base.tracing
    if base.tracing is not None:
        publish = _traced(publish, base.tracing)
    attempts = LoginAttempts(base.clients, keys)
    console = _console(base, keys, cluster, questions, publish, attempts)
    context = DoorContext(
        hub=hub,
        open=_open(limiter, hub),
        subscribe=admission.subscribe,
        publish=publish,
        publish_ephemeral=cluster.publish_ephemeral,
        disconnect=cluster.disconnect,
        unsubscribe=cluster.unsubscribe,
        history=cluster.history.read,
        members=cluster.members,
        on_command=commands.on_command.__setitem__,
        on_drop=rights.on_drop.append,
        turned_away=journal.turned_away,
        bus=cluster.bus,
        store=cluster.store,
        presence=cluster.presence,
        active=cluster.active,
        spawn=base.spawn_for_protocol,
        http=base.http,
        read_token=tokens.read,
        forward=server.forward,
        session_ids=SessionIds(cluster.bus.address, lambda: directory.keys),
        gather=server.gather,
        not_reading=partial(_not_reading, reader),
        wait_connected=reader.wait_ready,
        metrics=base.metrics,
        clock=base.metrics.clock,
        login_attempts=attempts,
        console=console.at,
        client_buffer_bytes=config.hub.client_buffer_bytes,
        insecure=config.insecure,
    )
    doors = dict(_mounted(config, context))
    tokens.doors = doors.values()

    # Shared listeners, heartbeat and periodic jobs.
    listeners = _shared_listeners(base, instance, hub, reader, server)
    if listeners:
        host_metrics.balance = listeners.balance
        listeners.balance.on_metrics_wanted = lambda: base.spawn(
            host_metrics.write(), name="metrics"
        )
    server.forwarder = Forwarder(
        balance=listeners.balance if listeners else None,
        listener_of=server.listener_of,
        address_of=directory.address_of,
        key=lambda: directory.key,
    )
    deaths.on_death.append(server.forwarder.on_death)
    deaths.on_death.append(partial(_clear_presence, base, cluster))
    freezes = FreezeDetector()
    freezes.on_wake.append(limiter.on_wake)
    freezes.on_wake.append(cluster.presence.on_wake)
    base.metrics.clock.on_jump += [limiter.on_wake, cluster.presence.on_wake]
    internal = InternalListener(cluster.bus.address, lambda: directory.key, server.take_internal)
    heartbeat = _heartbeat(base, keys, node, instance, hub, reader, refusals)
    collections = RareCollections()
    jobs = JobScheduler(
        client=base.clients.home,
        keys=keys,
        instance=instance,
        is_connected=reader.is_connected,
        jobs=[
            *worker_jobs(
                admission=admission,
                heartbeat=heartbeat,
                directory=directory,
                presence=cluster.presence,
                listeners=listeners,
                collections=collections,
                measure_clock=partial(_measure_clock, base.metrics.clock, cluster, refusals),
            ),
            *shared_jobs(
                clients=base.clients,
                keys=keys,
                settings=config.jobs,
                namespace_of=base.namespace_of,
                presence=cluster.presence,
                refusals=refusals,
            ),
        ],
    )
    return Parts(
        node=node,
        keys=keys,
        rights=rights,
        hub=hub,
        admission=admission,
        incoming=incoming,
        unused=unused,
        reader=reader,
        not_ready=lambda: _not_ready(base, reader),
        appender=appender,
        limiter=limiter,
        cluster=cluster,
        questions=questions,
        journal=journal,
        server=server,
        internal=internal,
        deaths=deaths,
        freezes=freezes,
        tokens=tokens,
        doors=doors,
        console=console,
        listeners=listeners,
        heartbeat=heartbeat,
        collections=collections,
        jobs=jobs,
        producers=dict(_producers(base, instance)),
    )


def http_rights(config: Config, http: aiohttp.ClientSession) -> HttpRights | None:
    """Return the client for the application's answers about rights, or None if there is no URL."""
    return HttpRights(config.rights, http) if config.rights.http_url else None


def _queues(config: Config) -> list[str]:
    """Return the names of the API queues that relay reads."""
    queue = config.producers["producer:queue"]
    return queue.names() if isinstance(queue, QueueSettings) and queue.enabled else []


def _decode(config: Config) -> partial[Record]:
    return partial(entry.decode, max_bytes=config.stream.max_entry_bytes)


def _hub(base: Foundation, rights: ReadRights, incoming: Incoming) -> Hub:
    hub = Hub(
        rights=rights,
        metrics=base.metrics,
        call_soon=asyncio.get_running_loop().call_soon,
        spawn=lambda work: base.spawn(work, name="hub"),
        connections_per_user=base.config.hub.connections_per_user,
        on_broken=incoming.add_dead_letter,
    )
    base.metrics.behind.set_function(lambda: hub.behind_count)
    return hub


def _reader(
    base: Foundation,
    keys: Keys,
    instance: str,
    hub: Hub,
    commands: ControlCommands,
    incoming: Incoming,
    unused: UnusedStreams,
    refusals: Refusals,
    of_server: Callable[[Shard], Refusals],
) -> ShardReaders:
    shards, primaries = base.clients.shards, Primaries()
    control = ControlReader(
        keys, commands.apply, commands.lost, refusals, on_misplaced=lambda: readers.look()
    )

    def make(shard: Shard) -> StreamReader:
        return StreamReader(
            keys=keys,
            instance=instance,
            shard=shard,
            settings=base.config.stream,
            metrics=base.metrics,
            decode=_decode(base.config),
            on_turn=hub.flush,
            decode_ephemeral=incoming.decode_ephemeral,
            control=None,
            unused=unused,
            refusals=of_server(shard),
            continued=_continued(base),
            others=primaries,
            on_misplaced=partial(readers.look, shard),
        )

    readers = ShardReaders(
        shards=shards, keys=keys, control=control, primaries=primaries, make=make
    )
    return readers


def _limits(reader: ShardReaders, refusals: Refusals) -> str:
    """Return which functions and which servers do not work now."""
    return "; ".join(filter(None, (reader.problem(), str(refusals), reader.limits())))


def _not_reading(reader: ShardReaders, channels: Iterable[Channel]) -> str:
    """Return why these channels cannot be read now, or an empty string."""
    if reader.is_connected(channels):
        return ""
    problem = reader.problem(channels) if reader.is_connected() else ""
    return f"{NOT_READING}: {problem}" if problem else NOT_READING


def _continued(base: Foundation) -> Continued:
    """Return the source of proofs that the server's restarts lost nothing."""
    settings = base.config.redis
    if settings.url != "embedded":
        return lambda _: ()
    return partial(clean_stop.continued, data_folder(settings))


def _limiter(
    base: Foundation,
    keys: Keys,
    instance: str,
    hub: Hub,
    refusals: Refusals,
    deaths: WorkerDeaths,
) -> ConnectionLimiter:
    limiter = ConnectionLimiter(
        client=base.clients.home,
        keys=keys,
        instance=instance,
        limit=base.config.hub.connections_per_user,
        count=hub.count,
        users=hub.users,
        dead=deaths.is_dead,
        evict=partial(_evict, hub),
        refusals=refusals,
    )
    hub.on_count.append(limiter.changed)
    return limiter


def _questions(
    base: Foundation,
    keys: Keys,
    cluster: ClusterServices,
    hub: Hub,
    commands: ControlCommands,
    journal: Journal,
    instance: str,
) -> Questions:
    """Return the questions that operators ask of all workers, with this worker's answers."""
    questions = Questions(
        cluster.bus,
        client=base.clients.home,
        keys=keys,
        spawn=lambda work: base.spawn(work, name="question"),
    )
    connections = ConnectionDirectory(
        hub, instance=instance, host=socket.gethostname(), rejections=journal.rejections_of
    )
    questions.answer(CONNECTIONS, connections.answer)
    questions.answer(CLOSED_BY, commands.answer)
    questions.answer(CLOSE, ConnectionCloser(hub).answer)
    questions.answer(FOLLOWERS, Followers(hub).answer)
    questions.answer(TAP, Tap(hub, journal, base.metrics.clock.now_ms).answer)
    return questions


def _clear_presence(base: Foundation, cluster: ClusterServices, dead: str) -> None:
    """Remove a dead worker's clients from presence, on one worker of each host."""
    first = base.worker.memory.first_listening() if base.worker else None
    if base.worker is None or first == base.worker.number:
        _ = base.spawn(cluster.clear_presence(dead), name=f"presence of {dead}")


def _evict(hub: Hub, excess: Mapping[tuple[str, str | None], int]) -> None:
    for (user, door), count in excess.items():
        hub.disconnect_user(user, Reason.STOPPING, door, count)


def _open(limiter: ConnectionLimiter, hub: Hub) -> OpenSession:
    async def open_session(
        principal: Principal,
        encoder: Encoder,
        client: Client,
        *,
        info: ConnectionInfo | None = None,
        limit: int | None = None,
    ) -> Session:
        door = None if limit is None else principal.door
        async with limiter.slot(principal.user, door, limit or 0):
            return hub.open(principal, encoder, client, info)

    return open_session


def _publish(appender: Appender, max_entry_bytes: int) -> Publish:
    def publish(
        channel: Channel,
        data: bytes,
        *,
        unless_latest: bytes | None = None,
        durability: Durability | None = None,
        **fields: Unpack[EventFields],
    ) -> asyncio.Future[EntryID]:
        encoded = entry.encode(data, **fields)
        size = entry.size(encoded)
        if size > max_entry_bytes:
            raise LimitExceeded(f"too large: {size} of {max_entry_bytes} bytes")
        return appender.append(
            channel,
            encoded,
            fields.get("uid"),
            unless_latest=unless_latest,
            durability=durability,
        )

    return publish


def _traced(publish: Publish, tracing: Tracing) -> Publish:
    def traced(
        channel: Channel,
        data: bytes,
        *,
        unless_latest: bytes | None = None,
        durability: Durability | None = None,
        **fields: Unpack[EventFields],
    ) -> asyncio.Future[EntryID]:
        extra = dict(fields.get("extra") or {})
        span = tracing.append(channel, extra.get(FIELD))
        fields["extra"] = {**extra, FIELD: span.traceparent}

        def done(appended: asyncio.Future[EntryID]) -> None:
            problem = "cancelled" if appended.cancelled() else str(appended.exception() or "")
            span.end("" if problem else str(appended.result()), problem)

        try:
            appended = publish(
                channel, data, unless_latest=unless_latest, durability=durability, **fields
            )
        except RelayError as exc:
            span.end("", str(exc))
            raise
        appended.add_done_callback(done)
        return appended

    return traced


def _console(
    base: Foundation,
    keys: Keys,
    cluster: ClusterServices,
    questions: Questions,
    publish: Publish,
    attempts: LoginAttempts,
) -> Console:
    services = ConsoleServices(
        config=base.current_config,
        clients=base.operators,
        keys=keys,
        publish=publish,
        presence=cluster.presence,
        store=cluster.store,
        attempts=attempts,
        questions=questions,
        examine=base.examine,
    )
    return Console(services, base.config.console)


def _mounted(config: Config, context: DoorContext) -> Iterator[tuple[str, Mounted]]:
    for name in protocol_names():
        section = section_of(config, name)
        if section.is_open:
            yield name, load_door(name).mount(context, section)
        elif section.unservable:
            raise StartError(f"[protocol:{name}] {section.unservable}")


def section_of(config: Config, door: str) -> Section:
    """Return the settings of a protocol."""
    return config.doors[f"protocol:{door}"]


def _not_ready(base: Foundation, reader: ShardReaders) -> str:
    """Return the reason why this worker is not ready, or an empty string."""
    if base.is_stopping():
        return "this worker is stopping"
    if not reader.ready():
        return "streams are not being read"
    if not reader.settled():
        return "streams are being checked for new entries after a reconnect to Redis"
    return ""


async def _measure_clock(clock: RedisClock, cluster: ClusterServices, refusals: Refusals) -> None:
    await cluster.measure(clock)
    # `relay status`, `/readyz` and the log name the problem.
    refusals.note("clock", clock.problem())


def _workers_not_ready(base: Foundation) -> str:
    others = base.worker.memory.not_ready() if base.worker else []
    return f"worker {', '.join(map(str, others))} is not ready" if others else ""


def _shared_listeners(
    base: Foundation, instance: str, hub: Hub, reader: ShardReaders, server: Server
) -> SharedListeners | None:
    if base.worker is None:
        return None
    base.worker.memory.register(base.worker.number, instance)
    listeners = SharedListeners(
        base.worker,
        server=server,
        is_ready=lambda: reader.ready() and reader.settled() and not base.is_stopping(),
        clients=lambda: hub.total,
    )
    hub.on_count.append(lambda _: listeners.on_connections_changed())
    return listeners


def _heartbeat(
    base: Foundation,
    keys: Keys,
    node: str,
    instance: str,
    hub: Hub,
    reader: ShardReaders,
    refusals: Refusals,
) -> WorkerHeartbeat:
    def load() -> WorkerLoad:
        return WorkerLoad(
            ready=reader.ready() and reader.settled(),
            connections=len(hub.sessions()),
            streams=len(hub.feeds()),
            lag_ms=round(base.metrics.pop_worst_lag() * 1000),
            refused=_limits(reader, refusals),
            protocols=base.metrics.connections_by_protocol(),
            cpu_s=round(time.process_time(), 2),
            events=base.metrics.received(),
            deliveries=base.metrics.offered(),
            memory_bytes=resident_bytes(),
        )

    return WorkerHeartbeat(
        client=base.clients.home,
        keys=keys,
        worker=describe_this_worker(node, instance, __version__),
        load=load,
        refusals=refusals,
    )


def _producers(base: Foundation, instance: str) -> Iterator[tuple[str, RunningProducer]]:
    for name in PRODUCERS:
        section = cast("ProducerSection", base.config.producers[f"producer:{name}"])
        if section.is_enabled:
            yield (
                name,
                build_producer(
                    name,
                    base.config,
                    redis=base.redis,
                    instance=instance,
                    namespace_of=base.namespace_of,
                    count=partial(_count, base.metrics, name),
                    tracer=base.tracing,
                ),
            )


# Producers that write a dead letter for each item that they cannot use.
_WITH_DEAD_LETTERS = frozenset({"queue", "socketio_emitter"})


def _count(metrics: Metrics, name: str, result: str, number: int) -> None:
    metrics.producer_items.labels(name, result).inc(number)
    if result == "broken" and name in _WITH_DEAD_LETTERS:
        metrics.dead_letters.inc(number)
