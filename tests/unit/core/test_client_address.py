"""The address of a client behind proxies, and the network that shares a limit."""

from __future__ import annotations

import pytest

from relay.core.client_address import TrustedProxies, network_of

PROXIES = TrustedProxies(["10.0.0.0/8", "::1", "2001:db8:1::/48"])


@pytest.mark.parametrize(
    ("peer", "headers", "client"),
    [
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        # The client has sent an address of its own.
        ("10.0.0.1", ["198.51.100.1, 203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["198.51.100.1", "203.0.113.9"], "203.0.113.9"),
        # A chain of trusted proxies.
        ("::1", ["203.0.113.9, 10.0.0.7,2001:db8:1::5"], "203.0.113.9"),
        ("::ffff:10.0.0.1", ["203.0.113.9:4711"], "203.0.113.9"),
        ("10.0.0.1", ["[2001:db8:2::9]:4711"], "2001:db8:2::9"),
        # Anything else comes from the client, or from a proxy that is not trusted.
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9,"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9, unknown, 10.0.0.2"], "10.0.0.2"),
        ("192.0.2.1", ["203.0.113.9"], "192.0.2.1"),
        ("", ["203.0.113.9"], ""),
        # Only the end of a long list is read.
        ("10.0.0.1", ["203.0.113.9" + ", 10.0.0.2" * 50_000], "10.0.0.2"),
    ],
)
def test_clients_behind_proxies(peer: str, headers: list[str], client: str) -> None:
    assert PROXIES.client(peer, headers) == client


@pytest.mark.parametrize("proxy", ["::ffff:10.0.0.1", "::ffff:a00:0/104", "::ffff:10.0.0.0/127"])
def test_proxies_may_be_written_as_ipv4_mapped_addresses(proxy: str) -> None:
    trusted = TrustedProxies([proxy])
    for peer in ("10.0.0.1", "::ffff:10.0.0.1"):
        assert trusted.client(peer, ["203.0.113.9"]) == "203.0.113.9"
    assert trusted.client("11.0.0.1", ["203.0.113.9"]) == "11.0.0.1"


def test_without_proxies_the_header_does_not_count() -> None:
    assert TrustedProxies().client("10.0.0.1", ["203.0.113.9"]) == "10.0.0.1"
    with pytest.raises(ValueError, match="'proxy1' does not appear to be"):
        TrustedProxies(["proxy1"])


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("203.0.113.9", "::ffff:203.0.113.9", True),
        ("203.0.113.9", "203.0.113.8", False),
        ("2001:db8::1", "2001:db8:0:0:ffff::9", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "203.0.113.9", False),
    ],
)
def test_networks_that_share_a_limit(one: str, other: str, is_same: bool) -> None:
    assert (network_of(one) == network_of(other)) is is_same
