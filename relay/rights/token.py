"""A native token (JWT) -> Principal, and back for the command line.

Promise: only what a configured key signed with the configured algorithm becomes a principal. No
error text holds the token or a part of it, so that it may be logged and shown.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from jwt.algorithms import Algorithm, HMACAlgorithm
from jwt.api_jws import PyJWS
from jwt.exceptions import InvalidAlgorithmError, InvalidSignatureError, PyJWTError

from relay.config.settings import JwtSettings
from relay.core.errors import ConfigError, Unauthorized
from relay.core.model import Principal, parse_channel

# Each entry is looked at whenever this client's rights are.
LIMIT_NAMES = 1000
# RFC 7518 section 3.2 asks for the size of the hash, PyJWT warns below it. Shorter secrets are in
# use with the systems that sign these tokens; below 128 bits one can be guessed from a token.
MIN_SECRET_BYTES = 16
_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,255}")


class _Hmac(HMACAlgorithm):
    """PyJWT's HMAC with keys that were prepared, and whose length was judged, at the start."""

    def prepare_key(self, key: str | bytes) -> bytes:
        return key if isinstance(key, bytes) else super().prepare_key(key)

    def check_key_length(self, key: bytes) -> str | None:  # noqa: ARG002
        return None  # _keys has judged it


class TokenReader:
    """Reads tokens under one set of settings; after a reload there is a new reader."""

    def __init__(self, settings: JwtSettings, *, source: str = "[jwt] key") -> None:
        """ConfigError where a key does not fit the algorithm; `source` is the setting it names."""
        name = settings.algorithm
        # A PyJWS that knows one algorithm: whatever a token's header says, no other code runs.
        self._jws = PyJWS(algorithms=[name])
        self._algorithm = self._jws.get_algorithm_by_name(name)
        if isinstance(self._algorithm, HMACAlgorithm):
            self._jws.unregister_algorithm(name)
            self._algorithm = _Hmac(self._algorithm.hash_alg)
            self._jws.register_algorithm(name, self._algorithm)
        self._settings = settings
        self._keys = _keys(settings, self._algorithm, source)

    def read(self, token: str, *, now: Callable[[], float] = time.time) -> Principal:
        """Who the token names; Unauthorized with the reason where it opens nothing."""
        if not self._keys:
            raise Unauthorized("tokens are not accepted here: no key is configured")
        return self._principal(self._payload(token), now())

    def sign(
        self,
        user: str,
        channels: Sequence[str],
        groups: Sequence[str] = (),
        ttl_s: float | None = None,
        *,
        now: Callable[[], float] = time.time,
    ) -> str:
        """A token that `read` accepts, valid for `ttl_s` (None: for ever), by the first key.

        ConfigError where these settings cannot sign, Unauthorized where `read` would refuse it.
        """
        if not isinstance(self._algorithm, HMACAlgorithm):
            raise ConfigError(
                f"[jwt] algorithm: {self._settings.algorithm} tokens are signed by whoever has the"
                " private key; the relay signs with HS256, HS384 or HS512 only"
            )
        if not self._keys:
            raise ConfigError("[jwt] key: none is configured, so that no token can be signed")
        issued = now()
        claims: dict[str, Any] = {"sub": user, "channels": list(channels), "iat": int(issued)}
        if groups:
            claims["groups"] = list(groups)
        if ttl_s is not None:
            claims["exp"] = issued + ttl_s
        if self._settings.audience:
            claims["aud"] = self._settings.audience
        if self._settings.issuer:
            claims["iss"] = self._settings.issuer
        self._principal(claims, issued)
        payload = json.dumps(claims, separators=(",", ":")).encode()
        return self._jws.encode(payload, self._keys[0], algorithm=self._settings.algorithm)

    def _payload(self, token: str) -> dict[str, Any]:
        # `from None` throughout: the library's texts quote parts of the token.
        for key in self._keys:
            try:
                payload = json.loads(
                    self._jws.decode(token, key=key, algorithms=[self._settings.algorithm])
                )
            except InvalidSignatureError:
                continue
            except InvalidAlgorithmError:
                raise Unauthorized(
                    f"the token is not signed with {self._settings.algorithm}"
                ) from None
            except (PyJWTError, ValueError, RecursionError):
                raise Unauthorized("the token cannot be decoded") from None
            if not isinstance(payload, dict):
                raise Unauthorized("the token's payload is not a JSON object")
            return payload
        raise Unauthorized("the token's signature fits no configured key")

    def claims(
        self, token: str, *, now: Callable[[], float] = time.time
    ) -> tuple[dict[str, Any], float | None]:
        """What a valid token says and when it expires (seconds since the epoch), for doors whose
        tokens name users in their own way; Unauthorized as `read`."""
        if not self._keys:
            raise Unauthorized("tokens are not accepted here: no key is configured")
        claims = self._payload(token)
        return claims, self._check(claims, now())

    def _check(self, claims: dict[str, Any], now: float) -> float | None:
        """Times, issuer and audience; when it expires."""
        leeway_s = self._settings.leeway_s
        expires_at = _time(claims, "exp")
        if expires_at is not None:
            # The leeway counts for the whole life of the connection, not only at its start.
            expires_at += leeway_s
            if expires_at <= now:
                raise Unauthorized("the token has expired")
        not_before = _time(claims, "nbf")
        if not_before is not None and not_before - leeway_s > now:
            raise Unauthorized("the token is not valid yet")
        if self._settings.issuer and claims.get("iss") != self._settings.issuer:
            raise Unauthorized("the token's iss is not the one accepted here")
        if self._settings.audience:
            audience = claims.get("aud")
            if isinstance(audience, str):
                audience = [audience]
            if not isinstance(audience, list) or self._settings.audience not in audience:
                raise Unauthorized("the token's aud is not the one accepted here")
        return expires_at

    def _principal(self, claims: dict[str, Any], now: float) -> Principal:
        expires_at = self._check(claims, now)
        user = claims.get("sub")
        # A user with an empty name could not be revoked, addressed or counted.
        if not isinstance(user, str) or not _NAME.fullmatch(user):
            raise Unauthorized(
                "the token's sub must be 1 to 255 characters without control characters"
            )
        client = claims.get("client", "")
        if not isinstance(client, str) or not (client == "" or _NAME.fullmatch(client)):
            raise Unauthorized(
                "the token's client must be at most 255 characters without control characters"
            )
        channels = _texts(claims, "channels")
        try:
            for channel in channels:
                parse_channel(channel)
        except ValueError as exc:
            raise Unauthorized(f"the token's channels: {exc}") from None
        groups = _texts(claims, "groups")
        if not all(map(_NAME.fullmatch, groups)):
            raise Unauthorized(
                "the token's groups must be texts of 1 to 255 characters without control characters"
            )
        return Principal(
            user=user,
            groups=frozenset(groups),
            client=client,
            expires_at=expires_at,
            channels=frozenset(name for name in channels if "*" not in name),
            patterns=tuple(name for name in channels if "*" in name),
        )


def _time(claims: dict[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    # bool is an int in Python; a number of 400 digits is no float.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise Unauthorized(f"the token's {name} is not a time in seconds")


def _texts(claims: dict[str, Any], name: str) -> tuple[str, ...]:
    value = claims.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > LIMIT_NAMES:
        raise Unauthorized(f"the token's {name} is not a list of at most {LIMIT_NAMES} names")
    if not all(isinstance(each, str) for each in value):
        raise Unauthorized(f"the token's {name} must be texts")
    return tuple(value)


def _keys(settings: JwtSettings, algorithm: Algorithm, source: str) -> list[Any]:
    text = settings.key.get_secret_value()
    parts = [""]
    for line in text.splitlines():
        # A whole line: every PEM key has `-----BEGIN`.
        if line.strip() == "---":
            parts.append("")
        else:
            parts[-1] += line + "\n"
    keys = []
    for number, part in enumerate(parts, 1):
        secret = part.strip()
        if not secret:
            if len(parts) > 1:
                raise ConfigError(f"{source}: key {number} of {len(parts)} is empty")
            continue
        which = f"{source}: key {number} of {len(parts)}"
        if isinstance(algorithm, HMACAlgorithm) and len(secret.encode()) < MIN_SECRET_BYTES:
            raise ConfigError(f"{which} is too short: at least {MIN_SECRET_BYTES} bytes")
        try:
            key = algorithm.prepare_key(secret)
        except (PyJWTError, ValueError, TypeError):  # the cause may quote the key
            raise ConfigError(f"{which} is no key for {settings.algorithm}") from None
        if problem := algorithm.check_key_length(key):
            raise ConfigError(f"{which}: {problem}")
        keys.append(key)
    return keys
