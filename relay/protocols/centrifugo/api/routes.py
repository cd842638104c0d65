"""`/api/` and whatever lies below it: which commands a request brings, and who may send them."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiohttp import web

from relay.protocols.centrifugo import go_http
from relay.protocols.centrifugo.api.executor import CommandExecutor, signed
from relay.protocols.centrifugo.api.replies import encode
from relay.protocols.centrifugo.commands import InvalidCommand
from relay.transports.socket.bodies import BodyRejected, read_body

if TYPE_CHECKING:
    from relay.protocols.centrifugo.server_state import ServerState

# What `signed` can accept.
_SIGNATURE = re.compile(r"[0-9a-f]{64}")


class ApiRoutes:
    """The HTTP API of the door."""

    def __init__(self, door: ServerState, api: CommandExecutor, prefix: str) -> None:
        """`prefix` stands before the path."""
        self._door = door
        self._api = api
        self._path = f"{prefix}/api"
        self.routes: Sequence[web.AbstractRouteDef] = [
            web.route("*", self._path, self._moved),
            web.route("*", f"{self._path}/{{rest:.*}}", self._answer),
        ]

    async def _answer(self, request: web.Request) -> web.Response:
        started = time.perf_counter()
        try:
            return await self._carry_out(request)
        finally:
            self._door.stats.count("http_api_num_requests")
            self._door.stats.http_api.record(time.perf_counter() - started)

    async def _carry_out(self, request: web.Request) -> web.Response:
        settings = self._door.settings
        is_json = request.headers.get("Content-Type", "").lower().startswith("application/json")
        if is_json and not settings.insecure_api:
            # Don't read the body of a request that cannot be valid.
            shown = request.headers.get("X-API-Sign", "")
            if not shown or not request.can_read_body:
                return self._refused(400, "Bad Request")
            if not _SIGNATURE.fullmatch(shown):
                return self._refused(401, "Unauthorized")
        try:
            body, sign = await self._commands(request, is_json=is_json)
        except ValueError:
            return go_http.error(400, "Bad Request")
        except BodyRejected as exc:
            return go_http.body_error(exc)
        if not settings.insecure_api:
            # An empty secret, as after a reload, rejects all requests.
            secret = settings.secret.get_secret_value().encode()
            if not sign or not body or not secret:
                return self._refused(400, "Bad Request")
            if not signed(secret, body, sign):
                return self._refused(401, "Unauthorized")
        try:
            replies = await self._api.answer(body, ids=_wants_ids(request))
        except InvalidCommand:
            return go_http.error(400, "Bad Request")
        return web.Response(body=encode(replies), content_type="application/json")

    async def _commands(self, request: web.Request, *, is_json: bool) -> tuple[bytes, str]:
        """The commands' text and its signature, in whichever form they were sent."""
        limit_bytes = self._door.settings.api_max_bytes
        if is_json:
            body = await read_body(request, limit_bytes, "[protocol:centrifugo] api_max_bytes")
            return body, request.headers.get("X-API-Sign", "")
        # cent 1.x and phpcent 1.x send a form.
        fields = await go_http.form(request, limit_bytes)
        return fields.get("data", b""), fields.get("sign", b"").decode("latin-1")

    def _refused(self, status: int, text: str) -> web.Response:
        self._door.context.metrics.refused.labels(text.lower().replace(" ", "_")).inc()
        return go_http.error(status, text)

    async def _moved(self, request: web.Request) -> web.Response:
        query = f"?{request.query_string}" if request.query_string else ""
        return web.Response(status=301, headers={"Location": f"{self._path}/{query}"})


def _wants_ids(request: web.Request) -> bool:
    """Whether replies may say more than v1's, in the words of RFC 7240."""
    preferred = request.headers.get("Prefer", "").lower()
    return "return=representation" in preferred.replace(" ", "").split(",")
