"""Authenticate a request, and check its Origin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from aiohttp import web

from relay.core.errors import Unauthorized
from relay.core.model import Principal
from relay.doorkit.origins import AllowedOrigins
from relay.protocols.native.settings import COOKIE_NAME
from relay.transports.socket import websocket

# `new WebSocket(url, ["access_token", TOKEN])`.
SUBPROTOCOL = "access_token"


def principal_of(
    request: web.Request,
    read_token: Callable[[str], Principal],
    origins: AllowedOrigins,
    *,
    insecure: bool,
) -> Principal:
    """Return the principal of the token in header, subprotocol, query or cookie, in this order.

    Without a token the client is anonymous. Browsers send cookies with requests of any page, so a
    cookie is accepted only from this host and from allowed origins.
    """
    header = request.headers.get("Authorization")
    if header is not None:
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthorized("Authorization must be: Bearer TOKEN")
        return _read(read_token, token.strip(), insecure=insecure)
    offered = websocket.subprotocols(request)
    if offered[:1] == [SUBPROTOCOL] and len(offered) == 2:
        # The only header that a page can set for a WebSocket.
        return _read(read_token, offered[1], insecure=insecure)
    if "token" in request.query:
        return _read(read_token, request.query["token"], insecure=insecure)
    if COOKIE_NAME in request.cookies:
        origins.check_cookie(request.headers, "send the token in the Authorization header")
        return _read(read_token, request.cookies[COOKIE_NAME], insecure=insecure)
    return Principal(unrestricted=insecure)


def _read(read_token: Callable[[str], Principal], token: str, *, insecure: bool) -> Principal:
    principal = read_token(token)
    if not insecure:
        return principal
    return replace(principal, unrestricted=True)
