"""The HTTP listeners: protocols on the shared listener or their own, health and metrics."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from aiohttp import web

from relay.core.errors import StartError
from relay.core.reasons import Reason
from relay.process.addresses import ALIVE, HEALTH_PATH, METRICS_PORT, hosts_of, listen_error
from relay.transports.socket.handshakes import Handshakes
from relay.transports.socket.http_connection import KEEPALIVE_S, ConnectionLimits, OnRejected
from relay.transports.socket.listener import GuardedSite
from relay.transports.socket.precedence import FallbackRoute, in_order, without_repeated
from relay.transports.socket.take_over import drop

if TYPE_CHECKING:
    from aiohttp.typedefs import Middleware

    from relay.config.loading import Config
    from relay.config.settings import Section, ServerSettings
    from relay.core.client_address import TrustedProxies
    from relay.core.metrics import Metrics
    from relay.doorkit.contract import Mounted
    from relay.transports.between_workers.balance import Balance, PassedConnection
    from relay.transports.between_workers.forwarder import Forwarder
    from relay.transports.between_workers.internal import Introduction
    from relay.transports.socket.http_connection import HttpConnection
    from relay.transports.socket.inherited import InheritedSocket, InheritedSockets

_FIRST_BYTES_S, _CHECKS = 0.2, 20
_SHUTDOWN_S = 3.0
_LAST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Listening:
    """One configured listener. `setting` is the name of its port setting. `producers` are the
    routes that are served until the end of a stop."""

    host: str
    port: int
    setting: str
    routes: Sequence[web.AbstractRouteDef]
    producers: Sequence[web.AbstractRouteDef]
    tls: ssl.SSLContext | None

    @property
    def name(self) -> str:
        """The name for systemd's FileDescriptorName: server, metrics or the protocol.

        Further listeners of a protocol have its name and their setting, such as pydio-private_port.
        """
        section, _, key = self.setting.partition("] ")
        name = section.removeprefix("[").removeprefix("protocol:")
        return name if key == "port" else f"{name}-{key}"


class Server:
    """Opens and closes the listeners."""

    def __init__(
        self,
        *,
        metrics: Metrics,
        exposition: Callable[[], Awaitable[bytes]],
        middlewares: Sequence[Middleware] = (),
        ready: Callable[[], str],
        limits: Callable[[], str] = lambda: "",
        on_rejected: OnRejected = lambda *_: None,
        proxies: TrustedProxies | None = None,
    ) -> None:
        """Create a server without listeners.

        `exposition` returns the metrics of this host in the text format of Prometheus.
        `middlewares` handle all requests. `ready`
        returns the reason why this worker is not ready, or ''. `limits` describes functions that
        do not work although events are delivered, or ''. `on_rejected` is called for each error
        answer. `proxies` are those in front of relay.
        """
        self._limits = limits
        self._scrape = exposition
        self._middlewares = list(middlewares)
        self._ready = ready
        self._runners: list[web.AppRunner] = []
        self._sites: list[GuardedSite] = []
        # By site: the routes that stay open at a stop, and the runner that then serves them.
        self._lasting: list[Sequence[web.AbstractRouteDef]] = []
        self._last: list[web.AppRunner] = []
        self._balance: Balance | None = None
        # Set before `start`.
        self.forwarder: Forwarder | None = None
        # Every site with its setting. Unlike `_sites`, it keeps those that are closed.
        self._all: list[tuple[GuardedSite, str]] = []
        handshakes = Handshakes(
            # The protocol is not known yet.
            count_rejected=partial(metrics.rejected, "unknown", Reason.OVERLOADED)
        )
        metrics.handshakes.set_function(lambda: len(handshakes))
        self._connections = ConnectionLimits(
            handshakes=handshakes, on_rejected=on_rejected, proxies=proxies
        )

    def plan(
        self, config: Config, doors: Sequence[tuple[str, Mounted, Section]]
    ) -> list[Listening]:
        """Return all listeners in the order in which they open, the shared one first.

        `doors` are the protocols and the console, by the names of their sections.

        Raises:
            StartError: Two listeners need the same port, or a certificate cannot be loaded.
        """
        server = config.server
        shared = [
            route for _, door, section in doors if not _own_port(section) for route in door.routes
        ]
        health = [
            web.get(HEALTH_PATH, self._healthz),
            web.get("/readyz", self._readyz),
            web.get("/metrics", self._exposition),
        ]
        producers = [
            route
            for _, door, section in doors
            if not _own_port(section)
            for route in door.producers
        ]
        if not config.metrics.port:
            shared += health
            # Balancers must see that this relay stops before its port is closed.
            producers += health
        tls = _tls(server.tls_cert, server.tls_key, "[server]")
        found = [Listening(server.host, server.port, "[server] port", shared, producers, tls)]
        for name, door, section in doors:
            label = f"[{name}]"
            if _own_port(section):
                cert, key = (str(getattr(section, name, "")) for name in ("tls_cert", "tls_key"))
                own = _tls(cert, key, label)
                host, port = _own_address(server, section)
                routes = door.routes, door.producers
                found.append(Listening(host, port, f"{label} port", *routes, own or tls))
            for each in door.listeners:
                setting = f"{label} {_port_setting(section, each.port)}"
                own = _tls(each.tls_cert, each.tls_key, label) or tls
                own = None if each.plain else own
                host = each.host or server.host
                routes = each.routes, each.producers
                found.append(Listening(host, each.port, setting, *routes, own))
        if config.metrics.port:
            # Without TLS: the listener is meant for a scraper or probe on the same host.
            host, port = config.metrics.host, config.metrics.port
            found.append(Listening(host, port, METRICS_PORT, health, health, None))
        _check_ports(config, found)
        return found

    async def start(
        self,
        config: Config,
        listeners: Sequence[Listening],
        worker: int | None,
        inherited: InheritedSockets,
    ) -> int:
        """Open the listeners and return the port of the shared one.

        `worker` is the number of this worker if other processes listen on the same ports. Each
        worker then has its own metrics listener, on the ports from [metrics] port on.

        Raises:
            StartError: A listener cannot be opened.
        """
        for each in listeners:
            port = each.port
            shared = worker is not None
            if worker is not None and each.setting == METRICS_PORT:
                port, shared = port + worker - 1, False
            try:
                await self._listen(each, port, reuse_port=shared, inherited=inherited)
            except OSError as exc:
                raise StartError(listen_error(config, each, exc, port)) from exc
        for left in inherited.left:
            # A listener of an earlier configuration, or one that another worker serves.
            left.socket.close()
        return self._sites[0].port

    def sockets(self) -> list[InheritedSocket]:
        """Return duplicates of all listening sockets, for another process."""
        return [each for site, _ in self._all for each in site.sockets]

    def hold(self) -> None:
        """From now on another process has the sockets: connections in their queues are its own."""
        for site in self._sites:
            site.held = True

    def balance(self, balance: Balance, spawn: Callable[..., object]) -> None:
        """Share connections to the shared listener with the other workers of this host.

        TLS connections are not shared, because other workers do not have their session keys.
        """
        site = self._sites[0]
        self._balance = balance
        if not site.tls:
            site.give = balance.give

        def take(passed: PassedConnection) -> None:
            # Requests for sessions of this worker arrive until it has ended.
            if passed.listener < len(self._all if passed.early else self._sites):
                adopting = self._all[passed.listener][0].adopt(
                    passed.connection, passed.early, hops=passed.hops, peer=passed.peer
                )
                spawn(adopting, name="adopt")
            else:
                passed.connection.close()

        balance.receive(take)

    async def forward(
        self, request: web.Request, owner: str, limit_bytes: int
    ) -> web.StreamResponse | None:
        """Let the worker with the address `owner` handle the request, if there is one.

        This is `relay.transports.between_workers.forwarder.Forward`.
        """
        if self.forwarder is None:
            return None
        return await self.forwarder.forward(request, owner, limit_bytes)

    def listener_of(self, request: web.Request) -> tuple[int, str] | None:
        """Return the index and the setting of the listener that the request came to."""
        listener = cast("HttpConnection", request.protocol).factory.listener
        for index, (site, setting) in enumerate(self._all):
            if site is listener:
                return index, setting
        return None

    def take_internal(
        self, transport: asyncio.Transport, introduction: Introduction, early: bytes
    ) -> bool:
        """Serve a request that a worker of another host has passed on."""
        for site, setting in self._all:
            if setting == introduction.listener:
                hops, peer = introduction.hops, introduction.peer
                return site.adopt_open(transport, early, hops=hops, peer=peer)
        return False

    async def gather(self, request: web.Request) -> web.StreamResponse | None:
        """Let one worker of this host handle the request. Return None if it is this worker."""
        return None if self.forwarder is None else await self.forwarder.gather(request)

    async def reject_clients(self) -> None:
        """Accept only producers and health checks from now on.

        Listeners that have no producers are closed, and those whose queue another process serves.
        """
        for site, routes in zip(self._sites, self._lasting, strict=True):
            site.make_handler.is_stopping = True
            if not routes or site.held:
                await site.stop()
                continue
            runner = await self._runner([*routes, FallbackRoute("/{any:.*}", _drop)])
            self._last.append(runner)
            site.serve(runner)

    async def stop_listening(self) -> None:
        """Close the listeners. Requests of producers that have arrived by then are answered."""
        for site in self._sites:
            await site.stop()
        self._sites.clear()
        for runner in self._last:
            await _wait_for_requests(cast("web.Server", runner.server))
            await runner.cleanup()
        self._last.clear()

    async def close(self) -> None:
        """Close all connections. Call it after the clients have disconnected."""
        if self._balance is not None:
            self._balance.stop()
        for runner in [*self._last, *self._runners]:
            await runner.cleanup()

    async def _listen(
        self, listening: Listening, port: int, *, reuse_port: bool, inherited: InheritedSockets
    ) -> None:
        runner = await self._runner(listening.routes)
        self._runners.append(runner)
        taken, hosts = inherited.take(listening.name, hosts_of(listening.host), port)
        site = GuardedSite(
            runner,
            hosts,
            port,
            ssl_context=listening.tls,
            reuse_port=reuse_port,
            limits=self._connections,
            inherited=taken,
        )
        await site.start()
        self._sites.append(site)
        self._all.append((site, listening.setting))
        self._lasting.append(listening.producers)

    async def _runner(self, routes: Sequence[web.AbstractRouteDef]) -> web.AppRunner:
        app = web.Application(middlewares=self._middlewares)
        app.router.add_routes(in_order(without_repeated(routes)))
        runner = web.AppRunner(
            app,
            access_log=None,
            keepalive_timeout=KEEPALIVE_S,
            # A peer that does not complete its request must not delay the stop.
            shutdown_timeout=_SHUTDOWN_S,
            handle_signals=False,
        )
        await runner.setup()
        return runner

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text=ALIVE)

    async def _readyz(self, _request: web.Request) -> web.Response:
        reason = self._ready()
        lines = (reason or "ready", self._limits())
        text = "".join(f"{line}\n" for line in lines if line)
        return web.Response(status=503 if reason else 200, text=text)

    async def _exposition(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=await self._scrape(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )


async def _drop(request: web.Request) -> web.StreamResponse:
    return drop(request)


async def _wait_for_requests(server: web.Server) -> None:
    """Wait up to 0.2 s until all accepted connections have sent a request."""
    for _ in range(_CHECKS):
        await asyncio.sleep(_FIRST_BYTES_S / _CHECKS)
        if all(each._current_request is not None for each in server.connections):
            return


def _own_port(section: Section) -> int:
    """Return the port of a protocol's own listener, or 0 if it uses the shared one."""
    return int(getattr(section, "port", 0))


def _tls(cert: str, key: str, label: str) -> ssl.SSLContext | None:
    if not cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key or None)
    except (OSError, ssl.SSLError) as exc:
        raise StartError(f"{label} tls_cert, tls_key: cannot be used: {exc}") from exc
    return context


def _own_address(settings: ServerSettings, section: Section) -> tuple[str, int]:
    """Return the address of a protocol's own listener; port 0 if it has none."""
    return str(getattr(section, "host", "")) or settings.host, _own_port(section)


def addresses(settings: ServerSettings, doors: Iterable[Section]) -> list[tuple[str, int]]:
    """Return host and port of the listeners for clients, the shared one first."""
    own = (_own_address(settings, door) for door in doors if door.is_open)
    return [(settings.host, settings.port), *(each for each in own if each[1])]


def node_name(config: Config, port: int = 0) -> str:
    """Return [node] name, or hostname_port if it is not set.

    The port is that of the shared listener, or of the first protocol that has its own, or `port` if
    all of them are 0.
    """
    ports = (number for _, number in addresses(config.server, config.doors.values()) if number)
    return config.node.name or f"{socket.gethostname()}_{next(ports, port)}"


def _check_ports(config: Config, listeners: Sequence[Listening]) -> None:
    """Raise StartError if two listeners need the same port. The kernel lets workers share ports."""
    used: list[tuple[str, int, str]] = []
    needed = [(each.host, each.port, each.setting) for each in listeners if each.port]
    last = config.metrics.port + config.node.workers - 1
    if config.metrics.port and last > _LAST_PORT:
        raise StartError(
            f"{config.where(METRICS_PORT)}: each of {config.node.workers} workers needs a port"
            f" from {config.metrics.port} on, but the last port is {_LAST_PORT}"
        )
    # The second worker's metrics listener has the next port, and so on.
    needed += [
        (config.metrics.host, port, METRICS_PORT)
        for port in range(config.metrics.port + 1, last + 1)
        if config.metrics.port
    ]
    if config.redis.url == "embedded":
        needed.append(("127.0.0.1", config.redis.embedded_port, "[redis] embedded_port"))
    for host, port, setting in needed:
        for other_host, other_port, other in used:
            if port == other_port and _overlap(host, other_host):
                one, two = config.where(other), config.where(setting)
                raise StartError(f"{one} and {two} both need port {port}; change one of them")
        used.append((host, port, setting))


def _overlap(one: str, other: str) -> bool:
    """Return True if the two `host` settings have a common address."""
    first, second = (
        {"127.0.0.1" if each == "localhost" else each for each in hosts_of(text)}
        for text in (one, other)
    )
    if not first or not second or first & second:
        return True
    all_ipv4 = "0.0.0.0"  # noqa: S104  # compared with, not bound
    return (all_ipv4 in first and any(":" not in each for each in second)) or (
        all_ipv4 in second and any(":" not in each for each in first)
    )


def _port_setting(section: Section, port: int) -> str:
    """Return the setting that has this port."""
    keys = (key for key in type(section).settings() if key.endswith("port"))
    return next((key for key in keys if getattr(section, key) == port), "port")
