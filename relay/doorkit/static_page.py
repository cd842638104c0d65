"""Static files of a web page, read once, that load nothing from other hosts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import NamedTuple

from aiohttp import web

_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
# Allows only what such a page needs. img-src is for the tab's icon.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Asset(NamedTuple):
    """One file with its path and response headers."""

    path: str
    content_type: str
    body: bytes
    headers: Mapping[str, str]


def load(
    package: str, names: Iterable[tuple[str, str]], *, policy: str = CONTENT_SECURITY_POLICY
) -> tuple[Asset, ...]:
    """Read files of `package`. `names` are pairs of a path and a file's name.

    A stylesheet begins with page.css, the colours and elements that all pages share.
    """
    folder = files(package)

    def body(name: str) -> bytes:
        shared = (files(__package__) / "page.css").read_bytes() if name.endswith(".css") else b""
        return shared + (folder / name).read_bytes()

    return tuple(_asset(path, name, body(name), policy) for path, name in names)


def routes(assets: Iterable[Asset]) -> list[web.AbstractRouteDef]:
    """Return one route per file."""
    return [_route(asset) for asset in assets]


def _asset(path: str, name: str, body: bytes, policy: str) -> Asset:
    headers = {
        "Content-Security-Policy": policy,
        # Browsers must revalidate, so that no old script is used after an upgrade of relay.
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:24]}"',
        "X-Content-Type-Options": "nosniff",
        # The URL of a stream that a page opens may contain a token.
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    return Asset(path, _TYPES[name.rpartition(".")[2]], body, headers)


def _route(asset: Asset) -> web.RouteDef:
    async def serve(request: web.Request) -> web.Response:
        return respond(request, asset)

    return web.get(asset.path, serve)


def respond(request: web.Request, asset: Asset) -> web.Response:
    """Return the file, or status 304 if the browser has it."""
    if request.headers.get("If-None-Match") == asset.headers["ETag"]:
        return web.Response(status=304, headers=asset.headers)
    # aiohttp sets the type itself if it is given as a header.
    headers = {**asset.headers, "Content-Type": asset.content_type}
    return web.Response(body=asset.body, headers=headers)
