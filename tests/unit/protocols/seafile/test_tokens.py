"""The three generations of credentials, and the rules for tokens (wire facts, sections 1, 4)."""

from __future__ import annotations

from typing import Any

import pytest

from relay.protocols.seafile.tokens import InvalidSeafileToken, SeafileClaims, SeafTokens
from tests.support.seafile import sign

# Shorter than RFC 7518 wants, as the keys in use are.
KEY = "short#;%key"
NOW = 1_800_000_000.5
GOOD = int(NOW) + 300


def signed(key: str = KEY, algorithm: str = "HS256", **claims: object) -> str:
    return sign(key, algorithm, **claims)


def check(
    repo_token: str | None = None, authorization: str | None = None, *, clients: bool = False
) -> None:
    SeafTokens(KEY, "shared secret").check_sender(repo_token, authorization, NOW, clients=clients)


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_accepts_hmac_of_any_length(algorithm: str) -> None:
    token = signed(algorithm=algorithm, exp=GOOD, repo_id="r", username="u")
    assert SeafTokens(KEY).read(token, NOW) == SeafileClaims(GOOD, "r", "u")


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"exp": None},
        {"exp": int(NOW)},
        {"exp": int(NOW) - 1},
        {"exp": GOOD + 0.5},
        {"exp": str(GOOD)},
        {"exp": True},
        {"exp": GOOD, "nbf": GOOD - 1},
        {"exp": GOOD, "username": 1},
    ],
)
def test_exp_must_be_an_integer_in_the_future(claims: dict[str, Any]) -> None:
    with pytest.raises(InvalidSeafileToken):
        SeafTokens(KEY).read(sign(KEY, **claims), NOW)


def test_rejects_other_signatures_without_quoting_the_token() -> None:
    none = signed(algorithm="none", exp=GOOD)
    for token in (none, signed("another key", exp=GOOD), "", "x", "a.b.c", "é.é.é"):
        with pytest.raises(InvalidSeafileToken) as refused:
            SeafTokens(KEY).read(token, NOW)
        assert len(token) < 2 or token not in str(refused.value)


def test_rejects_all_tokens_without_a_key() -> None:
    with pytest.raises(InvalidSeafileToken):
        SeafTokens("").read(signed("", exp=GOOD), NOW)
    with pytest.raises(InvalidSeafileToken):
        SeafTokens("").check_sender("", None, NOW, clients=True)


def test_the_first_generation_is_a_shared_token() -> None:
    check("shared secret")
    for other in ("shared secret ", "", None, "Shared secret", "\udcff", "é"):
        with pytest.raises(InvalidSeafileToken):
            check(other)


def test_the_second_generation_is_a_jwt_in_the_same_header() -> None:
    check(signed(exp=GOOD))
    check(signed(exp=GOOD, repo_id="r", username=""))


def test_the_third_generation_is_the_second_word_of_authorization() -> None:
    token = signed(exp=GOOD)
    for good in (f"Token {token}", f"Bearer {token}", f"x {token} y z"):
        check(authorization=good)
    for bad in (token, f"Token  {token}", "Token", "", f" {token.upper()}"):
        with pytest.raises(InvalidSeafileToken):
            check(authorization=bad)
    # One valid header is enough.
    check("nonsense", f"Token {token}")


def test_a_clients_token_does_not_allow_posting_by_default() -> None:
    token = signed(exp=GOOD, repo_id="r", username="alice@example.com")
    with pytest.raises(InvalidSeafileToken):
        check(authorization=f"Token {token}")
    check(authorization=f"Token {token}", clients=True)


def test_accepts_several_keys_for_rotation() -> None:
    tokens = SeafTokens(f"{KEY}\n---\nold key")
    for key in (KEY, "old key"):
        assert tokens.read(sign(key, exp=GOOD), NOW).expires_at == GOOD
    with pytest.raises(InvalidSeafileToken, match="invalid token signature"):
        tokens.read(sign("---", exp=GOOD), NOW)
