"""Which addresses PHP may connect from: networks, addresses, and names that are looked up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

_Address = IPv4Address | IPv6Address
_LOOK_UP_S = 2.0


class AuthorisedHosts:
    """The list of one setting. A name's addresses are kept for `keep_s` seconds."""

    def __init__(
        self, hosts: Iterable[str], *, clock: Callable[[], float], keep_s: float = 30.0
    ) -> None:
        """ValueError where something with a `/` is no network."""
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
        self._keep_s = keep_s
        self._known: dict[str, tuple[float, frozenset[_Address]]] = {}

    async def allow(self, peer: str) -> bool:
        """Whether `peer`, an address as a socket names it, is one of them."""
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
        held = self._known.get(name)
        if held is not None and held[0] > now:
            return held[1]
        found: frozenset[_Address]
        try:
            async with asyncio.timeout(_LOOK_UP_S):
                answers = await asyncio.get_running_loop().getaddrinfo(
                    name, None, type=socket.SOCK_STREAM
                )
            found = frozenset(ip_address(str(answer[4][0]).partition("%")[0]) for answer in answers)
        except (OSError, UnicodeError, TimeoutError):
            # What was known last holds while the name server is away.
            found = held[1] if held is not None else frozenset()
        self._known[name] = (now + self._keep_s, found)
        return found
