"""`/api/` and whatever lies below it: which commands a request brings, and who may send them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiohttp import web

from producers.commands import Invalid
from relay.protocols.centrifugo import api, codec, plain_http

if TYPE_CHECKING:
    from relay.frontdoor import DoorContext
    from relay.protocols.centrifugo.settings import CentrifugoSettings


class ApiRoutes:
    """The HTTP API of the door."""

    def __init__(self, context: DoorContext, settings: CentrifugoSettings, prefix: str) -> None:
        """`prefix` stands before the path."""
        self._context = context
        self._path = f"{prefix}/api"
        self.routes: Sequence[web.AbstractRouteDef] = [
            web.route("*", self._path, self._moved),
            web.route("*", f"{self._path}/{{rest:.*}}", self._api),
        ]
        self.reload(settings)

    def reload(self, settings: CentrifugoSettings) -> None:
        """See `relay.frontdoor.Mounted`. An empty secret refuses all from now on."""
        self._secret = settings.secret.get_secret_value().encode()
        self._insecure = settings.insecure_api
        self._max_bytes = settings.api_max_bytes

    async def _api(self, request: web.Request) -> web.Response:
        try:
            body, sign = await self._commands(request)
        except ValueError:
            return plain_http.error(400, "Bad Request")
        except plain_http.TooLarge:
            return plain_http.error(413, "Request Entity Too Large")
        if not self._insecure:
            if not sign or not body or not self._secret:
                return self._refused(400, "Bad Request")
            if not api.signed(self._secret, body, sign):
                return self._refused(401, "Unauthorized")
        try:
            replies = await api.answer(body, self._context.publish, ids=_wants_ids(request))
        except Invalid:
            return plain_http.error(400, "Bad Request")
        return web.Response(body=codec.encode(replies), content_type="application/json")

    async def _commands(self, request: web.Request) -> tuple[bytes, str]:
        """The commands' text and its signature, in whichever form they were sent."""
        kind = request.headers.get("Content-Type", "").lower()
        if kind.startswith("application/json"):
            body = await plain_http.body(request, self._max_bytes)
            return body, request.headers.get("X-API-Sign", "")
        # cent 1.x and phpcent 1.x send a form.
        fields = await plain_http.form(request, self._max_bytes)
        return fields.get("data", b""), fields.get("sign", b"").decode("latin-1")

    def _refused(self, status: int, text: str) -> web.Response:
        self._context.metrics.refused.labels(text.lower().replace(" ", "_")).inc()
        return plain_http.error(status, text)

    async def _moved(self, request: web.Request) -> web.Response:
        query = f"?{request.query_string}" if request.query_string else ""
        return web.Response(status=301, headers={"Location": f"{self._path}/{query}"})


def _wants_ids(request: web.Request) -> bool:
    """Whether replies may say more than v1's, in the words of RFC 7240."""
    preferred = request.headers.get("Prefer", "").lower()
    return "return=representation" in preferred.replace(" ", "").split(",")
