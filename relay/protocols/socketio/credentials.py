"""Read AcceleratXR's JWT from a client's request.

The payload is `{"profile": {"uid", "roles", ...}, "exp", ...}`; later libraries send `profile` as
JSON text. The token is searched in this order:

1. `token` or `jwt_token` in the `auth` object of a 3.x or 4.x client;
2. the query field `jwt_token` (AcceleratXR's JWTStrategy; a 2.x client repeats it with the
   namespace);
3. the header `Authorization: JWT T` or `Bearer T`;
4. the cookie `jwt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs

import orjson

from relay.core.errors import Unauthorized

if TYPE_CHECKING:
    from multidict import MultiMapping

    from relay.doorkit.origins import AllowedOrigins
    from relay.rights.token import TokenReader
    from relay.transports.socket.exchange import HttpRequest

_QUERY = "jwt_token"
_COOKIE = "jwt"
_MOST_ROLES = 1000


class Profile(NamedTuple):
    """The part of a user's profile that relay uses."""

    uid: str
    roles: frozenset[str]
    expires_at: float | None


def find_token(
    request: HttpRequest, auth: Mapping[str, Any], query: str, origins: AllowedOrigins
) -> str:
    """Return the first token.

    Raises:
        Unauthorized: There is no token.
        Forbidden: The only token is the cookie, and the page's Origin is not allowed.
    """
    for name in ("token", _QUERY):
        if isinstance(given := auth.get(name), str) and given:
            return _bare(given)
    for given in (*parse_qs(query).get(_QUERY, ()), *request.query.getall(_QUERY, ())):
        if given:
            return _bare(given)
    header = request.headers.get("Authorization", "")
    scheme, _, given = header.partition(" ")
    if scheme.lower() in ("jwt", "bearer") and given.strip():
        return given.strip()
    given = _cookie(request.headers)
    if given:
        origins.check_cookie(request.headers, "send the token in the query or in a header")
        return given
    raise Unauthorized("a token is required")


def _bare(token: str) -> str:
    # Some clients send the header's whole value in auth or query.
    scheme, space, rest = token.partition(" ")
    return rest.strip() if space and scheme.lower() in ("jwt", "bearer") else token


def _cookie(headers: MultiMapping[str]) -> str:
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("Cookie", ""))
    except CookieError:
        return ""
    return cookies[_COOKIE].value if _COOKIE in cookies else ""


def read_profile(reader: TokenReader, token: str) -> Profile:
    """Return the user's profile in a token. Raise Unauthorized if the token is not valid."""
    claims, expires_at = reader.claims(token)
    profile = claims.get("profile")
    if isinstance(profile, str):
        try:
            profile = orjson.loads(profile)
        except orjson.JSONDecodeError:
            # JWTUtils can compress or encrypt profiles. Relay does not support that.
            raise Unauthorized("the token's profile is neither an object nor JSON") from None
    if not isinstance(profile, dict):
        raise Unauthorized("the token has no profile")
    uid = profile.get("uid")
    if not isinstance(uid, str) or not uid or len(uid) > 200 or not uid.isprintable():
        raise Unauthorized("the token's profile has no uid")
    roles = profile.get("roles")
    if not isinstance(roles, list):
        roles = []
    names = [role for role in roles[:_MOST_ROLES] if isinstance(role, str) and role]
    return Profile(uid, frozenset(names), expires_at)
