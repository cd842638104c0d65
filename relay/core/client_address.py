"""The address of a client behind proxies, and the addresses that belong to one client.

All limits per address use these rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

# The shortest network that an IPv6 host owns (RFC 6177). It can use any address in it.
_HOST_PREFIX = 64
# IPv4 addresses as IPv6 addresses: ::ffff:0:0/96.
_MAPPED_PREFIX = 96
# A client can send any number of addresses.
_ADDRESSES = 32


class TrustedProxies:
    """The proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` count."""

    def __init__(self, networks: Iterable[str] = ()) -> None:
        """`networks` are addresses, or networks such as 10.0.0.0/8. Raise ValueError."""
        self._networks = [_network(each) for each in networks]

    @property
    def is_empty(self) -> bool:
        """Whether no proxy is trusted."""
        return not self._networks

    def trust(self, address: str) -> bool:
        """Return True if the address is that of a trusted proxy."""
        if not self._networks:
            return False
        parsed = _parse(address)
        return parsed is not None and any(parsed in each for each in self._networks)

    def client(self, peer: str, forwarded_for: Iterable[str]) -> str:
        """Return the address of the client.

        It is the peer's, or, if the peer is a trusted proxy, the last address in the values of
        `X-Forwarded-For` that is not one. Each proxy appends the address of its own peer, so the
        client itself has no influence on this one.
        """
        if not self.trust(peer):
            return peer
        address = peer
        listed = ",".join(forwarded_for).rsplit(",", _ADDRESSES)
        for text in reversed(listed[-_ADDRESSES:]):
            found = _parse(_without_port(text.strip()))
            if found is None:
                break
            address = str(found)
            if not self.trust(address):
                break
        return address


def network_of(address: str) -> str:
    """Return the network that shares one limit: the address, or an IPv6 host's /64."""
    parsed = _parse(address)
    if isinstance(parsed, IPv6Address):
        return str(ip_network((parsed, _HOST_PREFIX), strict=False))
    return address if parsed is None else str(parsed)


def _network(text: str) -> IPv4Network | IPv6Network:
    found = ip_network(text)
    if isinstance(found, IPv6Network):
        first = found.network_address.ipv4_mapped
        if first is not None and found.prefixlen >= _MAPPED_PREFIX:
            # The addresses that are compared have been converted as well.
            return IPv4Network((first, found.prefixlen - _MAPPED_PREFIX))
    return found


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    try:
        # A link-local address may have a zone.
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        # A socket that accepts both families shows IPv4 clients this way.
        return found.ipv4_mapped
    return found


def _without_port(text: str) -> str:
    """Some proxies add the port: 10.0.0.1:443 or [::1]:443."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text
