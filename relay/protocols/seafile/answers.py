"""HTTP answers as the notification server writes them, byte for byte; who asked for them."""

from __future__ import annotations

from aiohttp import hdrs, web


class _Bare(web.Response):
    """An answer without Content-Type, as Go's where nothing was written."""

    async def _prepare_headers(self) -> None:
        await super()._prepare_headers()
        self.headers.popall(hdrs.CONTENT_TYPE, None)


def sender(request: web.Request) -> str:
    """Who asks, for the log: what a proxy says, as upstream."""
    return request.headers.get("X-Forwarded-For") or request.remote or ""


def pong() -> web.Response:
    """Other programs compare this body."""
    return web.Response(text='{"ret": "pong"}\n', content_type="text/plain", charset="utf-8")


def done() -> web.Response:
    """200 and nothing else."""
    return _Bare()


def error(status: int, text: str) -> web.Response:
    """Go's http.Error."""
    return web.Response(
        status=status,
        text=f"{text}\n",
        content_type="text/plain",
        charset="utf-8",
        headers={"X-Content-Type-Options": "nosniff"},
    )


def no_websocket() -> web.Response:
    """A websocket was wanted, and the request asks for none."""
    answer = error(400, "Bad Request")
    answer.headers["Sec-Websocket-Version"] = "13"
    return answer
