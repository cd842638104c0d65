"""Authenticate a request, and check its Origin."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from aiohttp import web

from relay.core.errors import Forbidden, Unauthorized
from relay.core.model import Principal
from relay.protocols.native.settings import COOKIE_NAME

_log = logging.getLogger(__name__)
# A browser's Origin is a scheme, a host name of at most 253 characters and a port.
_ORIGIN_CHARS = 300


def principal_of(
    request: web.Request,
    read_token: Callable[[str], Principal],
    origins: frozenset[str],
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
        check_origin(request, origins)
        return _read(read_token, request.cookies[COOKIE_NAME], insecure=insecure)
    return Principal(unrestricted=insecure)


def _read(read_token: Callable[[str], Principal], token: str, *, insecure: bool) -> Principal:
    principal = read_token(token)
    if not insecure:
        return principal
    return replace(principal, unrestricted=True)


def check_origin(request: web.Request, origins: frozenset[str]) -> None:
    """Raise Forbidden unless the Origin of the request is this host or allowed.

    For a request of EventSource to the page's own host, browsers send no Origin, but
    Sec-Fetch-Site.
    """
    origin = request.headers.get("Origin")
    if origin is None:
        if request.headers.get("Sec-Fetch-Site") in ("same-origin", "none"):
            return
        raise Forbidden("a cookie needs an Origin; send the token in the Authorization header")
    if not is_allowed(request, origin, origins):
        raise Forbidden(
            f"Origin {_shown(origin)} is not allowed; add it to [protocol:native] allowed_origins"
        )


def is_allowed(request: web.Request, origin: str, origins: frozenset[str]) -> bool:
    """Return True if `origin` is the request's own host or a configured origin."""
    origin = origin.lower()
    return origin in origins or origin in (
        f"http://{request.host}".lower(),
        f"https://{request.host}".lower(),
    )


def cors_headers(request: web.Request, origins: frozenset[str]) -> dict[str, str]:
    """Return the headers that let a page of an allowed origin read the response.

    Log the origin of any other page: its browser discards the response and shows the page no
    reason.
    """
    origin = request.headers.get("Origin")
    if origin is None:
        return {"Vary": "Origin"}
    if not is_allowed(request, origin, origins):
        _log.warning(
            "Pages of origin %s cannot read %s: add the origin to [protocol:native] "
            "allowed_origins to allow it",
            _shown(origin),
            request.path,
        )
        return {"Vary": "Origin"}
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Credentials": "true",
        "Vary": "Origin",
    }


def _shown(origin: str) -> str:
    return ascii(origin[:_ORIGIN_CHARS])
