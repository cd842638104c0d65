"""A stand-in for the relay's `POST /api/`, written from the notes on the Centrifugo v1 wire.

It checks the signature, appends to a real stream and knows uids; so the HTTP producers can be
run before, and apart from, the relay's own API.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from relay.stream.connect import command, redis_client
from tests.support.valkey import Server

SECRET = "the secret of the api"


class ApiServer:
    """`status` other than 200 is what every request gets."""

    def __init__(self, server: Server) -> None:
        self.url = ""
        self.status = 200
        self.requests = 0
        self._server = server
        self._known: dict[tuple[str, str], str] = {}

    async def handle(self, request: web.Request) -> web.Response:
        self.requests += 1
        body = await request.read()
        if self.status != 200:
            return web.Response(status=self.status)
        sign = request.headers.get("X-API-Sign", "")
        if not sign or not body:
            return web.Response(status=400)
        if sign != hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest():
            return web.Response(status=401)
        try:
            found = json.loads(body)
            replies = [
                await self._carry_out(each)
                for each in (found if isinstance(found, list) else [found])
            ]
        except (ValueError, KeyError):
            return web.Response(status=400)
        return web.json_response(replies)

    async def _carry_out(self, each: dict[str, Any]) -> dict[str, Any]:
        params = each["params"]
        if params["channel"].startswith("seafile:"):
            error = {"error": "namespace not found", "advice": "fix"}
            return {"method": each["method"], **error, "body": None}
        uid = (params["channel"], params.get("uid", ""))
        if not uid[1] or uid not in self._known:
            words = ["data", json.dumps(params["data"])]
            for name in ("uid", "client"):
                words += [name, params[name]] if name in params else []
            async with redis_client(self._server.settings("admin")) as client:
                key = f"relay:stream:{{{params['channel']}}}"
                self._known[uid] = (await command(client, "XADD", key, "*", *words)).decode()
        return {"method": each["method"], "error": None, "body": None}


@asynccontextmanager
async def api_server(server: Server) -> AsyncIterator[ApiServer]:
    """One on a free port."""
    api = ApiServer(server)
    application = web.Application()
    application.router.add_route("*", "/api/", api.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        api.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield api
    finally:
        await runner.cleanup()
