"""Several protocols share one path, requested over a real socket."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import ClientSession, web

from relay.transports.socket.precedence import FallbackRoute, UpgradeRoute, in_order

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _saying(word: str) -> Handler:
    async def say(_: web.Request) -> web.Response:
        return web.Response(text=word)

    return say


async def test_upgrades_come_first_and_fallbacks_last() -> None:
    routes: list[web.AbstractRouteDef] = [
        FallbackRoute("/{slashes:/*}", _saying("left over")),
        web.route("*", "/both", _saying("plain")),
        web.get("/", _saying("page")),
        UpgradeRoute("/both", _saying("upgrade")),
        UpgradeRoute("/{slashes:/*}", _saying("upgrade")),
    ]
    app = web.Application()
    app.router.add_routes(in_order(routes))
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]

    async with ClientSession() as session:

        async def ask(path: str, method: str = "GET", **headers: str) -> str:
            url = f"http://127.0.0.1:{port}{path}"
            async with session.request(
                method, url, headers=headers, allow_redirects=False
            ) as answer:
                return await answer.text() if answer.status == 200 else str(answer.status)

        try:
            assert await ask("/") == "page"
            assert await ask("//") == "left over"
            assert await ask("/", "POST") == "left over"
            assert await ask("/", Upgrade="websocket") == "upgrade"
            assert await ask("///", Upgrade="WebSocket") == "upgrade"
            assert await ask("/", Upgrade="h2c") == "page"
            assert await ask("/both") == "plain"
            assert await ask("/both", Upgrade="websocket") == "upgrade"
            assert await ask("/other", Upgrade="websocket") == "404"
        finally:
            await runner.cleanup()
