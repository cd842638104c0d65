"""What a Seafile server and its clients prove themselves with: three generations of one key.

* until February 2023: the shared `notification_token`, as it is;
* 10.0, 11.0: a JWT in `Seafile-Repo-Token`, signed with `jwt_private_key`;
* 12.0 on: the same JWT as `Authorization: Token <jwt>`, signed with `JWT_PRIVATE_KEY`.

Rules read in notification-server's server.go and measured on 11.0 and 13.0: HS256, HS384 and HS512
count, `exp` is a whole number that lies in the future, to the second and without leeway. No error
text holds a token or a part of it.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass
from typing import Any

from jwt.algorithms import HMACAlgorithm
from jwt.api_jws import PyJWS
from jwt.exceptions import InvalidSignatureError, PyJWTError

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
    """PyJWT's HMAC for keys of any length, because Seafile's scripts choose it."""

    def prepare_key(self, key: str | bytes) -> bytes:
        return key if isinstance(key, bytes) else key.encode()

    def check_key_length(self, key: bytes) -> str | None:  # noqa: ARG002
        return None


class SeafTokens:
    """Reads tokens signed with one of the keys; without a key it refuses all, since anyone could
    sign. `key` has several separated by a line with ---."""

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
            raise InvalidSeafileToken("its payload is not an object")
        expires_at = claims.get("exp")
        if type(expires_at) is not int:
            raise InvalidSeafileToken("it has no exp, or one that is not a whole number")
        if expires_at <= int(now):
            raise InvalidSeafileToken("it has expired")
        not_before = claims.get("nbf")
        # Ignored by 10 and 11, checked by the library of 12 on; none of the senders sets it.
        if isinstance(not_before, int | float) and not_before > now:
            raise InvalidSeafileToken("it is not valid yet")
        return SeafileClaims(expires_at, _text(claims, "repo_id"), _text(claims, "username"))

    def _payload(self, token: str) -> object:
        for key in self._keys:
            try:
                return json.loads(self._jws.decode(token, key=key, algorithms=[*ALGORITHMS]))
            except InvalidSignatureError:
                continue
            # `from None`: the library's texts quote parts of the token.
            except (PyJWTError, ValueError, RecursionError):
                raise InvalidSeafileToken("it is not a token") from None
        raise InvalidSeafileToken("its signature does not fit the key")

    def read_for(self, repo_id: str, token: str, now: float) -> SeafileClaims:
        """Like `read`. Raises InvalidSeafileToken if the token is for another library, too."""
        claims = self.read(token, now)
        if claims.repo_id != repo_id:
            raise InvalidSeafileToken("it is for another library")
        return claims

    def check_sender(
        self, repo_token: str | None, authorization: str | None, now: float, *, clients: bool
    ) -> None:
        """Raise InvalidSeafileToken unless one of the two headers allows posting events.

        `repo_token` is `Seafile-Repo-Token`, `authorization` is `Authorization`. A token that names
        a user was given to a client for subscribing; it counts only with `clients`.
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
            reason = "it is a client's token for subscribing"
        raise InvalidSeafileToken(reason)


def _second_word(authorization: str | None) -> str:
    # Split at single blanks; neither the first word nor those after the second are looked at.
    words = (authorization or "").split(" ")
    return words[1] if len(words) > 1 else ""


def _text(claims: dict[str, Any], name: str) -> str:
    value = claims.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidSeafileToken(f"its {name} is not a text")
    return value
