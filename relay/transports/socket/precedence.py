"""Order of routes if several protocols use the same path.

Routes for WebSocket upgrades come first and fallback routes last. Protocols mark their routes, and
the server sorts the routes of all protocols.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web
from aiohttp.web_urldispatcher import DynamicResource, UrlMappingMatchInfo

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class UpgradeRoute(web.AbstractRouteDef):
    """A route that matches WebSocket upgrade requests only."""

    def __init__(self, pattern: str, handler: Handler) -> None:
        self._pattern = pattern
        self._handler = handler

    def register(self, router: web.UrlDispatcher) -> list[web.AbstractRoute]:
        """Register the route (aiohttp's interface)."""
        resource = _UpgradeResource(self._pattern)
        router.register_resource(resource)
        return [resource.add_route("*", self._handler)]


class FallbackRoute(web.AbstractRouteDef):
    """A route for requests of any method that no other route matches."""

    def __init__(self, pattern: str, handler: Handler) -> None:
        self._pattern = pattern
        self._handler = handler

    def register(self, router: web.UrlDispatcher) -> list[web.AbstractRoute]:
        """Register the route (aiohttp's interface)."""
        return [router.add_route("*", self._pattern, self._handler)]


class _UpgradeResource(DynamicResource):
    async def resolve(self, request: web.Request) -> tuple[UrlMappingMatchInfo | None, set[str]]:
        """Return no match for a request that is not an upgrade."""
        if "websocket" not in request.headers.get("Upgrade", "").lower():
            return None, set()
        return await super().resolve(request)

    def raw_match(self, path: str) -> bool:  # noqa: ARG002
        """Return False, so that aiohttp does not add other routes with this pattern here."""
        return False


def without_repeated(routes: Iterable[web.AbstractRouteDef]) -> list[web.AbstractRouteDef]:
    """Return the routes without those whose method and path an earlier one has.

    Centrifugo's option `web` serves the console at paths that the live page and the console itself
    use too.
    """
    seen: set[tuple[str, str]] = set()
    kept = []
    for route in routes:
        if isinstance(route, web.RouteDef):
            if (route.method, route.path) in seen:
                continue
            seen.add((route.method, route.path))
        kept.append(route)
    return kept


def in_order(routes: Iterable[web.AbstractRouteDef]) -> list[web.AbstractRouteDef]:
    """Return the routes in the order of registration. The sort is stable."""
    return sorted(routes, key=_rank)


def _rank(route: web.AbstractRouteDef) -> int:
    return 0 if isinstance(route, UpgradeRoute) else 2 if isinstance(route, FallbackRoute) else 1
