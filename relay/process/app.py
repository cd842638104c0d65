"""The composition root: builds each part, starts them in order, stops them in reverse.

    Redis ── Reader ── Incoming ── Hub ── doors ── Server
                                    └─ Admission (rights)

Stop: reject new clients but serve producers, ask clients to reconnect (spread over `drain_s`; they
are served until then), close the listeners, answer the last producers, let the clients' last bytes
out, stop reading, then let go. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import uvloop

from relay import __version__
from relay.core.errors import RelayError, StartError
from relay.core.metrics import Metrics
from relay.core.model import parse_channel
from relay.core.worker_memory import BEAT_S, REOPEN_LOG, Worker
from relay.doorkit.contract import DoorContext, Mounted, read_token
from relay.hub.hub import Hub
from relay.process import garbage, logs, wiring
from relay.process.cluster_services import Site
from relay.process.drain import drain, end_all, last_bytes
from relay.process.embedded import private_folder
from relay.process.jobs import Jobs
from relay.process.pid_file import pid_file, write_error
from relay.process.pipeline import Admission, Incoming
from relay.process.reloading import Reloads
from relay.process.server import Listening, Server, node_name
from relay.process.start_signals import release_signals
from relay.protocols import load_door, protocol_names
from relay.rights.http import HttpRights
from relay.rights.policy import Policy
from relay.rights.token import TokenReader
from relay.stream.cluster.connection_limits import ConnectionLimiter
from relay.stream.cluster.workers import (
    WorkerHeartbeat,
    WorkerLoad,
    describe_this_worker,
    new_instance,
)
from relay.stream.connection.connect import check_mode, redis_client
from relay.stream.connection.refusals import Refusals
from relay.stream.format.keys import Keys
from relay.stream.read.control_reader import ControlReader
from relay.stream.read.reader import StreamReader
from relay.stream.upkeep.unused import UnusedStreams
from relay.stream.write import revoke as revocations
from relay.stream.write.appender import Appender
from relay.transports.between_workers.balance import Balance
from relay.transports.socket.listener import raise_open_file_limit

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from relay.config.loading import Config
    from relay.config.settings import NamespaceSettings, RedisSettings, Section
    from relay.core.model import Channel

_log = logging.getLogger(__name__)

_FIRST_READ_S = 10.0
_HANDED_OVER_S = 0.05


def run(
    config: Config,
    *,
    reload: Callable[[], Config],
    on_ready: Callable[[int, str], None],
    worker: Worker | None = None,
) -> int:
    """Serve until a signal; the exit code. StartError in one line if something is missing.

    As one `worker` of several it shares its ports, and leaves the embedded Valkey and the pid file
    to the supervisor.
    """
    raise_open_file_limit()
    with pid_file("" if worker else config.node.pid_file):
        return uvloop.run(Relay(config, reload, on_ready, worker).run())


def check(config: Config) -> list[Listening]:
    """Build every part of a relay and start none; return the listeners that it would open.

    Raises what `run` would raise for the same configuration: ConfigError, StartError. It connects
    to nothing and may be called from any thread.
    """
    if problem := config.log.file and write_error(config.log.file):
        raise StartError(logs.open_error(config.log.file, problem))
    if problem := config.node.pid_file and write_error(config.node.pid_file):
        raise StartError(f"[node] pid_file: {config.node.pid_file} cannot be written: {problem}")
    if config.redis.url == "embedded":
        private_folder(Path(config.redis.embedded_dir or "data"), make=False)
    relay = Relay(config, reload=lambda: config, on_ready=lambda *_: None, check_only=True)
    asyncio.run(relay.run())
    return relay.listeners


async def revoke(redis: RedisSettings, channel_name: str, user: str) -> str:
    """Revoke the right to read; return the ID of the entry after which nothing is delivered."""
    channel = parse_channel(channel_name)
    async with redis_client(redis) as client:
        return str(await revocations.revoke(client, Keys(redis.prefix), channel, user))


async def grant(redis: RedisSettings, channel_name: str, user: str) -> str | None:
    """Undo a revocation; return the ID of the entry, None if the user is not refused."""
    channel = parse_channel(channel_name)
    async with redis_client(redis) as client:
        entry_id = await revocations.grant(client, Keys(redis.prefix), channel, user)
        return None if entry_id is None else str(entry_id)


class Relay:
    """One process at work."""

    def __init__(
        self,
        config: Config,
        reload: Callable[[], Config],
        on_ready: Callable[[int, str], None],
        worker: Worker | None = None,
        *,
        check_only: bool = False,
    ) -> None:
        """`check_only`: `run` returns once all parts are built; see `check`."""
        self._config = config
        self._check_only = check_only
        self.listeners: list[Listening] = []
        self._reloads = Reloads(reload, lambda: self._config, self._reload)
        self._on_ready = on_ready
        self._worker = worker
        self._stop = asyncio.Event()
        self._listening = True
        self._metrics = Metrics(worker.number, worker.siblings) if worker else Metrics()
        self._background: asyncio.TaskGroup | None = None
        self._door_tasks: set[asyncio.Task[None]] = set()
        self._doors: list[tuple[str, Mounted, Section]] = []
        self._tokens = TokenReader(config.jwt)

    async def run(self) -> int:
        """Start, serve, stop."""
        async with contextlib.AsyncExitStack() as stack:
            if not self._check_only:
                self._handle_signals()
            redis = await wiring.reachable_redis(
                self._config.redis,
                stack,
                starts_it=self._worker is None and not self._check_only,
            )
            client = await stack.enter_async_context(redis_client(redis))
            if not self._check_only and self._config.redis.url != "embedded":
                await check_mode(client, redis)
            self._background = await stack.enter_async_context(asyncio.TaskGroup())
            self._http = http = await stack.enter_async_context(
                aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
            )
            await self._serve(redis, client, http)
        return 0

    async def _serve(
        self, redis: RedisSettings, client: Redis, http: aiohttp.ClientSession
    ) -> None:
        config, metrics = self._config, self._metrics
        node = node_name(config)
        if self._worker:
            node = f"{node}-{self._worker.number}"
        instance = new_instance(node)
        if self._worker:
            self._worker.siblings.enter(self._worker.number, instance)
        keys = Keys(redis.prefix)
        policy = Policy(config.namespace, self._http_rights(config))
        self._admission = admission = Admission(policy, self._spawn)
        incoming = Incoming(metrics=metrics, max_entry_bytes=config.stream.max_entry_bytes)
        refusals = Refusals()
        unused = UnusedStreams(client, keys)
        reader = StreamReader(
            keys=keys,
            instance=instance,
            redis=redis,
            settings=config.stream,
            metrics=metrics,
            decode=incoming.decode,
            on_records=incoming.deliver,
            on_turn=lambda: hub.flush(),
            decode_ephemeral=incoming.decode_ephemeral,
            control=ControlReader(keys, admission.obey, admission.control_lost, refusals),
            unused=unused,
            refusals=refusals,
        )
        loop = asyncio.get_running_loop()
        self._hub = admission.hub = hub = Hub(
            reads=reader,
            rights=admission,
            metrics=metrics,
            call_soon=loop.call_soon,
            spawn=lambda work: self._spawn(work, name="hub"),
            connections_per_user=config.hub.connections_per_user,
        )
        appender = Appender(
            keys=keys,
            redis=redis,
            settings=config.publish,
            namespace_of=self._namespace,
            refusals=refusals,
        )
        metrics.behind.set_function(lambda: sum(feed.behind_count for feed in hub.feeds()))
        self._seats = seats = ConnectionLimiter(
            client=client,
            keys=keys,
            instance=instance,
            limit=config.hub.connections_per_user,
            count=hub.count,
            users=hub.users,
            dead=self._worker.siblings.is_dead if self._worker else lambda _: False,
            refusals=refusals,
        )
        self._on_count: list[Callable[[str], None]] = [seats.changed]
        hub.on_count = lambda user: [told(user) for told in self._on_count]

        site = Site(
            redis=redis,
            keys=keys,
            instance=instance,
            decode=incoming.decode,
            spawn=self._spawn,
            dead=self._worker.siblings.is_dead if self._worker else lambda _: False,
        )

        context = DoorContext(
            hub=hub,
            open=wiring.opening(seats, hub),
            subscribe=admission.subscribe,
            publish=wiring.publishing(appender, config.stream.max_entry_bytes),
            whisper=site.whisper,
            disconnect=site.disconnect,
            unsubscribe=site.unsubscribe,
            history=site.history.read,
            members=site.members,
            on_command=admission.on_command.__setitem__,
            on_drop=admission.on_drop.append,
            bus=site.bus,
            store=site.store,
            presence=site.presence,
            active=site.active,
            spawn=self._spawn_for_door,
            http=http,
            read_token=lambda text: read_token(text, self._tokens, self._doors),
            pass_on=lambda request, instance: server.pass_on(request, instance),
            gather=lambda request: server.gather(request),
            is_connected=reader.is_connected,
            wait_connected=reader.wait_ready,
            metrics=metrics,
            client_buffer_bytes=config.hub.client_buffer_bytes,
            insecure=config.insecure,
        )
        self._mount(context)
        heartbeat = WorkerHeartbeat(
            client=client,
            keys=keys,
            worker=describe_this_worker(node, instance, __version__),
            load=lambda: WorkerLoad(
                ready=reader.ready() and reader.settled(),
                connections=len(hub.sessions()),
                streams=len(hub.feeds()),
                lag_ms=round(metrics.take_worst_lag() * 1000),
                refused=str(refusals),
            ),
            refusals=refusals,
        )
        jobs = Jobs(
            client=client,
            keys=keys,
            instance=instance,
            settings=config.jobs,
            namespace_of=self._namespace,
            presence=site.presence,
            refusals=refusals,
        )
        server = Server(
            metrics=metrics,
            ready=lambda: self._not_ready(reader),
            limits=lambda: str(refusals),
        )
        self.listeners = server.plan(config, self._doors)
        producers = list(wiring.producers(config, metrics, redis, keys, instance, self._namespace))
        if self._check_only:
            return
        reading = self._spawn(self._keep_reading(reader), name="reader")
        settings = self._obey_supervisor() if self._worker else self._reloads.run()
        tasks = [
            reading,
            self._spawn(settings, name="settings"),
            self._spawn(appender.run(), name="appends"),
            self._spawn(site.run(), name="site"),
            self._spawn(heartbeat.run(), name="heartbeat"),
            self._spawn(unused.run(), name="unused-streams"),
            self._spawn(admission.renew(), name="renew"),
            self._spawn(seats.run(), name="seats"),
            self._spawn(incoming.write_dead_letters(client, keys, node), name="dead-letters"),
        ]
        taking = [self._spawn(each.run(), name=f"producer {name}") for name, each in producers]
        tasks += taking
        try:
            # So that the first clients of a start are not refused, unless Redis is really away.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FIRST_READ_S):
                    await reader.wait_ready()
                    await site.wait_open()
            number = self._worker.number if self._worker else None
            port = await server.start(config, self.listeners, number)
            jobs.start()
            if self._worker:
                balance = Balance(self._worker, lambda: hub.total)
                self._on_count.append(lambda _: balance.tell())
                server.balance(balance, self._spawn)
                # Before the supervisor hears that this worker serves, and then again and again.
                self._tell(self._worker, reader, balance)
                beats = self._beat(self._worker, reader, balance)
                tasks.append(self._spawn(beats, name="siblings"))
            if config.insecure:
                _log.warning("INSECURE: anyone may read every channel over SSE and WebSocket")
            tasks.append(self._spawn(garbage.collect_rarely(), name="garbage"))
            self._on_ready(port, redis.url)
            await self._stop.wait()
            _log.info("stopping")
            if self._worker:
                # Siblings get the new clients from here on.
                self._worker.siblings.beat(self._worker.number, ready=False)
            await server.reject_clients()
            for task in taking:
                task.cancel()
            await jobs.stop()
            doors = {name: door for name, door, _ in self._doors}
            async with asyncio.TaskGroup() as leaving:
                leaving.create_task(self._leave_to_siblings(server), name="leave to siblings")
                await drain(hub.sessions(), doors, self._config.node.drain_s)
            await self._stop_listening(server)
            await last_bytes(doors)
            await reader.stop()
            reading.cancel()
            with contextlib.suppress(RelayError):
                await site.presence.leave()
                await heartbeat.leave()
                await seats.leave()
        finally:
            # A start that failed ends the reader too, and that is no news.
            self._stop.set()
            await end_all((*tasks, *self._door_tasks))
            await server.close()

    # ---- parts ------------------------------------------------------------------------------

    def _mount(self, context: DoorContext) -> None:
        for name in protocol_names():
            section = self._config.doors[f"protocol:{name}"]
            if section.is_open:
                mounted = load_door(name).mount(context, section)
                self._doors.append((name, mounted, section))
            elif section.unservable:
                raise StartError(f"[protocol:{name}] {section.unservable}")
            elif not self._check_only:
                _log.info("Protocol %s is disabled: its URLs return 404", name)
        if not self._check_only and not self._config.jwt.key.get_secret_value():
            _log.warning("[jwt] key is empty: tokens are refused")

    def _http_rights(self, config: Config) -> HttpRights | None:
        return HttpRights(config.rights, self._http) if config.rights.http_url else None

    def _namespace(self, channel: Channel) -> NamespaceSettings:
        return self._config.namespace(channel)

    def _not_ready(self, reader: StreamReader) -> str:
        if self._stop.is_set():
            return "this worker is stopping"
        if not reader.ready():
            return "streams are not being read"
        if not reader.settled():
            return "streams are being looked through after a new connection to Redis"
        others = self._worker.siblings.not_ready() if self._worker else []
        return f"worker {', '.join(map(str, others))} is not ready" if others else ""

    async def _beat(self, worker: Worker, reader: StreamReader, balance: Balance) -> None:
        """Tells the other workers of this host, until the order to stop."""
        try:
            while True:
                self._tell(worker, reader, balance)
                await asyncio.sleep(BEAT_S)
        finally:
            worker.siblings.clear(worker.number)

    def _tell(self, worker: Worker, reader: StreamReader, balance: Balance) -> None:
        ready = reader.ready() and reader.settled() and not self._stop.is_set()
        worker.siblings.beat(worker.number, ready=ready)
        worker.siblings.listen(worker.number, open=self._listening)
        balance.beat()

    async def _leave_to_siblings(self, server: Server) -> None:
        """Close the listeners early if only this worker stops, so that clients go to the others."""
        worker = self._worker
        if worker is None:
            return
        # If all were told to stop, they have said by then that they are not ready.
        await asyncio.sleep(2 * BEAT_S)
        if len(worker.siblings.not_ready()) < worker.siblings.count:
            await self._stop_listening(server)

    async def _stop_listening(self, server: Server) -> None:
        worker = self._worker
        if worker and self._listening:
            self._listening = False
            worker.siblings.listen(worker.number, open=False)
            # A sibling may be about to hand a producer's connection over.
            await asyncio.sleep(_HANDED_OVER_S)
        await server.stop_listening()

    def _spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        if self._background is None:
            raise RuntimeError("not running")
        task = self._background.create_task(coroutine, name=name)
        if self._check_only:
            # Cancelled before its first step, it does nothing.
            task.cancel()
        return task

    def _spawn_for_door(
        self, coroutine: Coroutine[Any, Any, None], *, name: str
    ) -> asyncio.Task[None]:
        task = self._spawn(coroutine, name=name)
        self._door_tasks.add(task)
        task.add_done_callback(self._door_tasks.discard)
        return task

    async def _keep_reading(self, reader: StreamReader) -> None:
        """A reader that ends by itself is a bug: better no process than one that only looks up."""
        try:
            await reader.run()
        finally:
            if not self._stop.is_set():
                _log.critical("the reader has ended: stopping")
                self._stop.set()

    # ---- signals ----------------------------------------------------------------------------

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal)
        if self._worker is None:
            loop.add_signal_handler(signal.SIGHUP, self._reloads.ask)
            loop.add_signal_handler(signal.SIGUSR1, logs.reopen)
            release_signals()

    def _on_stop_signal(self) -> None:
        if self._stop.is_set():
            _log.warning("second signal: ending at once")
            os._exit(1)
        self._stop.set()

    async def _obey_supervisor(self) -> None:
        """Carry out the supervisor's messages: a configuration, or to open the log file again."""
        async for message in Worker.messages():
            if message == REOPEN_LOG:
                logs.reopen()
            else:
                # The supervisor's own process made it.
                self._reload(pickle.loads(message))  # noqa: S301

    def _reload(self, config: Config) -> None:
        """Use new namespaces, limits, secrets and log level. They have passed `check`."""
        self._config = config
        self._tokens = TokenReader(config.jwt)
        self._admission.policy.reload(config.namespace, self._http_rights(config))
        self._hub.connections_per_user = config.hub.connections_per_user
        self._seats.limit = config.hub.connections_per_user
        for name, door, _ in self._doors:
            door.reload(config.doors[f"protocol:{name}"])
        logs.set_level(config.log.level)
        self._hub.recheck(None)
        _log.info("reloaded")
