"""The policy that decides who may read a channel, for every combination of sources."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config.settings import NamespaceSettings
from relay.core.model import RESERVED_NAMESPACES, Channel, Principal, namespace_of
from relay.rights.http import HttpRights
from relay.rights.policy import Patterns, Policy

NEWS = Channel("news")
NOW = 1000.0
ANN = Principal(user="ann")
READER = Principal(user="ann", channels=frozenset({"news"}))
# The policy only checks whether there is one.
HTTP = cast("HttpRights", object())


def lists(rights: str) -> Callable[[Channel], NamespaceSettings]:
    settings = NamespaceSettings(rights=rights)
    return lambda _: settings


def allowed(
    rights: str,
    principal: Principal = ANN,
    hash_value: bytes | None = None,
    http_answer: bool | None = None,
    channel: Channel = NEWS,
) -> bool:
    policy = Policy(lists(rights), HTTP)
    return policy.allowed(principal, channel, hash_value, http_answer, now=NOW)


def test_a_namespace_without_sources_is_closed() -> None:
    assert not allowed("", READER, b"rw", True)


@pytest.mark.parametrize("value", [b"r", b"rw"])
def test_the_hash_grants_where_it_is_listed(value: bytes) -> None:
    assert allowed("hash", hash_value=value)
    assert not allowed("claims, http", hash_value=value)
    assert not allowed("hash")


def test_claims_grant_where_they_are_listed() -> None:
    assert allowed("claims", READER)
    assert not allowed("hash, http", READER)
    assert not allowed("claims", READER, channel=Channel("other"))
    assert not allowed("claims", ANN)


def test_the_application_grants_where_it_is_listed() -> None:
    assert allowed("http", http_answer=True)
    assert not allowed("claims, hash", http_answer=True)
    assert not allowed("http", http_answer=False)
    assert not allowed("http", http_answer=None)


def test_anonymous_grants_to_everyone_where_it_is_listed() -> None:
    assert allowed("anonymous", Principal())
    assert allowed("anonymous", ANN)
    assert not allowed("claims, hash, http", Principal())


def test_any_source_is_enough() -> None:
    everything = "claims, hash, http"
    assert allowed(everything, READER, None, False)
    assert allowed(everything, ANN, b"r", False)
    assert allowed(everything, ANN, None, True)


@pytest.mark.parametrize("rights", ["claims, hash, http, anonymous", "claims, http, anonymous"])
@pytest.mark.parametrize("value", [b"-", b"", b"w", b"R", b"no", b"r "])
def test_a_refusal_in_the_hash_wins_over_every_grant(rights: str, value: bytes) -> None:
    assert not allowed(rights, READER, value, True)


def test_an_unknown_value_in_the_hash_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(lists("hash"), None)
    with caplog.at_level(logging.WARNING):
        for value in (b"w", b"w", b"-", b"r", b"x" * 1000):
            policy.allowed(ANN, NEWS, value, None, now=NOW)
    assert [b"w" in record.getMessage().encode() for record in caplog.records] == [True, True]
    assert "x" * 51 not in caplog.text


def test_unknown_values_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(lists("hash"), None)
    for number in range(1000):
        policy.allowed(ANN, NEWS, b"%d" % number, None, now=NOW)
    assert len(caplog.records) == 100


@pytest.mark.parametrize("expires_at", [NOW, NOW - 1, 0.0])
def test_an_expired_principal_is_never_allowed(expires_at: float) -> None:
    for principal in (
        Principal(user="ann", patterns=("*",), expires_at=expires_at),
        Principal(unrestricted=True, expires_at=expires_at),
    ):
        assert not allowed("claims, hash, http, anonymous", principal, b"rw", True)


def test_a_principal_that_expires_later_is_allowed() -> None:
    assert allowed("claims", Principal(user="ann", patterns=("*",), expires_at=NOW + 0.001))


def test_unrestricted_opens_every_channel_of_its_own_door() -> None:
    free = Principal(unrestricted=True)
    assert allowed("", free)
    assert allowed("", free, b"-")
    assert allowed("", free, channel=Channel("other:x"))


@pytest.mark.parametrize("namespace", sorted(RESERVED_NAMESPACES))
def test_unrestricted_opens_no_other_doors_channel(namespace: str) -> None:
    free = Principal(unrestricted=True)
    channel = Channel(f"{namespace}:x")
    assert not allowed("claims, hash, http", free, channel=channel)
    # Rights from the protocol's own source are granted.
    assert allowed("hash", free, b"r", channel=channel)
    assert not allowed("anonymous", free, b"-", channel=channel)


def test_the_application_is_asked_only_where_nothing_else_can_grant() -> None:
    def needs(rights: str, principal: Principal = ANN, channel: Channel = NEWS) -> bool:
        return Policy(lists(rights), HTTP).needs_http(principal, channel)

    assert needs("http")
    assert needs("http, hash")
    assert needs("http, claims")
    assert not needs("claims, hash")
    assert not needs("http, claims", READER)
    assert needs("http", READER)
    assert not needs("http, anonymous")
    assert not needs("http", Principal(unrestricted=True))
    assert needs("http", Principal(unrestricted=True), Channel("seafile:x"))
    assert not Policy(lists("http"), None).needs_http(ANN, NEWS)


def test_a_reload_counts_at_once() -> None:
    policy = Policy(lists("anonymous"), None)
    assert policy.allowed(ANN, NEWS, None, None, now=NOW)
    policy.reload(lists("http"), HTTP)
    assert not policy.allowed(ANN, NEWS, None, None, now=NOW)
    assert policy.needs_http(ANN, NEWS)


def test_each_namespace_has_its_own_sources() -> None:
    table = {"open": NamespaceSettings(rights="anonymous"), "": NamespaceSettings()}
    policy = Policy(lambda channel: table[namespace_of(channel)], None)
    assert policy.allowed(ANN, Channel("open:x"), None, None, now=NOW)
    assert not policy.allowed(ANN, NEWS, None, None, now=NOW)


def test_many_users_with_patterns_of_their_own_do_not_fill_memory() -> None:
    policy = Policy(lists("claims"), None)
    for number in range(5000):
        principal = Principal(user="u", patterns=(f"c{number}*",))
        assert policy.allowed(principal, Channel(f"c{number}"), None, None, now=NOW)
    assert len(policy._patterns) == 4096


@pytest.mark.parametrize(
    ("pattern", "channel", "grants"),
    [
        ("news", "news", True),
        ("news", "news2", False),
        ("*", "a:b:c", True),
        ("a:*", "a:b:c", True),
        ("a:*", "a:", True),
        ("a:*", "b:a:", False),
        ("*:c", "a:b:c", True),
        ("a*c", "ac", True),
        ("a*a", "a", False),
        ("ab*bc", "abc", False),
        ("a*b*c", "acbc", True),
        ("a*b*b", "ab", False),
        ("**", "x", True),
        ("a.c", "abc", False),
        ("[a]", "a", False),
        ("?", "a", False),
        ("NEWS", "news", False),
    ],
)
def test_patterns(pattern: str, channel: str, grants: bool) -> None:
    assert Patterns((pattern,)).grant(channel) is grants


@given(
    pattern=st.text(alphabet="ab:*.", max_size=12),
    channel=st.text(alphabet="ab:.", max_size=12),
)
def test_patterns_agree_with_a_regular_expression(pattern: str, channel: str) -> None:
    expression = ".*".join(re.escape(part) for part in pattern.split("*"))
    expected = re.fullmatch(expression, channel, re.DOTALL) is not None
    assert Patterns((pattern,)).grant(channel) is expected


def test_no_pattern_takes_long() -> None:
    started = time.perf_counter()
    patterns = Patterns(tuple("*a" * length + "*b" for length in range(20, 120)))
    assert not patterns.grant("a" * 255)
    # A regular expression would need years for this.
    assert time.perf_counter() - started < 1


def test_a_doors_own_rule_counts_where_the_namespace_lists_it_and_a_refusal_still_wins() -> None:
    mine = {"news"}
    guest = Principal(user="ann", door="some", grant=lambda channel: channel in mine)
    assert allowed("door", guest)
    assert not allowed("claims, hash, http", guest)
    assert not allowed("door", guest, b"-")
    assert not allowed("door", guest, channel=Channel("other"))
    mine.clear()
    assert not allowed("door", guest)


@pytest.mark.parametrize("owner", sorted(RESERVED_NAMESPACES))
def test_a_star_opens_another_systems_workspaces_only_where_it_names_the_system(owner: str) -> None:
    channel = Channel(f"{owner}:1")
    for pattern in ("*", "*1", "*:*"):
        assert not allowed("claims", Principal(patterns=(pattern,)), channel=channel)
    assert allowed("claims", Principal(patterns=(f"{owner}:*",)), channel=channel)
    assert allowed("claims", Principal(channels=frozenset({channel})), channel=channel)


def test_a_star_in_a_name_is_an_ordinary_character() -> None:
    """Names in other protocols' tokens are chosen by users and other servers."""
    for name in ("*", "n*", "news*"):
        principal = Principal(channels=frozenset({name}))
        assert not allowed("claims", principal)
        assert allowed("claims", principal, channel=Channel(name))
