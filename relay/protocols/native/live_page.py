"""Routes of the live page."""

from __future__ import annotations

from aiohttp import web

from relay.protocols.native import page


def routes() -> list[web.AbstractRouteDef]:
    """Return one route per file. The files are read once."""
    return [_route(asset) for asset in page.load()]


def _route(asset: page.Asset) -> web.RouteDef:
    async def serve(request: web.Request) -> web.Response:
        if request.headers.get("If-None-Match") == asset.headers["ETag"]:
            return web.Response(status=304, headers=asset.headers)
        # aiohttp sets the type itself if it is given as a header.
        headers = {**asset.headers, "Content-Type": asset.content_type}
        return web.Response(body=asset.body, headers=headers)

    return web.get(asset.path, serve)
