"""Hosts from which PHP may connect: addresses, networks and host names."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

_Address = IPv4Address | IPv6Address
_LOOK_UP_S = 2.0
_CACHE_S = 30.0


class AuthorisedHosts:
    """The hosts of `authorised_hosts`. The addresses of a name are cached."""

    def __init__(self, hosts: Iterable[str], *, clock: Callable[[], float]) -> None:
        """Raise ValueError if a host with a `/` is not a network."""
        self._networks = []
        self._names: list[str] = []
        for host in hosts:
            try:
                self._networks.append(ip_network(host))
            except ValueError:
                if "/" in host:
                    raise
                self._names.append(host)
        self._clock = clock
        self._cached: dict[str, tuple[float, frozenset[_Address]]] = {}

    async def allow(self, peer: str) -> bool:
        """Return True if `peer`, the address of a socket's other end, is an authorised host."""
        try:
            address = ip_address(peer.partition("%")[0])
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if any(address in network for network in self._networks):
            return True
        for name in self._names:
            if address in await self._addresses(name):
                return True
        return False

    async def _addresses(self, name: str) -> frozenset[_Address]:
        now = self._clock()
        cached = self._cached.get(name)
        if cached is not None and cached[0] > now:
            return cached[1]
        found: frozenset[_Address]
        try:
            async with asyncio.timeout(_LOOK_UP_S):
                answers = await asyncio.get_running_loop().getaddrinfo(
                    name, None, type=socket.SOCK_STREAM
                )
            found = frozenset(ip_address(str(answer[4][0]).partition("%")[0]) for answer in answers)
        except (OSError, UnicodeError, TimeoutError):
            # Keep the last known addresses while the name server is unreachable.
            found = cached[1] if cached is not None else frozenset()
        self._cached[name] = (now + _CACHE_S, found)
        return found
