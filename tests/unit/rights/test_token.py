"""Tokens: which are accepted or rejected and why; no error contains the token."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import warnings
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pydantic import SecretStr

from relay.config.settings import JwtSettings
from relay.core.errors import ConfigError, Unauthorized
from relay.rights.token import LIMIT_NAMES, TokenReader

NOW = 1_700_000_000.0
SECRET = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"


def settings(key: str = SECRET, **rest: Any) -> JwtSettings:
    return JwtSettings(key=SecretStr(key), **rest)


def token(claims: object, key: Any = SECRET, algorithm: str = "HS256") -> str:
    payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jwt.PyJWS().encode(payload, key, algorithm=algorithm)


def refusal(text: str, **rest: Any) -> str:
    with pytest.raises(Unauthorized) as caught:
        TokenReader(settings(**rest)).read(text, now=lambda: NOW)
    reason = str(caught.value)
    assert not any(part and part in reason for part in text.split("."))
    # A traceback would print the text of a cause.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return reason


def pems(private: Any) -> tuple[str, str]:
    return (
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode(),
        private.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode(),
    )


def test_a_token_becomes_a_principal() -> None:
    text = token({"sub": "ann", "channels": ["news", "team:*"], "groups": ["g"], "exp": NOW + 9.5})
    principal = TokenReader(settings()).read(text, now=lambda: NOW)
    assert principal.user == "ann"
    assert principal.channels == {"news"}
    assert principal.patterns == ("team:*",)
    assert principal.groups == {"g"}
    assert principal.expires_at == NOW + 9.5
    assert not principal.unrestricted


def test_channels_groups_and_exp_may_be_absent() -> None:
    principal = TokenReader(settings()).read(token({"sub": "ann"}), now=lambda: NOW)
    assert not principal.channels
    assert principal.groups == frozenset()
    assert principal.expires_at is None


def test_without_a_key_no_token_is_accepted() -> None:
    assert refusal(token({"sub": "ann"}), key="") == (
        "tokens are not accepted: no key is configured"
    )
    # Anybody can forge an HMAC with an empty key.
    assert "no key" in refusal("e30.e30.e30", key=" \n ")


def test_every_key_is_tried_in_turn() -> None:
    reader = TokenReader(settings(f"{SECRET}\n---\n{OTHER}\n"))
    for key in (SECRET, OTHER):
        assert reader.read(token({"sub": "ann"}, key), now=lambda: NOW).user == "ann"
    assert "invalid token signature" in refusal(token({"sub": "ann"}, "x" * 32))


def test_dashes_inside_a_key_do_not_separate() -> None:
    key = "abc---def---0123456789"
    assert TokenReader(settings(key)).read(token({"sub": "ann"}, key)).user == "ann"


def test_an_indented_separator_and_carriage_returns_are_forgiven() -> None:
    reader = TokenReader(settings(f"{SECRET}\r\n  ---  \r\n{OTHER}\r\n"))
    assert reader.read(token({"sub": "ann"}, OTHER)).user == "ann"


@pytest.mark.parametrize("key", [f"{SECRET}\n---\n", f"---\n{SECRET}", f"{SECRET}\n---\n---\nx"])
def test_an_empty_key_among_several_is_a_mistake(key: str) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        TokenReader(settings(key))


def test_a_secret_below_16_bytes_is_refused_at_the_start_without_showing_it() -> None:
    with pytest.raises(ConfigError, match="too short") as caught:
        TokenReader(settings("fifteen-bytes-x"))
    assert "fifteen" not in str(caught.value)


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_a_secret_of_16_bytes_is_accepted_without_a_warning(algorithm: str) -> None:
    # pytest turns PyJWT's InsecureKeyLengthWarning into an error.
    reader = TokenReader(settings("sixteen-bytes-xx", algorithm=algorithm))
    signed = reader.sign("ann", ["news"], [], 10)
    assert reader.read(signed).channels == {"news"}


def test_a_pem_key_is_no_hmac_secret() -> None:
    _, public = pems(ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(ConfigError, match="not a valid key for HS256"):
        TokenReader(settings(public))


@pytest.mark.parametrize(
    ("algorithm", "make"),
    [
        ("RS256", lambda: rsa.generate_private_key(65537, 2048)),
        ("ES256", lambda: ec.generate_private_key(ec.SECP256R1())),
        ("ES512", lambda: ec.generate_private_key(ec.SECP521R1())),
        ("EdDSA", ed25519.Ed25519PrivateKey.generate),
    ],
)
def test_public_keys_verify_and_do_not_sign(algorithm: str, make: Any) -> None:
    private, public = pems(make())
    _, older = pems(make())
    reader = TokenReader(settings(f"{older}\n---\n{public}", algorithm=algorithm))
    assert reader.read(token({"sub": "ann"}, private, algorithm)).user == "ann"
    with pytest.raises(ConfigError, match="HS256"):
        reader.sign("ann", [], [], 10)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_key_that_does_not_fit_the_algorithm_is_a_mistake(algorithm: str) -> None:
    with pytest.raises(ConfigError, match="key 1 of 1 is not a valid key") as caught:
        TokenReader(settings(SECRET, algorithm=algorithm))
    assert SECRET not in str(caught.value)


def test_a_short_rsa_key_is_a_mistake() -> None:
    _, public = pems(rsa.generate_private_key(65537, 1024))  # noqa: S505
    with pytest.raises(ConfigError, match="1024"):
        TokenReader(settings(public, algorithm="RS256"))


def test_the_algorithm_is_the_configured_one_whatever_the_token_says() -> None:
    text = token({"sub": "ann"}, SECRET, "HS512")
    assert "HS256" in refusal(text)
    unsigned = token({"sub": "ann"}, None, "none")
    assert "HS256" in refusal(unsigned)


def test_a_public_key_used_as_an_hmac_secret_opens_nothing() -> None:
    _, public = pems(rsa.generate_private_key(65537, 2048))

    def part(value: bytes) -> bytes:
        return base64.urlsafe_b64encode(value).rstrip(b"=")

    head = part(b'{"alg":"HS256","typ":"JWT"}') + b"." + part(b'{"sub":"ann"}')
    forged = head + b"." + part(hmac.digest(public.strip().encode(), head, hashlib.sha256))
    assert "RS256" in refusal(forged.decode(), key=public, algorithm="RS256")


@pytest.mark.parametrize(
    "text",
    ["", "x", "a.b", "a.b.c", "....", "é.é.é", "\ud800", "e30.e30.e30", "{}.{}.{}", "x" * 100_000],
)
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(Unauthorized):
        TokenReader(settings()).read(text)


@pytest.mark.parametrize("payload", [b"[]", b"1", b'"x"', b"{", b"\xff", b"[" * 100_000, b""])
def test_a_signed_payload_that_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises(Unauthorized):
        TokenReader(settings()).read(token(payload))


@pytest.mark.parametrize("sub", [None, "", 7, ["ann"], {}, "a\nb", "x" * 256, "\ud800"])
def test_a_token_must_name_a_user(sub: object) -> None:
    assert "sub" in refusal(token({"sub": sub}))
    assert "sub" in refusal(token({}))


@pytest.mark.parametrize(
    "channels",
    [
        "news",
        {"news": 1},
        [1],
        [None],
        [""],
        ["x" * 256],
        ["\ud800"],
        5,
        ["c"] * (LIMIT_NAMES + 1),
    ],
)
def test_channels_must_be_names_or_patterns(channels: object) -> None:
    assert "channels" in refusal(token({"sub": "ann", "channels": channels}))


def test_a_thousand_channels_are_accepted() -> None:
    names = [f"c{number}" for number in range(LIMIT_NAMES)]
    principal = TokenReader(settings()).read(token({"sub": "ann", "channels": names}))
    assert principal.channels == set(names)


@pytest.mark.parametrize("groups", ["staff", [1], [""], ["\n"], ["g"] * (LIMIT_NAMES + 1)])
def test_groups_must_be_names(groups: object) -> None:
    assert "groups" in refusal(token({"sub": "ann", "groups": groups}))


def test_an_expired_token_is_refused_in_the_second_it_expires() -> None:
    assert "expired" in refusal(token({"sub": "ann", "exp": NOW}))
    alive = token({"sub": "ann", "exp": NOW + 0.1})
    assert TokenReader(settings()).read(alive, now=lambda: NOW).user == "ann"


def test_the_leeway_is_part_of_the_connections_life() -> None:
    reader = TokenReader(settings(leeway_s=5))
    principal = reader.read(token({"sub": "ann", "exp": NOW - 4, "nbf": NOW + 4}), now=lambda: NOW)
    assert principal.expires_at == NOW + 1


def test_a_token_of_tomorrow_is_refused() -> None:
    assert "not valid yet" in refusal(token({"sub": "ann", "nbf": NOW + 1}))


@pytest.mark.parametrize("value", [True, "1800000000", [], {}, 10**400])
def test_times_must_be_numbers(value: object) -> None:
    assert "exp" in refusal(token({"sub": "ann", "exp": value}))


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_times_must_be_finite(value: bytes) -> None:
    assert "exp" in refusal(token(b'{"sub":"ann","exp":' + value + b"}"))


@pytest.mark.parametrize("aud", [None, "", "theirs", ["theirs"], {"ours": 1}, "our", 5])
def test_the_audience_is_checked_where_set(aud: object) -> None:
    assert "aud" in refusal(token({"sub": "ann", "aud": aud}), audience="ours")


@pytest.mark.parametrize("aud", ["ours", ["theirs", "ours"]])
def test_the_right_audience_is_accepted_alone_or_among_others(aud: object) -> None:
    reader = TokenReader(settings(audience="ours"))
    assert reader.read(token({"sub": "ann", "aud": aud})).user == "ann"


def test_an_audience_is_not_looked_at_where_none_is_set() -> None:
    text = token({"sub": "ann", "aud": "theirs", "iss": "them"})
    assert TokenReader(settings()).read(text).user == "ann"


@pytest.mark.parametrize("iss", [None, "them", ["us"]])
def test_the_issuer_is_checked_where_set(iss: object) -> None:
    assert "iss" in refusal(token({"sub": "ann", "iss": iss}), issuer="us")
    assert TokenReader(settings(issuer="us")).read(token({"sub": "ann", "iss": "us"})).user == "ann"


def test_what_is_signed_here_is_read_here_until_it_expires() -> None:
    reader = TokenReader(settings(f"{SECRET}\n---\n{OTHER}", audience="ours", issuer="us"))
    text = reader.sign("ann", ["news", "team:*"], ["staff"], 60, now=lambda: NOW)
    principal = reader.read(text, now=lambda: NOW + 59)
    assert principal.user == "ann"
    assert principal.channels == {"news"}
    assert principal.patterns == ("team:*",)
    assert principal.groups == {"staff"}
    assert principal.expires_at == NOW + 60
    with pytest.raises(Unauthorized, match="expired"):
        reader.read(text, now=lambda: NOW + 60)
    # The first key signs. Older ones can be removed after the longest lifetime of a token.
    assert TokenReader(settings(SECRET)).read(text, now=lambda: NOW).user == "ann"


def test_a_token_may_be_signed_for_ever() -> None:
    reader = TokenReader(settings())
    assert reader.read(reader.sign("ann", [])).expires_at is None


def test_nothing_is_signed_that_would_be_refused() -> None:
    reader = TokenReader(settings())
    for user, channels in (("", []), ("ann", [""])):
        with pytest.raises(Unauthorized):
            reader.sign(user, channels)
    with pytest.raises(Unauthorized, match="expired"):
        reader.sign("ann", [], [], 0)


def test_without_a_key_nothing_is_signed() -> None:
    with pytest.raises(ConfigError, match="is not set"):
        TokenReader(settings("")).sign("ann", [])


def test_client_is_who_an_entry_can_address() -> None:
    reader = TokenReader(settings())
    claims = {"sub": "u", "client": "page-1"}
    assert "client:page-1" in reader.read(token(claims), now=lambda: NOW).selectors()
    assert reader.read(token({"sub": "u"}), now=lambda: NOW).client == ""
    for bad in (1, None, "a\nb", "x" * 256):
        assert "client" in refusal(token({"sub": "u", "client": bad}))
