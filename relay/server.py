"""The listeners: doors on the shared one or their own, health and metrics beside them."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from relay.errors import StartError
from relay.transports.listener import GuardedSite
from relay.transports.precedence import in_order
from relay.transports.take_over import hand_on

if TYPE_CHECKING:
    from relay.config import Config
    from relay.frontdoor import Mounted
    from relay.metrics import Metrics
    from relay.settings import MetricsSettings, Section, ServerSettings
    from relay.transports.balance import Balance

# A cursor over many channels comes back in one header line (native/README.md, "Cursor").
_LINE_BYTES = 65536


class Server:
    """Opens and closes the listeners."""

    def __init__(self, *, metrics: Metrics, ready: Callable[[], str]) -> None:
        """`ready` gives the reason why this worker is not ready, '' if it is."""
        self._metrics = metrics
        self._ready = ready
        self._runners: list[web.AppRunner] = []
        self._sites: list[GuardedSite] = []
        self._balance: Balance | None = None

    async def start(
        self,
        settings: ServerSettings,
        metrics: MetricsSettings,
        doors: Sequence[tuple[Mounted, Section]],
        *,
        shared_ports: bool = False,
    ) -> int:
        """Listen; the shared listener's port. StartError where an address cannot be had.

        `shared_ports`: other workers listen on the doors' ports too.
        """
        shared = [
            route for door, section in doors if not _own_port(section) for route in door.routes
        ]
        health = [
            web.get("/healthz", self._healthz),
            web.get("/readyz", self._readyz),
            web.get("/metrics", self._exposition),
        ]
        if not metrics.port:
            shared += health
        tls = _tls(settings.tls_cert, settings.tls_key, "[server]")
        listen = partial(self._listen, backlog=settings.backlog)
        port = await listen(settings.host, settings.port, shared, tls, reuse_port=shared_ports)
        for door, section in doors:
            if not _own_port(section):
                continue
            host, own = _own_address(settings, section)
            cert, key = (str(getattr(section, name, "")) for name in ("tls_cert", "tls_key"))
            door_tls = _tls(cert, key, "the door's own") or tls
            await listen(host, own, door.routes, door_tls, reuse_port=shared_ports)
        for each in (each for door, _ in doors for each in door.listeners):
            own_tls = _tls(each.tls_cert, each.tls_key, "the door's own") or tls
            own_tls = None if each.plain else own_tls
            host = each.host or settings.host
            await listen(host, each.port, each.routes, own_tls, reuse_port=shared_ports)
        if metrics.port:
            # Plain: it is meant for loopback, where the scraper or the probe is.
            await listen(metrics.host, metrics.port, health, None, reuse_port=False)
        return port

    def balance(self, balance: Balance, spawn: Callable[..., object]) -> None:
        """Share what comes to the shared listener with this host's other workers.

        Not with TLS: its handshake is over when a connection is looked at, and its keys are here.
        """
        site = self._sites[0]
        if site.tls:
            return
        self._balance = balance
        site.give = balance.give

        def take(connection: socket.socket, listener: int, early: bytes) -> None:
            if listener < len(self._sites):
                spawn(self._sites[listener].adopt(connection, early), name="adopt")
            else:
                connection.close()

        balance.receive(take)

    def pass_on(self, request: web.Request, instance: str) -> web.StreamResponse | None:
        """See `relay.frontdoor.DoorContext`."""
        balance = self._balance
        address = request.transport and request.transport.get_extra_info("sockname")
        if balance is None or not isinstance(address, tuple):
            return None
        for index, site in enumerate(self._sites):
            if site.port == address[1]:
                give = partial(_give, balance, instance, index)
                return hand_on(request, give)
        return None

    async def stop_listening(self) -> None:
        """New clients are refused from here on."""
        if self._balance is not None:
            self._balance.stop()
        for site in self._sites:
            await site.stop()
        self._sites.clear()

    async def close(self) -> None:
        """After the clients have gone."""
        for runner in self._runners:
            await runner.cleanup()

    async def _listen(
        self,
        host: str,
        port: int,
        routes: Sequence[web.AbstractRouteDef],
        tls: ssl.SSLContext | None,
        *,
        backlog: int,
        reuse_port: bool,
    ) -> int:
        app = web.Application()
        app.router.add_routes(in_order(routes))
        runner = web.AppRunner(
            app,
            access_log=None,
            max_line_size=_LINE_BYTES,
            max_field_size=_LINE_BYTES,
            handle_signals=False,
        )
        await runner.setup()
        self._runners.append(runner)
        site = GuardedSite(
            runner, host, port, ssl_context=tls, backlog=backlog, reuse_port=reuse_port
        )
        try:
            await site.start()
        except OSError as exc:
            raise StartError(listen_error(host, port, exc)) from exc
        self._sites.append(site)
        return site.port

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        reason = self._ready()
        return web.Response(status=503 if reason else 200, text=f"{reason or 'ready'}\n")

    async def _exposition(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.exposition(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )


def _give(
    balance: Balance, instance: str, listener: int, connection: socket.socket, early: bytes
) -> bool:
    return balance.pass_on(instance, connection, listener, early)


def _own_port(section: Section) -> int:
    """The port of a door's own listener; 0 where it is on the shared one."""
    return int(getattr(section, "port", 0))


def _tls(cert: str, key: str, whose: str) -> ssl.SSLContext | None:
    if not cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key or None)
    except (OSError, ssl.SSLError) as exc:
        raise StartError(f"{whose} tls_cert, tls_key: cannot be used: {exc}") from exc
    return context


def _own_address(settings: ServerSettings, section: Section) -> tuple[str, int]:
    """Of a door's own listener; port 0 where it has none."""
    return str(getattr(section, "host", "")) or settings.host, _own_port(section)


def addresses(settings: ServerSettings, doors: Iterable[Section]) -> list[tuple[str, int]]:
    """Host and port of the listeners for clients: the shared one first, then doors' own."""
    own = (_own_address(settings, door) for door in doors)
    return [(settings.host, settings.port), *(each for each in own if each[1])]


def node_name(config: Config, port: int = 0) -> str:
    """By which a relay is known: [node] name, else hostname_port.

    The port is the shared listener's, else the first door's own; `port` where all are free ones.
    """
    ports = (number for _, number in addresses(config.server, config.doors.values()) if number)
    return config.node.name or f"{socket.gethostname()}_{next(ports, port)}"


def listen_error(host: str, port: int, exc: OSError) -> str:
    """One line for the operator: what is wrong with the address."""
    if exc.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken; choose another: --port N, or [server] port"
    if exc.errno == errno.EACCES:
        return f"port {port} needs privileges; choose one above 1023: --port N"
    return f"cannot listen on {host} port {port}: {exc.strerror or exc}"
