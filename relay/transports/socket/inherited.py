"""Listening sockets that this process did not open: from systemd, or from the relay it replaces."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class InheritedSocket:
    """A listening socket.

    `name` is the listener that it is for, or '' to find out by the address. `held`: another process
    keeps it open, so connections that were not accepted wait for the next start.
    """

    socket: socket.socket
    name: str = ""
    held: bool = False

    @property
    def address(self) -> str:
        """The address, for messages."""
        host, port = self.socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def is_shared(self) -> bool:
        """Whether each worker has a socket of its own on this address (SO_REUSEPORT)."""
        return bool(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))

    def serves(self, name: str, host: str, port: int) -> bool:
        """Return whether it is for the listener `name`, or accepts connections to this address."""
        if self.name == name:
            return True
        own_host, own_port = self.socket.getsockname()[:2]
        if own_port != port:
            return False
        wanted, own = (ipaddress.ip_address(each.partition("%")[0]) for each in (host, own_host))
        if wanted.version == own.version:
            return own in (wanted, type(own)(0))
        # A socket on :: may accept IPv4, too.
        return own == ipaddress.IPv6Address(0) and not self.socket.getsockopt(
            socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
        )


class InheritedSockets:
    """The sockets that no listener has taken yet."""

    def __init__(self, sockets: Iterable[InheritedSocket] = ()) -> None:
        self.left = list(sockets)

    def serve(self, name: str, host: str, port: int) -> bool:
        """Return whether one of the sockets is for this listener and address."""
        return any(each.serves(name, host, port) for each in self.left)

    def take(
        self, name: str, hosts: Sequence[str], port: int
    ) -> tuple[list[InheritedSocket], list[str]]:
        """Remove and return the sockets of a listener, and the addresses that have none.

        `hosts` are names and addresses; none means all addresses of both families. Without any
        socket, the addresses are these.
        """
        if not self.left:
            return [], list(hosts)
        taken: dict[InheritedSocket, None] = {}
        missing = []
        for host in addresses(hosts, port):
            found = [each for each in self.left if each.serves(name, host, port)]
            taken |= dict.fromkeys(found)
            missing += [] if found else [host]
        self.left = [each for each in self.left if each not in taken]
        return list(taken), missing if taken else list(hosts)


def addresses(hosts: Sequence[str], port: int) -> list[str]:
    """Return the addresses of names; of no name, the wildcard addresses. Raise OSError."""
    found = [
        str(each[4][0])
        for name in hosts or (None,)
        for each in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    ]
    return list(dict.fromkeys(found))
