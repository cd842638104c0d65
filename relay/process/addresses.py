"""The addresses that relay listens on: whether they can be bound, and errors for operators."""

from __future__ import annotations

import errno
import http.client
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from relay.config.lists import split
from relay.core.errors import StartError
from relay.transports.socket.inherited import addresses

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.process.handover import Inheritance
    from relay.process.server import Listening
    from relay.transports.socket.inherited import InheritedSockets

METRICS_PORT = "[metrics] port"
HEALTH_PATH, ALIVE = "/healthz", "alive\n"
_ANSWER_S = 2.0


def hosts_of(text: str) -> tuple[str, ...]:
    """Return the hosts of a `host` setting, several separated by commas.

    An empty result means all addresses of both families. So does `::`, as in other servers.
    """
    hosts = tuple(dict.fromkeys(split(text)))
    return () if "::" in hosts else hosts


def wanted_addresses(
    config: Config, listeners: Sequence[Listening]
) -> Iterator[tuple[Listening, int]]:
    """Yield each listener with the ports that it needs: one, or a metrics port for each worker."""
    for each in listeners:
        count = config.node.workers if each.setting == METRICS_PORT else 1
        for port in range(each.port, each.port + count):
            yield each, port


def check_addresses(
    config: Config,
    listeners: Sequence[Listening],
    *,
    accept_running: bool = False,
    inherited: InheritedSockets | None = None,
) -> str:
    """Bind to each address and release it again.

    Args:
        config: Names the settings in errors.
        listeners: What a start would open.
        accept_running: Accept a port in use if a relay answers on one of these listeners, because
            the configuration of a running relay is checked before a reload.
        inherited: Sockets that are open already. Their addresses are not checked.

    Returns:
        A note about that relay, or an empty string.

    Raises:
        StartError: An address cannot be used.
    """
    note = ""
    for each, port in wanted_addresses(config, listeners):
        try:
            for sock in bound(each.host, port, name=each.name, inherited=inherited):
                sock.close()
        except OSError as exc:
            taken = exc.errno == errno.EADDRINUSE
            if taken and not note and accept_running and _is_running(config, listeners):
                note = (
                    f"a relay is running on port {port} of {each.host or 'all addresses'}: reload"
                    " it with SIGHUP, or stop it before another start"
                )
            if not (taken and note):
                raise StartError(listen_error(config, each, exc, port)) from exc
    return note


def bound(
    host: str,
    port: int,
    *,
    shared: bool = False,
    name: str = "",
    inherited: InheritedSockets | None = None,
) -> list[socket.socket]:
    """Return sockets bound to the addresses of a `host` setting. They accept no connections.

    `shared`: the workers of this relay can bind to the addresses too, but no other program.
    Addresses of the listener `name` that have an inherited socket are left out.

    Raises:
        OSError: An address cannot be used, or another program listens there.
    """
    found = [
        each
        for name in hosts_of(host) or (None,)
        for each in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    ]
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            if inherited is not None and inherited.serve(name, str(address[0]), port):
                continue
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError:
                if len(found) > 1:
                    # This machine has no IPv6.
                    continue
                raise
            sockets.append(sock)
            # Connections of an earlier relay may still be in TIME_WAIT on this port.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            # The kernel lets a second relay bind beside this socket only while the option is set.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def check_inherited(
    config: Config, listeners: Sequence[Listening], inheritance: Inheritance
) -> None:
    """Close inherited sockets that no listener needs. StartError if they are systemd's."""
    if not inheritance.sockets.left:
        return
    wanted = []
    for listening, port in wanted_addresses(config, listeners):
        try:
            found = addresses(hosts_of(listening.host), port)
        except OSError as exc:
            raise StartError(listen_error(config, listening, exc, port)) from exc
        wanted += [(listening.name, address, port) for address in found]
    internal = urlsplit(f"//{config.node.internal_address}")
    if internal.port:
        last = internal.port + config.node.workers
        wanted += [
            ("internal", address, port)
            for port in range(internal.port, last)
            for address in addresses([internal.hostname or "::"], port)
        ]
    needed = []
    for each in inheritance.sockets.left:
        if any(each.serves(*one) for one in wanted):
            needed.append(each)
            continue
        if inheritance.from_systemd:
            names = ", ".join(dict.fromkeys(one.name for one in listeners))
            raise StartError(
                f"LISTEN_FDS: no listener has the address {each.address}; change [server] port, or"
                f" set FileDescriptorName in the socket unit to one of {names}"
            )
        each.socket.close()
    inheritance.sockets.left = needed


@contextmanager
def reserved(config: Config, shared: Listening, inherited: InheritedSockets) -> Iterator[int]:
    """Keep the shared listener's address for this relay's workers, and yield its port.

    Raises:
        StartError: The address cannot be used.
    """
    try:
        sockets = bound(
            shared.host, shared.port, shared=True, name=shared.name, inherited=inherited
        )
    except OSError as exc:
        raise StartError(listen_error(config, shared, exc)) from exc
    try:
        yield sockets[0].getsockname()[1] if sockets else shared.port
    finally:
        for sock in sockets:
            sock.close()


def listen_error(config: Config, listening: Listening, exc: OSError, port: int = 0) -> str:
    """Return one line for the operator: the address, the problem and the setting to change."""
    host, port = listening.host, port or listening.port
    setting = config.where(listening.setting)
    host_setting = listening.setting.removesuffix("port") + "host"
    if exc.errno == errno.EADDRINUSE:
        return (
            f"port {port} of {host or 'all addresses'} is taken by another process;"
            f" stop that process or change {setting}"
        )
    if exc.errno == errno.EACCES:
        return (
            f"port {port} of {host or 'all addresses'} needs the privilege to open ports below"
            f" 1024 (CAP_NET_BIND_SERVICE); change {setting} or grant it"
        )
    if isinstance(exc, socket.gaierror):
        return (
            f"cannot listen on {host} port {port} ({host_setting}): the host name cannot be"
            f" resolved ({exc.strerror}); name an address of this machine"
        )
    if exc.errno == errno.EADDRNOTAVAIL:
        return (
            f"cannot listen on {host} port {port} ({host_setting}): this machine does not have that"
            " address; use :: for all addresses"
        )
    return f"cannot listen on {host} port {port} ({setting}): {exc.strerror or exc}"


def _is_running(config: Config, listeners: Sequence[Listening]) -> bool:
    """Return True if a relay answers health checks on one of these listeners."""
    return any(port and _is_alive(each, port) for each, port in wanted_addresses(config, listeners))


def _is_alive(listening: Listening, port: int) -> bool:
    host = next(iter(hosts_of(listening.host)), "")
    host = "127.0.0.1" if host in {"", "0.0.0.0"} else host  # noqa: S104  # connected to
    connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_S)
    if listening.tls is not None:
        # The certificate is for another host name. The request contains no secret.
        trusting = ssl.create_default_context()
        trusting.check_hostname = False
        trusting.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=_ANSWER_S, context=trusting)
    try:
        connection.request("GET", HEALTH_PATH)
        return connection.getresponse().read(len(ALIVE)) == ALIVE.encode()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
