"""Authorised hosts: addresses, networks, names."""

from __future__ import annotations

import pytest

from relay.protocols.pydio.hosts import AuthorisedHosts


@pytest.mark.parametrize(
    ("hosts", "peer", "allowed"),
    [
        (["127.0.0.1"], "127.0.0.1", True),
        (["127.0.0.1"], "::ffff:127.0.0.1", True),
        (["127.0.0.1"], "127.0.0.2", False),
        (["10.0.0.0/8", "fd00::/8"], "10.255.0.1", True),
        (["10.0.0.0/8", "fd00::/8"], "fd12::1", True),
        (["fe80::/10"], "fe80::1%eth0", True),
        (["10.0.0.0/8"], "11.0.0.1", False),
        (["localhost"], "127.0.0.1", True),
        (["localhost"], "127.0.0.2", False),
        (["no-such-host.invalid"], "127.0.0.1", False),
        ([], "127.0.0.1", False),
        (["0.0.0.0/0"], "", False),
        (["0.0.0.0/0"], "@", False),
    ],
)
async def test_allows_authorised_hosts_only(hosts: list[str], peer: str, allowed: bool) -> None:
    assert await AuthorisedHosts(hosts, clock=lambda: 0.0).allow(peer) is allowed


def test_rejects_an_invalid_network() -> None:
    with pytest.raises(ValueError, match="10.0.0.1/8"):
        AuthorisedHosts(["10.0.0.1/8"], clock=lambda: 0.0)
