"""Routes of several doors on one path: who upgrades is asked first, who takes what is left last.

A door knows nothing of the others; so it says of a route what kind it is, and the server puts the
routes of all doors in that order.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web
from aiohttp.web_urldispatcher import DynamicResource, UrlMappingMatchInfo

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class UpgradeRoute(web.AbstractRouteDef):
    """Requests of this pattern that want a websocket; whatever else comes there is another
    route's."""

    def __init__(self, pattern: str, handler: Handler) -> None:
        self._pattern = pattern
        self._handler = handler

    def register(self, router: web.UrlDispatcher) -> list[web.AbstractRoute]:
        """As aiohttp wants it."""
        resource = _UpgradeResource(self._pattern)
        router.register_resource(resource)
        return [resource.add_route("*", self._handler)]


class FallbackRoute(web.AbstractRouteDef):
    """Requests of this pattern, of any method, that no other route takes."""

    def __init__(self, pattern: str, handler: Handler) -> None:
        self._pattern = pattern
        self._handler = handler

    def register(self, router: web.UrlDispatcher) -> list[web.AbstractRoute]:
        """As aiohttp wants it."""
        return [router.add_route("*", self._pattern, self._handler)]


class _UpgradeResource(DynamicResource):
    async def resolve(self, request: web.Request) -> tuple[UrlMappingMatchInfo | None, set[str]]:
        """Nothing, and no method either, for a request that does not upgrade."""
        if "websocket" not in request.headers.get("Upgrade", "").lower():
            return None, set()
        return await super().resolve(request)

    def raw_match(self, path: str) -> bool:  # noqa: ARG002
        """Never: aiohttp would add the next route of the same pattern here."""
        return False


def in_order(routes: Iterable[web.AbstractRouteDef]) -> list[web.AbstractRouteDef]:
    """The routes as they must be registered; among equals the order stays."""
    return sorted(routes, key=_rank)


def _rank(route: web.AbstractRouteDef) -> int:
    return 0 if isinstance(route, UpgradeRoute) else 2 if isinstance(route, FallbackRoute) else 1
