"""HTTP endpoint of the API: `/api/` and all paths below it. Verifies signatures."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiohttp import web

from relay.doorkit.http_status import go_error
from relay.protocols.centrifugo import encoders, go_http
from relay.protocols.centrifugo.api.executor import CommandExecutor, is_signed
from relay.protocols.centrifugo.api.replies import encode
from relay.protocols.centrifugo.commands import InvalidCommand
from relay.transports.socket.bodies import BodyRejected, read_large_body

if TYPE_CHECKING:
    from relay.protocols.centrifugo.server_state import ServerState

# The form of a valid signature.
_SIGNATURE = re.compile(r"[0-9a-f]{64}")


class ApiRoutes:
    """Routes of the HTTP API."""

    def __init__(self, server: ServerState, executor: CommandExecutor, prefix: str) -> None:
        """`prefix` is put in front of the path."""
        self._server = server
        self._executor = executor
        self._path = f"{prefix}/api"
        self.routes: Sequence[web.AbstractRouteDef] = [
            web.route("*", self._path, self._redirect),
            web.route("*", f"{self._path}/{{rest:.*}}", self._answer),
        ]

    async def _answer(self, request: web.Request) -> web.Response:
        started = time.perf_counter()
        try:
            return await self._execute(request)
        finally:
            self._server.stats.count("http_api_num_requests")
            self._server.stats.http_api.record(time.perf_counter() - started)

    async def _execute(self, request: web.Request) -> web.Response:
        settings = self._server.settings
        is_json = request.headers.get("Content-Type", "").lower().startswith("application/json")
        if is_json and not settings.insecure_api:
            # Don't read the body of a request that cannot be valid.
            shown = request.headers.get("X-API-Sign", "")
            if not shown or not request.can_read_body:
                return self._reject(400, "Bad Request")
            if not _SIGNATURE.fullmatch(shown):
                return self._reject(401, "Unauthorized")
        try:
            body, sign = await self._commands(request, is_json=is_json)
        except ValueError:
            return go_error(400, "Bad Request")
        except BodyRejected as exc:
            return go_http.body_error(exc)
        if not settings.insecure_api:
            # An empty secret, as after a reload, rejects all requests.
            secret = settings.secret.get_secret_value().encode()
            if not sign or not body or not secret:
                return self._reject(400, "Bad Request")
            if not await is_signed(secret, body, sign):
                return self._reject(401, "Unauthorized")
        try:
            replies = await self._executor.execute_request(body, ids=_wants_ids(request))
        except InvalidCommand:
            return go_error(400, "Bad Request")
        return web.Response(body=encode(replies), content_type="application/json")

    async def _commands(
        self, request: web.Request, *, is_json: bool
    ) -> tuple[bytes | bytearray, str]:
        """Return the commands as JSON text, and their signature."""
        limit_bytes = self._server.settings.api_max_bytes
        if is_json:
            setting = "[protocol:centrifugo] api_max_bytes"
            body = await read_large_body(request, limit_bytes, setting)
            return body, request.headers.get("X-API-Sign", "")
        # cent 1.x and phpcent 1.x send a form.
        fields = await go_http.form(request, limit_bytes)
        return fields.get("data", b""), fields.get("sign", b"").decode("latin-1")

    def _reject(self, status: int, text: str) -> web.Response:
        reason = text.lower().replace(" ", "_")
        self._server.context.metrics.rejected(encoders.DOOR, reason)
        return go_error(status, text)

    async def _redirect(self, request: web.Request) -> web.Response:
        query = f"?{request.query_string}" if request.query_string else ""
        return web.Response(status=301, headers={"Location": f"{self._path}/{query}"})


def _wants_ids(request: web.Request) -> bool:
    """Return True if the client requests entry IDs in replies (RFC 7240)."""
    preferred = request.headers.get("Prefer", "").lower()
    return "return=representation" in preferred.replace(" ", "").split(",")
