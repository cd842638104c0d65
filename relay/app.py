"""The composition root: builds each part, starts them in order, stops them in reverse.

    Redis ── Reader ── Incoming ── Hub ── doors ── Server
                                    └─ Admission (rights)

Stop: refuse new clients, stop reading, ask the clients to reconnect (spread over `drain_s`), let
their last bytes out, then let go. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import uvloop

from producers.api_queue import QueueProducer
from relay import __version__, logs
from relay.embedded import EmbeddedValkey
from relay.errors import LimitExceeded, RelayError, StartError
from relay.frontdoor import DoorContext, Mounted, find_doors
from relay.hub.hub import Hub
from relay.jobs import Jobs
from relay.metrics import Metrics
from relay.model import parse_channel
from relay.pipeline import Admission, Incoming
from relay.rights.http import HttpRights
from relay.rights.policy import Policy
from relay.rights.token import TokenReader
from relay.server import Server
from relay.stream import dead_letters, entry
from relay.stream import revoke as revocations
from relay.stream.append import Appender
from relay.stream.connect import redis_client
from relay.stream.control_reader import ControlReader
from relay.stream.keys import Keys
from relay.stream.nodes import Heartbeat, new_instance, this_node
from relay.stream.reader import Reader
from relay.transports.listener import raise_open_file_limit

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from relay.config import Config
    from relay.model import Channel, EntryID
    from relay.settings import NamespaceSettings, RedisSettings, Section

_log = logging.getLogger(__name__)

_FIRST_READ_S = 10.0
_LAST_BYTES_S = 2.0


def run(
    config: Config, *, reload: Callable[[], Config], on_ready: Callable[[int, str], None]
) -> int:
    """Serve until a signal; the exit code. StartError in one line if something is missing."""
    raise_open_file_limit()
    with _pid_file(config.node.pid_file):
        return uvloop.run(Relay(config, reload, on_ready).run())


async def revoke(redis: RedisSettings, channel_name: str, user: str) -> str:
    """Write the revocation; the ID of its entry, after which nothing leaves for `user`."""
    channel = parse_channel(channel_name)
    async with redis_client(redis) as client:
        return str(await revocations.revoke(client, Keys(redis.prefix), channel, user))


class Relay:
    """One process at work."""

    def __init__(
        self,
        config: Config,
        reload: Callable[[], Config],
        on_ready: Callable[[int, str], None],
    ) -> None:
        self._config = config
        self._load_again = reload
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._metrics = Metrics()
        self._background: asyncio.TaskGroup | None = None
        self._doors: list[tuple[str, Mounted, Section]] = []
        self._tokens = TokenReader(config.jwt)
        self._http_session: aiohttp.ClientSession | None = None

    async def run(self) -> int:
        """Start, serve, stop."""
        async with contextlib.AsyncExitStack() as stack:
            self._handle_signals()
            redis = await self._redis(stack)
            client = await stack.enter_async_context(redis_client(redis))
            self._background = await stack.enter_async_context(asyncio.TaskGroup())
            self._http_session = await stack.enter_async_context(
                aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
            )
            await self._serve(redis, client)
        return 0

    async def _serve(self, redis: RedisSettings, client: Redis) -> None:
        config, metrics = self._config, self._metrics
        node = config.node.name or f"{socket.gethostname()}_{config.server.port}"
        instance = new_instance(node)
        keys = Keys(redis.prefix)
        policy = Policy(config.namespace, self._http_rights(config))
        self._admission = admission = Admission(policy, self._spawn)
        incoming = Incoming(metrics=metrics, max_entry_bytes=config.stream.max_entry_bytes)
        reader = Reader(
            keys=keys,
            instance=instance,
            redis=redis,
            settings=config.stream,
            metrics=metrics,
            decode=incoming.decode,
            on_records=incoming.deliver,
            on_turn=lambda: hub.flush(),
            decode_ephemeral=incoming.decode_ephemeral,
            control=ControlReader(keys, admission.obey, admission.control_lost),
        )
        loop = asyncio.get_running_loop()
        self._hub = admission.hub = hub = Hub(
            reads=reader,
            rights=admission,
            metrics=metrics,
            call_soon=loop.call_soon,
            waits_for_replicas=lambda channel: self._namespace(channel).wait_replicas > 0,
            connections_per_user=config.hub.connections_per_user,
        )
        appender = Appender(
            keys=keys, redis=redis, settings=config.publish, namespace_of=self._namespace
        )
        metrics.behind.set_function(lambda: sum(feed.behind_count for feed in hub.feeds()))
        context = DoorContext(
            hub=hub,
            subscribe=admission.subscribe,
            publish=self._publishing(appender),
            read_token=lambda token: self._tokens.read(token),
            ready=reader.ready,
            metrics=metrics,
            client_buffer_bytes=config.hub.client_buffer_bytes,
            insecure=config.insecure,
        )
        self._mount(context)
        heartbeat = Heartbeat(client=client, keys=keys, node=this_node(node, instance, __version__))
        jobs = Jobs(
            client=client,
            keys=keys,
            instance=instance,
            settings=config.jobs,
            namespace_of=self._namespace,
        )
        queue = self._queue(redis, keys, instance) if config.queue.enabled else None
        server = Server(metrics=metrics, ready=lambda: self._not_ready(reader))
        reading = self._spawn(self._keep_reading(reader), name="reader")
        tasks = [
            reading,
            self._spawn(appender.run(), name="appends"),
            self._spawn(heartbeat.run(), name="heartbeat"),
            self._spawn(admission.renew(), name="renew"),
            self._spawn(
                self._write_dead_letters(incoming, client, keys, node), name="dead-letters"
            ),
        ]
        if queue is not None:
            tasks.append(self._spawn(queue.run(), name="queue"))
        try:
            # So that the first clients of a start are not refused, unless Redis is really away.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FIRST_READ_S):
                    await reader.wait_ready()
            port = await server.start(
                config.server, config.metrics, [(door, section) for _, door, section in self._doors]
            )
            jobs.start()
            if config.insecure:
                _log.warning("INSECURE: anyone may read every channel of the native door")
            self._on_ready(port, redis.url)
            await self._stop.wait()
            _log.info("stopping")
            await server.stop_listening()
            if queue is not None:
                tasks.pop().cancel()
            await jobs.stop()
            await reader.stop()
            reading.cancel()
            await self._drain(hub)
            with contextlib.suppress(RelayError):
                await heartbeat.leave()
        finally:
            for task in tasks:
                task.cancel()
            await server.close()

    # ---- parts ------------------------------------------------------------------------------

    async def _redis(self, stack: contextlib.AsyncExitStack) -> RedisSettings:
        """Where Redis is; the embedded one is started first and stopped last."""
        settings = self._config.redis
        if settings.url != "embedded":
            return settings
        folder = Path(settings.embedded_dir or "data")
        embedded = EmbeddedValkey(folder, settings.embedded_port)
        await embedded.start()
        stack.push_async_callback(embedded.stop)
        await stack.enter_async_context(_task(embedded.supervise()))
        return settings.model_copy(update={"url": f"redis://127.0.0.1:{settings.embedded_port}/0"})

    def _mount(self, context: DoorContext) -> None:
        for name, door in find_doors().items():
            section = self._config.doors[f"protocol:{name}"]
            mounted = door.mount(context, section)
            if mounted is None:
                _log.info("door %s is shut", name)
            else:
                self._doors.append((name, mounted, section))
        if not self._config.jwt.key.get_secret_value():
            _log.warning("[jwt] key is empty: tokens are refused")

    def _publishing(
        self, appender: Appender
    ) -> Callable[[Channel, bytes, str | None, str | None], asyncio.Future[EntryID]]:
        limit = self._config.stream.max_entry_bytes

        def publish(
            channel: Channel, data: bytes, client: str | None, uid: str | None
        ) -> asyncio.Future[EntryID]:
            fields = entry.encode(data, client=client, uid=uid)
            if entry.size(fields) > limit:
                raise LimitExceeded(f"too large: {entry.size(fields)} of {limit} bytes")
            return appender.append(channel, fields, uid)

        return publish

    def _queue(self, redis: RedisSettings, keys: Keys, instance: str) -> QueueProducer:
        config, counter = self._config, self._metrics.queue_commands

        def on_applied(taken: int, broken: int) -> None:
            counter.labels("taken").inc(taken)
            counter.labels("broken").inc(broken)

        return QueueProducer(
            keys=keys,
            redis=redis,
            settings=config.queue,
            publish=config.publish,
            instance=instance,
            namespace_of=self._namespace,
            max_entry_bytes=config.stream.max_entry_bytes,
            on_applied=on_applied,
        )

    def _http_rights(self, config: Config) -> HttpRights | None:
        if not config.rights.http_url or self._http_session is None:
            return None
        return HttpRights(config.rights, self._http_session)

    def _namespace(self, channel: Channel) -> NamespaceSettings:
        return self._config.namespace(channel)

    @staticmethod
    def _not_ready(reader: Reader) -> str:
        return "" if reader.ready() else "streams are not being read"

    def _spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        if self._background is None:
            raise RuntimeError("not running")
        return self._background.create_task(coroutine, name=name)

    async def _keep_reading(self, reader: Reader) -> None:
        """A reader that ends by itself is a bug: better no process than one that only looks up."""
        try:
            await reader.run()
        finally:
            if not self._stop.is_set():
                _log.critical("the reader has ended: stopping")
                self._stop.set()

    async def _write_dead_letters(
        self, incoming: Incoming, client: Redis, keys: Keys, node: str
    ) -> None:
        while True:
            channel, broken = await incoming.dead_letters.get()
            try:
                await dead_letters.write(client, keys, channel, broken, node=node)
            except RelayError as exc:
                _log.warning("dead letter %s of %s is not written: %s", broken.id, channel, exc)

    # ---- signals ----------------------------------------------------------------------------

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload_signal)
        loop.add_signal_handler(signal.SIGUSR1, logs.reopen)

    def _on_stop_signal(self) -> None:
        if self._stop.is_set():
            _log.warning("second signal: ending at once")
            os._exit(1)
        self._stop.set()

    def _on_reload_signal(self) -> None:
        """New namespaces, limits, secrets and log level; a bad file changes nothing."""
        try:
            config = self._load_again()
            tokens = TokenReader(config.jwt)
            http = self._http_rights(config)
        except RelayError as exc:
            _log.error("not reloaded, the old settings stay: %s", exc)  # no bug
            return
        self._config = config
        self._tokens = tokens
        self._admission.policy.reload(config.namespace, http)
        self._hub.connections_per_user = config.hub.connections_per_user
        for name, door, _ in self._doors:
            door.reload(config.doors[f"protocol:{name}"])
        logs.set_level(config.log.level)
        self._hub.recheck(None)
        _log.info("reloaded")

    async def _drain(self, hub: Hub) -> None:
        """Asks every client to come back elsewhere, not all in one moment."""
        sessions = hub.sessions()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for index, session in enumerate(sessions):
            session.client.disconnect("stopping")
            due = begun + self._config.node.drain_s * (index + 1) / len(sessions)
            if len(sessions) > 1 and index % 16 == 15 and due > loop.time():
                await asyncio.sleep(due - loop.time())
        if sessions:
            # Sockets that have not taken their last bytes by then are cut.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_BYTES_S):
                    for _, door, _ in self._doors:
                        await door.closed()
            _log.info("%d clients asked to reconnect", len(sessions))


@contextlib.asynccontextmanager
async def _task(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(coroutine, name="embedded Valkey")
        yield
        task.cancel()


@contextlib.contextmanager
def _pid_file(path: str) -> Any:
    if not path:
        yield
        return
    file = Path(path)
    try:
        file.write_text(f"{os.getpid()}\n")
    except OSError as exc:
        raise StartError(f"[node] pid_file: {path} cannot be written: {exc.strerror}") from exc
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
