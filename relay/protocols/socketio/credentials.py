"""Who a client is: AcceleratXR's JWT, wherever it may stand.

The payload is `{"profile": {"uid", "roles", ...}, "exp", ...}`; later libraries send `profile` as
JSON text. Places, in this order: what a 3.x or 4.x client gives as `auth` (`token` or
`jwt_token`), the query `jwt_token` (AcceleratXR's JWTStrategy; a 2.x client repeats it with the
namespace), the header `Authorization: JWT T` or `Bearer T`, the cookie `jwt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs

import orjson

from relay.core.errors import Forbidden, Unauthorized

if TYPE_CHECKING:
    from multidict import MultiMapping

    from relay.rights.token import TokenReader
    from relay.transports.socket.exchange import HttpRequest

_QUERY = "jwt_token"
_COOKIE = "jwt"
_MOST_ROLES = 1000


class Profile(NamedTuple):
    """What the relay needs of a user."""

    uid: str
    roles: frozenset[str]
    expires_at: float | None


def find_token(
    asked: HttpRequest, auth: Mapping[str, Any], query: str, origins: frozenset[str]
) -> str:
    """The first token there is; Unauthorized without any, Forbidden for a foreign page's cookie."""
    for name in ("token", _QUERY):
        if isinstance(given := auth.get(name), str) and given:
            return _bare(given)
    for given in (*parse_qs(query).get(_QUERY, ()), *asked.query.getall(_QUERY, ())):
        if given:
            return _bare(given)
    header = asked.headers.get("Authorization", "")
    scheme, _, given = header.partition(" ")
    if scheme.lower() in ("jwt", "bearer") and given.strip():
        return given.strip()
    given = _cookie(asked.headers)
    if given:
        check_origin(asked.headers, origins)
        return given
    raise Unauthorized("a token is required")


def _bare(token: str) -> str:
    # Some clients put the header's whole value into auth or query.
    scheme, space, rest = token.partition(" ")
    return rest.strip() if space and scheme.lower() in ("jwt", "bearer") else token


def _cookie(headers: MultiMapping[str]) -> str:
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("Cookie", ""))
    except CookieError:
        return ""
    return cookies[_COOKIE].value if _COOKIE in cookies else ""


def check_origin(headers: MultiMapping[str], origins: frozenset[str]) -> None:
    """Forbidden unless the Origin is this host's or an allowed one: a browser sends a cookie along
    with any page's request. A same-origin GET has no Origin; its Sec-Fetch-Site says so."""
    origin = headers.get("Origin")
    if origin is None:
        if headers.get("Sec-Fetch-Site") in ("same-origin", "none"):
            return
        raise Forbidden("a cookie needs an Origin; send the token in the query or in a header")
    host = headers.get("Host", "").lower()
    if origin.lower() not in origins | {f"http://{host}", f"https://{host}"}:
        raise Forbidden("this Origin is not in [protocol:socketio] allowed_origins")


def read_profile(reader: TokenReader, token: str) -> Profile:
    """The user that a token names; Unauthorized where it opens nothing."""
    claims, expires_at = reader.claims(token)
    profile = claims.get("profile")
    if isinstance(profile, str):
        try:
            profile = orjson.loads(profile)
        except orjson.JSONDecodeError:
            # Compressed or encrypted ones exist (JWTUtils), and their settings are their site's.
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
