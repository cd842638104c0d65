"""SockJS responses without a session: headers, greeting, info and the iframe page."""

from __future__ import annotations

import hashlib
import html
import secrets
from collections.abc import Iterable
from email.utils import formatdate
from time import time

from multidict import MultiMapping

from relay.core.client_libraries import allowed_headers
from relay.transports.socket.exchange import HttpAnswer

PLAIN = "text/plain; charset=UTF-8"
SCRIPT = "application/javascript; charset=UTF-8"
HTML = "text/html; charset=UTF-8"
_YEAR_S = 31_536_000

NOT_CACHED = {"Cache-Control": "no-store, no-cache, no-transform, must-revalidate, max-age=0"}

# Internet Explorer does not render a page before it has received this much (sockjs-protocol,
# "HtmlFile").
_HTMLFILE_BYTES = 1024


def cors(headers: MultiMapping[str]) -> dict[str, str]:
    """Return CORS headers that allow any origin.

    This is safe because clients authenticate in their messages and not by cookies.
    """
    origin = headers.get("Origin", "")
    answer = {"Access-Control-Allow-Origin": origin if origin and origin.isascii() else "*"}
    if origin and origin.isascii():
        answer |= {"Access-Control-Allow-Credentials": "true", "Vary": "Origin"}
    return answer | allowed_headers(headers)


def _cached() -> dict[str, str]:
    return {
        "Cache-Control": f"public, max-age={_YEAR_S}",
        "Expires": formatdate(time() + _YEAR_S, usegmt=True),
    }


def preflight(headers: MultiMapping[str], methods: str) -> HttpAnswer:
    """Return the response to OPTIONS."""
    allowed = {"Access-Control-Allow-Methods": methods, "Access-Control-Max-Age": str(_YEAR_S)}
    return HttpAnswer(204, b"", _cached() | cors(headers) | allowed)


def not_allowed(methods: Iterable[str]) -> HttpAnswer:
    """Return the response to a method other than `methods`."""
    return HttpAnswer(405, b"", {"Allow": ", ".join(methods)})


def greeting() -> HttpAnswer:
    """Return the response for the base URL."""
    return HttpAnswer(200, b"Welcome to SockJS!\n", {"Content-Type": PLAIN})


def info(headers: MultiMapping[str]) -> HttpAnswer:
    """Return the response to a client's first request.

    `entropy` is for old browsers without a random number generator.
    """
    body = (
        b'{"websocket":true,"cookie_needed":false,"origins":["*:*"],"entropy":%d}\n'
        % secrets.randbits(32)
    )
    kind = {"Content-Type": "application/json; charset=UTF-8"}
    return HttpAnswer(200, body, kind | NOT_CACHED | cors(headers))


def iframe(headers: MultiMapping[str], sockjs_url: str) -> HttpAnswer:
    """Return a page of this origin that loads the client, for transports without CORS."""
    body = (
        '<!DOCTYPE html>\n<html>\n<head>\n<meta charset="UTF-8">\n'
        '<meta http-equiv="X-UA-Compatible" content="IE=edge">\n'
        f'<script src="{html.escape(sockjs_url)}"></script>\n'
        "<script>document.domain = document.domain; SockJS.bootstrap_iframe();</script>\n"
        "</head>\n<body></body>\n</html>\n"
    ).encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    known = [each.strip() for each in headers.get("If-None-Match", "").split(",")]
    if tag in known or f"W/{tag}" in known:
        return HttpAnswer(304, b"", _cached() | {"ETag": tag})
    return HttpAnswer(200, body, {"Content-Type": HTML, "ETag": tag} | _cached())


def htmlfile_page(callback: str) -> bytes:
    """Return the beginning of an htmlfile response.

    `callback` is the name of an object in the surrounding page.
    """
    page = (
        '<!doctype html>\n<html><head>\n<meta http-equiv="Content-Type" '
        'content="text/html; charset=UTF-8">\n</head><body>\n<script>\n'
        f"document.domain = document.domain;\nvar c = parent.{callback};\nc.start();\n"
        "function p(d) { c.message(d); }\nwindow.onload = function() { c.stop(); };\n</script>\n"
    ).encode()
    return page.ljust(_HTMLFILE_BYTES) + b"\r\n\r\n"
