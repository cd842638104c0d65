"""Verify native tokens (JWT) and turn them into principals; sign tokens for the command line.

A token is accepted only if a configured key has signed it with the configured algorithm. Error
texts never contain the token or a part of it, so that they can be logged and sent to clients.
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
from typing_extensions import override

from relay.config.settings import JwtSettings
from relay.core.errors import ConfigError, Unauthorized
from relay.core.model import Principal, parse_channel

# Limit the number of channels and groups, because each check of a client's rights iterates over
# them.
LIMIT_NAMES = 1000
# RFC 7518 section 3.2 requires the size of the hash, and PyJWT warns below it. The systems that
# sign these tokens use shorter secrets. Below 128 bits a secret can be guessed from a token.
MIN_SECRET_BYTES = 16
_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,255}")


class _Hmac(HMACAlgorithm):
    """PyJWT's HMAC with keys that were prepared and whose length was checked at the start."""

    @override
    def prepare_key(self, key: str | bytes) -> bytes:
        return key if isinstance(key, bytes) else super().prepare_key(key)

    @override
    def check_key_length(self, key: bytes) -> str | None:
        return None  # checked by _keys


class TokenReader:
    """Reads tokens with one set of settings. A reload creates a new reader."""

    def __init__(self, settings: JwtSettings, *, source: str = "[jwt] key") -> None:
        """Raise ConfigError, with the setting `source`, if a key does not fit the algorithm."""
        name = settings.algorithm
        # Register one algorithm only, so that the header of a token cannot select another one.
        self._jws = PyJWS(algorithms=[name])
        self._algorithm = self._jws.get_algorithm_by_name(name)
        if isinstance(self._algorithm, HMACAlgorithm):
            self._jws.unregister_algorithm(name)
            self._algorithm = _Hmac(self._algorithm.hash_alg)
            self._jws.register_algorithm(name, self._algorithm)
        self._settings = settings
        self._keys = _keys(settings, self._algorithm, source)

    def read(self, token: str, *, now: Callable[[], float] = time.time) -> Principal:
        """Return the token's principal. Raise Unauthorized, with the reason, if it is invalid."""
        if not self._keys:
            raise Unauthorized("tokens are not accepted: no key is configured")
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
        """Sign a token with the first key. It expires after `ttl_s`, or never if that is None.

        Raises:
            ConfigError: Tokens cannot be signed with these settings.
            Unauthorized: `read` would reject the token.
        """
        if not isinstance(self._algorithm, HMACAlgorithm):
            raise ConfigError(
                f"[jwt] algorithm: {self._settings.algorithm} tokens are signed with the private"
                " key, which relay does not have; relay signs with HS256, HS384 or HS512 only"
            )
        if not self._keys:
            raise ConfigError("[jwt] key is not set, so that no token can be signed")
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
        # Use `from None`: the texts of the library quote parts of the token.
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
        raise Unauthorized("invalid token signature")

    def claims(self, token: str) -> tuple[dict[str, Any], float | None]:
        """Return the claims of a token and the time of its expiry (seconds since the epoch).

        For protocols that name the user in other claims. Raise Unauthorized as `read` does.
        """
        if not self._keys:
            raise Unauthorized("tokens are not accepted: no key is configured")
        claims = self._payload(token)
        return claims, self._check(claims, time.time())

    def _check(self, claims: dict[str, Any], now: float) -> float | None:
        """Check times, issuer and audience. Return the time of expiry."""
        leeway_s = self._settings.leeway_s
        expires_at = _time(claims, "exp")
        if expires_at is not None:
            # The leeway applies while the connection lasts, not only when it is opened.
            expires_at += leeway_s
            if expires_at <= now:
                raise Unauthorized(f"the token has expired {now - expires_at:.0f} s ago")
        not_before = _time(claims, "nbf")
        if not_before is not None and not_before - leeway_s > now:
            raise Unauthorized("the token is not valid yet")
        if self._settings.issuer and claims.get("iss") != self._settings.issuer:
            raise Unauthorized("the token's iss is not accepted")
        if self._settings.audience:
            audience = claims.get("aud")
            if isinstance(audience, str):
                audience = [audience]
            if not isinstance(audience, list) or self._settings.audience not in audience:
                raise Unauthorized("the token's aud is not accepted")
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
                "the token's groups must have 1 to 255 characters without control characters"
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
    # bool is a subclass of int. A number with 400 digits cannot be converted to float.
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
        raise Unauthorized(f"the token's {name} must be strings")
    return tuple(value)


def _keys(settings: JwtSettings, algorithm: Algorithm, source: str) -> list[Any]:
    text = settings.key.get_secret_value()
    parts = [""]
    for line in text.splitlines():
        # Compare the whole line, because PEM keys contain `-----BEGIN`.
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
            raise ConfigError(f"{which} is not a valid key for {settings.algorithm}") from None
        if problem := algorithm.check_key_length(key):
            raise ConfigError(f"{which}: {problem}")
        keys.append(key)
    return keys
