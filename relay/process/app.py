"""One relay process: start all parts, serve until a signal, stop.

Steps of a stop:

1. Answer `/readyz` with 503, so that balancers send new clients elsewhere. Serve everybody until
   no client has connected for a second, at most 5 s and at most `drain_s`.
2. Reject new clients, but serve producers. Ask the clients to reconnect, `drain_per_s` in each
   second. Each is served until then.
3. Close the listeners and answer the last requests of producers.
4. Wait up to 2 s until the clients' sockets are closed, and stop reading.
5. Cancel the remaining tasks.

No step waits longer than 2 s for Redis, so that a frozen Redis does not delay the stop. A second
signal ends the process immediately.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import uvloop
from pydantic import SecretStr

from relay.core.errors import RedisUnavailable, RelayError, StartError
from relay.core.metrics import Metrics
from relay.core.worker_memory import DIED, HANDED_OVER, REOPEN_LOG, SEND_SOCKETS, Worker
from relay.process import logs
from relay.process.addresses import check_inherited
from relay.process.composition import Foundation, Parts, build, http_rights, section_of
from relay.process.doctor.at_start import log_faults
from relay.process.drain import at_most, drain, wait_closed, wait_for_silence
from relay.process.embedded import (
    EmbeddedValkey,
    lock_path,
    private_folder,
    redis_address,
    running_valkey,
)
from relay.process.handover import (
    PID_FILE,
    VALKEY,
    Inheritance,
    Upgrades,
    inheritance,
    send_sockets,
    wait_started,
)
from relay.process.internal_address import open_internal
from relay.process.pid_file import pid_file, write_error
from relay.process.reloading import Reloads
from relay.process.server import Listening, node_name
from relay.process.service_manager import notify
from relay.process.start_signals import STOP_SIGNALS, release_signals
from relay.process.tracing import tracing
from relay.stream.cluster.workers import check_schema
from relay.stream.connection.cancellation import end_all
from relay.stream.connection.connect import change_password, url_of
from relay.stream.connection.failovers import watch_failovers
from relay.stream.shards.clients import ShardClients, shard_clients
from relay.stream.shards.making import keys_of
from relay.stream.shards.server_list import check_list, check_same_servers
from relay.stream.write.confirmations import check_namespaces
from relay.transports.socket.inherited import InheritedSocket
from relay.transports.socket.listener import raise_open_file_limit

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.config.settings import NamespaceSettings, RedisSettings, Section
    from relay.core.model import Channel
    from relay.doorkit.contract import Mounted
    from relay.process.doctor.finding import Finding

_log = logging.getLogger(__name__)

_FIRST_READ_S = 10.0
# At an upgrade, further time until Redis is being read.
_UPGRADE_S = 10.0
_LOOK_S = 0.1
# A balancer that checks health every second removes this relay. If clients still arrive, it needs
# longer.
_NOTICED_S, _LAST_CLIENTS_S = 1.0, 5.0
# A Redis that answers needs far less.
_REDIS_S = 2.0


def run(
    config: Config,
    *,
    reload: Callable[[], Config],
    on_ready: Callable[[int, str], None],
    worker: Worker | None = None,
) -> int:
    """Serve until a signal and return the exit code. StartError if a requirement is missing.

    A `worker` shares its ports with other workers. The supervisor runs the embedded Valkey and
    writes the pid file for all of them.
    """
    raise_open_file_limit()
    inherited = Inheritance.of_worker(worker) if worker else inheritance()
    path = "" if worker else config.node.pid_file
    with pid_file(path, inherited.file(PID_FILE, Path(path))) as file:
        if file is not None:
            inherited.files[PID_FILE] = file
        return uvloop.run(Relay(config, reload, on_ready, worker, inheritance=inherited).run())


def check(config: Config) -> list[Listening]:
    """Build all parts without starting them; return the listeners that `run` would open.

    Raises the ConfigError or StartError that `run` would raise for the same configuration. It opens
    no connection and may be called from any thread.
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


class Relay:
    """A relay process from start to stop."""

    def __init__(
        self,
        config: Config,
        reload: Callable[[], Config],
        on_ready: Callable[[int, str], None],
        worker: Worker | None = None,
        *,
        inheritance: Inheritance | None = None,
        check_only: bool = False,
    ) -> None:
        """`check_only`: `run` returns once all parts are built; see `check`."""
        self._inheritance = inheritance or Inheritance()
        self._is_handed_over = False
        self._has_sent_sockets = False
        self._valkey: EmbeddedValkey | None = None
        self._config = config
        self._check_only = check_only
        self.listeners: list[Listening] = []
        self._reload = reload
        self._on_ready = on_ready
        self._worker = worker
        self._stop = asyncio.Event()
        self._stop_signals = 0
        # The task of `run` until this relay serves. A stop signal cancels it.
        self._starting: asyncio.Task[int] | None = None
        self._has_started = asyncio.Event()
        self._announcing: asyncio.Task[None] | None = None
        self._background: asyncio.TaskGroup | None = None
        self._door_tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Build, start, serve, stop. Return the exit code."""
        if self._check_only:
            return await self._build_and_serve()
        self._handle_stop_signals()
        self._starting = asyncio.get_running_loop().create_task(self._build_and_serve())
        try:
            return await self._starting
        except asyncio.CancelledError:
            if not self._stop.is_set():
                raise
            _log.info("Stopped during the start")
            return 0

    async def _build_and_serve(self) -> int:
        config, redis = self._config, redis_address(self._config.redis)
        async with contextlib.AsyncExitStack() as stack:
            if not self._check_only and self._worker is None:
                lock = self._inheritance.file(VALKEY, lock_path(config.redis))
                self._valkey = await stack.enter_async_context(running_valkey(config.redis, lock))
            clients = operators = await stack.enter_async_context(shard_clients(redis))
            if url := config.console.redis_url.get_secret_value():
                operator = redis.model_copy(update={"url": url, "password": SecretStr("")})
                with url_of("[console] redis_url"):
                    operators = await stack.enter_async_context(shard_clients(operator))
                check_same_servers(clients, operators, "[console] redis_url")
            if not self._check_only:
                check = _check_redis(clients, redis, config.namespaces)
                checking = asyncio.get_running_loop().create_task(check)
                try:
                    await asyncio.wait({checking})
                finally:
                    await end_all({checking})
                checking.result()
                if config.redis.url != "embedded" and (
                    self._worker is None or self._worker.number == 1
                ):
                    await log_faults(config, clients)
            self._background = await stack.enter_async_context(asyncio.TaskGroup())
            http = await stack.enter_async_context(
                aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
            )
            foundation = Foundation(
                config=config,
                redis=redis,
                clients=clients,
                operators=operators,
                current_config=lambda: self._config,
                examine=lambda: self._examine(clients, redis),
                http=http,
                tracing=tracing(config.tracing, node_name(config), check_only=self._check_only),
                metrics=_metrics(self._worker),
                worker=self._worker,
                namespace_of=self._namespace,
                is_stopping=self._stop.is_set,
                spawn=self._spawn,
                spawn_for_protocol=self._spawn_for_protocol,
            )
            parts = build(foundation)
            doors: list[tuple[str, Mounted, Section]] = [
                (f"protocol:{name}", door, section_of(config, name))
                for name, door in parts.doors.items()
            ]
            doors.append(("console", parts.console, config.console))
            self.listeners = parts.server.plan(config, doors)
            if self._worker is None:
                check_inherited(config, self.listeners, self._inheritance)
            if not self._check_only:
                await self._serve(foundation, parts)
        return 0

    async def _serve(self, base: Foundation, parts: Parts) -> None:
        reloads = Reloads(
            self._reload, lambda: self._config, lambda config: self._apply(config, base, parts)
        )
        upgrades = self._upgrades(parts)
        self._handle_other_signals(reloads, upgrades)
        self._log_disabled(parts)
        parts.freezes.start()
        reading = self._spawn(self._keep_reading(parts), name="reader")
        producers = [
            self._spawn(each.run(), name=f"producer {name}")
            for name, each in parts.producers.items()
        ]
        tasks = [reading, *producers, *self._start_tasks(base, parts, reloads)]
        upgrading = self._spawn(upgrades.run(), name="upgrades")
        tasks.append(upgrading)
        try:
            await self._start(base, parts)
            self._starting = None
            self._has_started.set()
            with parts.collections:
                await self._stop.wait()
                if self._is_handed_over and self._worker is None:
                    await asyncio.wait({upgrading})
                else:
                    # A relay that is being started must not take over.
                    await end_all({upgrading})
                if not self._is_handed_over:
                    if self._worker is None:
                        notify(STOPPING=1)
                    _log.info("Received a stop signal; stopping")
                await self._leave(parts, producers, reading)
        finally:
            # Don't log the reader's exit when startup has failed.
            self._stop.set()
            tasks += [self._announcing] if self._announcing else []
            await end_all((*tasks, *self._door_tasks))
            if parts.listeners:
                parts.listeners.clear()
            parts.freezes.stop()
            parts.internal.stop()
            await parts.server.close()
            if base.tracing is not None:
                await base.tracing.close()

    # ---- start ------------------------------------------------------------------------------

    def _start_tasks(
        self, base: Foundation, parts: Parts, reloads: Reloads
    ) -> list[asyncio.Task[None]]:
        settings = self._follow_supervisor(base, parts) if self._worker else reloads.run()
        dead_letters = parts.incoming.write_dead_letters(base.clients, parts.keys, parts.node)
        return [
            self._spawn(settings, name="settings"),
            self._spawn(parts.appender.run(), name="appends"),
            self._spawn(parts.cluster.run(), name="cluster services"),
            self._spawn(parts.journal.run(), name="journal"),
            self._spawn(parts.unused.run(), name="unused streams"),
            self._spawn(watch_failovers(base.redis), name="failovers"),
            self._spawn(parts.limiter.run(), name="connection limits"),
            self._spawn(dead_letters, name="dead letters"),
            self._spawn(parts.jobs.run(), name="periodic jobs"),
        ]

    async def _start(self, base: Foundation, parts: Parts) -> None:
        """Open the listeners."""
        # Wait for the first read so that early clients are not rejected while Redis is reachable.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_READ_S):
                await parts.reader.wait_ready()
                await parts.cluster.wait_open()
                await parts.cluster.measure(base.metrics.clock)
        if self._is_upgrade:
            await self._wait_replacing(base, parts)
        number = self._worker.number if self._worker else None
        inherited = self._inheritance.sockets
        address = await open_internal(
            parts.internal, base.config.node, base.clients.shards, number, inherited
        )
        # Now, because the first client's next request may reach a worker of another host.
        await parts.heartbeat.publish_internal(address)
        port = await parts.server.start(base.config, self.listeners, number, inherited)
        if parts.listeners:
            # Do this before reporting to the supervisor that this worker is ready.
            parts.listeners.start(self._spawn)
        if base.config.insecure:
            _log.warning("INSECURE: anyone may read every channel over SSE and WebSocket")
        await self._inheritance.take_over(self._config.node.pid_file)
        if self._valkey is not None:
            self._valkey.take_over()
        reason = parts.not_ready()
        if not reason:
            self._on_ready(port, base.redis.url)
            return
        _log.warning("Listening, but not ready: %s", reason)
        announce = self._announce(parts, port, base.redis.url)
        self._announcing = self._spawn(announce, name="announce")

    @staticmethod
    async def _wait_replacing(base: Foundation, parts: Parts) -> None:
        """Wait until this relay serves as well as the one that it replaces.

        With several servers, those that cannot be reached do not prevent an upgrade. Raise
        StartError if nothing can be served: the other relay then continues.
        """
        try:
            async with asyncio.timeout(_UPGRADE_S):
                while parts.not_ready():  # noqa: ASYNC110  # as in `_announce`
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            names = ", ".join(shard.name for shard in base.clients.shards.shards)
            problem = parts.reader.problem() or f"Redis at {names} cannot be read"
            raise StartError(f"the new relay is not ready: {problem}") from None

    async def _announce(self, parts: Parts, port: int, redis_url: str) -> None:
        """Report that this process is ready as soon as it is."""
        while parts.not_ready():  # noqa: ASYNC110  # the parts have no common event
            await asyncio.sleep(_LOOK_S)
        self._on_ready(port, redis_url)

    def _log_disabled(self, parts: Parts) -> None:
        for name in self._config.doors:
            door = name.removeprefix("protocol:")
            if door not in parts.doors:
                _log.info("Protocol %s is disabled: its URLs return 404", door)
        if not self._config.jwt.key.get_secret_value():
            _log.warning("[jwt] key is not set: native tokens are rejected")

    async def _keep_reading(self, parts: Parts) -> None:
        """Read streams. Stop the process if the reader ends: it could no longer deliver events."""
        try:
            await parts.reader.run()
        finally:
            if not self._stop.is_set():
                _log.critical("Stream reader stopped unexpectedly; shutting down")
                self._stop.set()

    # ---- stop -------------------------------------------------------------------------------

    async def _leave(
        self, parts: Parts, producers: list[asyncio.Task[None]], reading: asyncio.Task[None]
    ) -> None:
        if parts.listeners:
            parts.listeners.leave()
        for task in producers:
            task.cancel()
        node = self._config.node
        async with asyncio.TaskGroup() as leaving:
            releasing = at_most(_REDIS_S, parts.jobs.leave(), "release the leases of its jobs")
            leaving.create_task(releasing, name="leases")
            if parts.listeners:
                leaving.create_task(parts.listeners.close_if_others_serve(), name="listeners")
            if not self._is_handed_over:
                await wait_for_silence(
                    lambda: parts.hub.opened,
                    min(_NOTICED_S, node.drain_s),
                    min(_LAST_CLIENTS_S, node.drain_s),
                )
            await parts.server.reject_clients()
            await drain(
                parts.hub.sessions(),
                parts.doors,
                per_s=node.drain_per_s / node.workers,
                limit_s=node.drain_s,
            )
        await (parts.listeners.close() if parts.listeners else parts.server.stop_listening())
        await wait_closed(parts.doors)
        await at_most(_REDIS_S, self._sign_off(parts), "sign off")
        reading.cancel()

    @staticmethod
    async def _sign_off(parts: Parts) -> None:
        """Remove what this worker has stored about itself in Redis."""
        await parts.reader.stop()
        await parts.journal.flush()
        with contextlib.suppress(RelayError):
            await parts.cluster.presence.leave()
            await parts.heartbeat.leave()
            await parts.limiter.leave()

    # ---- tasks ------------------------------------------------------------------------------

    def _spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        if self._background is None:
            raise RuntimeError("not running")
        try:
            task = self._background.create_task(coroutine, name=name)
        except RuntimeError:
            # A task has failed, and the relay is ending.
            coroutine.close()
            return asyncio.get_running_loop().create_task(asyncio.sleep(0), name=name)
        if self._check_only:
            # A task that is cancelled before its first step never runs.
            task.cancel()
        return task

    def _spawn_for_protocol(
        self, coroutine: Coroutine[Any, Any, None], *, name: str
    ) -> asyncio.Task[None]:
        task = self._spawn(coroutine, name=name)
        self._door_tasks.add(task)
        task.add_done_callback(self._door_tasks.discard)
        return task

    # ---- signals and settings ---------------------------------------------------------------

    def _handle_stop_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_stop_signal)
        release_signals(only_stop=True)

    def _handle_other_signals(self, reloads: Reloads, upgrades: Upgrades) -> None:
        loop = asyncio.get_running_loop()
        if self._worker is None:
            loop.add_signal_handler(signal.SIGHUP, reloads.request)
            loop.add_signal_handler(signal.SIGUSR1, logs.reopen)
            loop.add_signal_handler(signal.SIGUSR2, upgrades.request)
            release_signals()

    @property
    def _is_upgrade(self) -> bool:
        """Whether another relay serves until this one is ready."""
        return self._worker.is_upgrade if self._worker else self._inheritance.is_upgrade

    def _upgrades(self, parts: Parts) -> Upgrades:
        async def sockets() -> list[InheritedSocket]:
            await wait_started(self._has_started)
            return self._sockets(parts)

        def handed_over(used: set[str]) -> None:
            if self._valkey is not None and VALKEY in used:
                self._valkey.hand_over()
            self._hand_over(parts)

        return Upgrades(
            sockets=sockets,
            files=lambda: self._inheritance.locked(self._valkey),
            handed_over=handed_over,
            pid_file=self._config.node.pid_file,
        )

    def _sockets(self, parts: Parts) -> list[InheritedSocket]:
        # While a restarted worker starts, it has no sockets yet.
        self._has_sent_sockets = self._has_started.is_set()
        # A port that the system has chosen is different for each worker and each start.
        internal = [
            InheritedSocket(socket.socket(fileno=os.dup(each.fileno())))
            for each in parts.internal.sockets
        ]
        return [*parts.server.sockets(), *internal]

    def _hand_over(self, parts: Parts) -> None:
        """Stop: another relay has the listening sockets."""
        self._is_handed_over = True
        # A worker that was restarted during the upgrade has sockets that only it can serve.
        if self._has_sent_sockets:
            parts.server.hold()
        parts.internal.stop()
        self._stop.set()

    def _on_stop_signal(self) -> None:
        self._stop_signals += 1
        if self._stop_signals > 1:
            _log.warning("Received a second stop signal; exiting immediately")
            os._exit(1)
        self._stop.set()
        if self._starting is not None:
            self._starting.cancel()

    async def _follow_supervisor(self, base: Foundation, parts: Parts) -> None:
        """Apply each configuration that the supervisor sends; reopen the log file on request."""
        async for message in Worker.messages():
            if message == REOPEN_LOG:
                logs.reopen()
            elif message == SEND_SOCKETS and self._worker and self._worker.upward:
                try:
                    send_sockets(self._worker.upward, self._sockets(parts))
                except OSError as exc:
                    # The supervisor reports that the upgrade failed.
                    _log.error(
                        "Could not send the listening sockets for the upgrade: %s", exc.strerror
                    )
            elif message == HANDED_OVER:
                self._hand_over(parts)
            elif message.startswith(DIED):
                parts.deaths.report(message.removeprefix(DIED).decode())
            else:
                # The data is from relay's own supervisor process.
                self._apply(pickle.loads(message), base, parts)  # noqa: S301

    async def _examine(self, clients: ShardClients, redis: RedisSettings) -> list[Finding]:
        """Return the findings of the doctor, which builds a relay itself."""
        from relay.process.doctor.examination import examine

        return await examine(self._config, clients, keys_of(redis))

    def _namespace(self, channel: Channel) -> NamespaceSettings:
        return self._config.namespace(channel)

    def _apply(self, config: Config, base: Foundation, parts: Parts) -> None:
        """Use new settings that have passed `check`: namespaces, limits, secrets and log level."""
        change_password(self._config.redis.password, config.redis.password)
        self._config = config
        parts.tokens.reload(config.jwt)
        parts.rights.policy.reload(config.namespace, http_rights(config, base.http))
        parts.hub.connections_per_user = config.hub.connections_per_user
        parts.limiter.limit = config.hub.connections_per_user
        for name, door in parts.doors.items():
            door.reload(section_of(config, name))
        parts.console.reload(config.console)
        logs.set_level(config.log.level)
        parts.hub.recheck(None)
        _log.info("Configuration reloaded")


async def _check_redis(
    clients: ShardClients, settings: RedisSettings, namespaces: Mapping[str, NamespaceSettings]
) -> None:
    """Raise StartError if this version of relay cannot use the servers, or not at this time."""
    await clients.check()
    with contextlib.suppress(RedisUnavailable):
        await check_list(clients, keys_of(settings))
    await check_schema(clients.home, keys_of(settings))
    with contextlib.suppress(RedisUnavailable):
        for _, client in await clients.each():
            await check_namespaces(client, namespaces)


def _metrics(worker: Worker | None) -> Metrics:
    return Metrics(worker.memory) if worker else Metrics()
