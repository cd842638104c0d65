"""Tokens of Seafile's servers and clients, in the formats of three generations.

* until February 2023: the shared `notification_token` in plain text;
* 10.0, 11.0: a JWT in `Seafile-Repo-Token`, signed with `jwt_private_key`;
* since 12.0: the same JWT as `Authorization: Token <jwt>`, signed with `JWT_PRIVATE_KEY`.

HS256, HS384 and HS512 are accepted. `exp` must be an integer in the future, without leeway.
Sources: notification-server's server.go, and measurements on 11.0 and 13.0. Error texts never
contain parts of a token.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass
from typing import Any

from jwt.algorithms import HMACAlgorithm
from jwt.api_jws import PyJWS
from jwt.exceptions import InvalidSignatureError, PyJWTError
from typing_extensions import override

ALGORITHMS = ("HS256", "HS384", "HS512")


class InvalidSeafileToken(Exception):
    """The token is invalid. The text is for the log."""


@dataclass(frozen=True, slots=True)
class SeafileClaims:
    """Claims of a valid token. `username` and `repo_id` are empty if they are missing."""

    expires_at: int
    repo_id: str
    username: str


class _AnyLengthHmac(HMACAlgorithm):
    """PyJWT's HMAC for keys of any length, because Seafile's scripts choose the length."""

    @override
    def prepare_key(self, key: str | bytes) -> bytes:
        return key if isinstance(key, bytes) else key.encode()

    @override
    def check_key_length(self, key: bytes) -> str | None:
        return None


class SeafTokens:
    """Verifies tokens.

    `key` may contain several keys, separated by a line with ---. Without a key, all tokens are
    rejected.
    """

    def __init__(self, key: str, notification_token: str = "") -> None:
        self._keys = [each.encode() for each in key.split("\n---\n") if each]
        self._shared = notification_token.encode()
        self._jws = PyJWS(algorithms=[])
        for name in ALGORITHMS:
            self._jws.register_algorithm(
                name, _AnyLengthHmac(getattr(HMACAlgorithm, name.replace("HS", "SHA")))
            )

    def read(self, token: str, now: float) -> SeafileClaims:
        """Return the claims of a token. Raise InvalidSeafileToken if invalid at `now` (s)."""
        if not self._keys:
            raise InvalidSeafileToken("no key is configured")
        claims = self._payload(token)
        if not isinstance(claims, dict):
            raise InvalidSeafileToken("token payload is not an object")
        expires_at = claims.get("exp")
        if type(expires_at) is not int:
            raise InvalidSeafileToken("token has no integer exp")
        if expires_at <= int(now):
            raise InvalidSeafileToken(f"token has expired {now - expires_at:.0f} s ago")
        not_before = claims.get("nbf")
        # Seafile 10 and 11 ignore nbf, later versions check it. No sender sets it.
        if isinstance(not_before, int | float) and not_before > now:
            raise InvalidSeafileToken("token is not valid yet")
        return SeafileClaims(expires_at, _text(claims, "repo_id"), _text(claims, "username"))

    def _payload(self, token: str) -> object:
        for key in self._keys:
            try:
                return json.loads(self._jws.decode(token, key=key, algorithms=[*ALGORITHMS]))
            except InvalidSignatureError:
                continue
            # `from None`, because the library's texts quote parts of the token.
            except (PyJWTError, ValueError, RecursionError):
                raise InvalidSeafileToken("malformed token") from None
        raise InvalidSeafileToken("invalid token signature")

    def read_for(self, repo_id: str, token: str, now: float) -> SeafileClaims:
        """Like `read`. Also raises InvalidSeafileToken if the token is for another library."""
        claims = self.read(token, now)
        if claims.repo_id != repo_id:
            raise InvalidSeafileToken("token is for another library")
        return claims

    def check_sender(
        self, repo_token: str | None, authorization: str | None, now: float, *, clients: bool
    ) -> None:
        """Raise InvalidSeafileToken unless one of the two headers allows posting events.

        `repo_token` is `Seafile-Repo-Token`, `authorization` is `Authorization`. Tokens with a user
        are issued to clients for subscribing. They are accepted only if `clients` is True.
        """
        given = [token for token in (repo_token, _second_word(authorization)) if token]
        if not given:
            raise InvalidSeafileToken("no token")
        reason = ""
        for token in given:
            if self._shared and hmac.compare_digest(token.encode(errors="replace"), self._shared):
                return
            try:
                claims = self.read(token, now)
            except InvalidSeafileToken as exc:
                reason = str(exc)
                continue
            if clients or not claims.username:
                return
            reason = (
                "token is a client's, for subscribing (see [protocol:seafile] client_tokens_post)"
            )
        raise InvalidSeafileToken(reason)


def _second_word(authorization: str | None) -> str:
    # Split at single spaces, and ignore all words except the second, as Seafile's server does.
    words = (authorization or "").split(" ")
    return words[1] if len(words) > 1 else ""


def _text(claims: dict[str, Any], name: str) -> str:
    value = claims.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidSeafileToken(f"{name} in the token is not a string")
    return value
