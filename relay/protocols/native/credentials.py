"""Authenticate a request, and check its Origin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from aiohttp import web

from relay.core.errors import Forbidden, Unauthorized
from relay.core.model import Principal
from relay.doorkit.origins import AllowedOrigins, shown
from relay.protocols.native.settings import COOKIE_NAME


def principal_of(
    request: web.Request,
    read_token: Callable[[str], Principal],
    origins: AllowedOrigins,
    *,
    insecure: bool,
) -> Principal:
    """Return the principal of the token in header, query or cookie, in this order.

    Without a token the client is anonymous. Browsers send cookies with requests of any page, so a
    cookie is accepted only from this host and from allowed origins.
    """
    header = request.headers.get("Authorization")
    if header is not None:
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthorized("Authorization must be: Bearer TOKEN")
        return _read(read_token, token.strip(), insecure=insecure)
    if "token" in request.query:
        return _read(read_token, request.query["token"], insecure=insecure)
    if COOKIE_NAME in request.cookies:
        _check_origin(request, origins)
        return _read(read_token, request.cookies[COOKIE_NAME], insecure=insecure)
    return Principal(unrestricted=insecure)


def _read(read_token: Callable[[str], Principal], token: str, *, insecure: bool) -> Principal:
    principal = read_token(token)
    if not insecure:
        return principal
    return replace(principal, unrestricted=True)


def _check_origin(request: web.Request, origins: AllowedOrigins) -> None:
    if origins.allow_cookie(request.headers):
        return
    origin = request.headers.get("Origin")
    if origin is None:
        raise Forbidden("a cookie needs an Origin; send the token in the Authorization header")
    raise Forbidden(
        f"Origin {shown(origin)} is not allowed; add it to [protocol:native] allowed_origins"
    )
