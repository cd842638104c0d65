"""HTTP responses, byte for byte as those of Seafile's notification server."""

from __future__ import annotations

from aiohttp import hdrs, web
from typing_extensions import override

from relay.doorkit.http_status import go_error
from relay.transports.socket.take_over import connection_of


class _Bare(web.Response):
    """A response without Content-Type, like Go's responses without a body."""

    @override
    async def _prepare_headers(self) -> None:
        await super()._prepare_headers()
        self.headers.popall(hdrs.CONTENT_TYPE, None)


def sender(request: web.Request) -> str:
    """Return the client's address for the log."""
    info = connection_of(request)
    return info.forwarded_for or info.address or "a client that has disconnected"


def pong() -> web.Response:
    """Return the response to `/ping`. Other programs compare its body."""
    return web.Response(text='{"ret": "pong"}\n', content_type="text/plain", charset="utf-8")


def done() -> web.Response:
    """Return status 200 without a body."""
    return _Bare()


def no_websocket() -> web.Response:
    """Return the response to a request that is not a websocket handshake."""
    answer = go_error(400, "Bad Request")
    answer.headers["Sec-Websocket-Version"] = "13"
    return answer
