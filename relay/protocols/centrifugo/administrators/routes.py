"""Endpoints for administrators: the console, `/auth/`, `/socket` and `/debug/`."""

from __future__ import annotations

import asyncio
import gc
import hmac
import math
import time
from collections import Counter
from typing import TYPE_CHECKING

import jwt
import orjson
from aiohttp import web

from relay.core.errors import RelayError
from relay.core.reasons import Reason
from relay.doorkit.http_status import go_error
from relay.protocols.centrifugo import encoders, go_http
from relay.protocols.centrifugo.administrators.connection import AdminConnection
from relay.protocols.centrifugo.administrators.node import memory
from relay.transports.socket import websocket
from relay.transports.socket.bodies import BodyRejected
from relay.transports.socket.deadlines import Deadlines
from relay.transports.socket.heartbeat import Heartbeat
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import connection_of, take_over

if TYPE_CHECKING:
    from relay.protocols.centrifugo.api.executor import CommandExecutor
    from relay.protocols.centrifugo.server_state import ServerState
    from relay.protocols.centrifugo.settings import CentrifugoSettings

# Validity of v1's tokens, which are made by securecookie.
_TOKEN_S = 30 * 86400
_AUDIENCE = "centrifugo admin"
_FORM_BYTES = 65536
_INSECURE = "insecure"
# Of a message before the connection has authenticated.
_STRANGER_BYTES = 65536


class AdminRoutes:
    """Routes for administrators. The settings at start decide which exist."""

    def __init__(
        self,
        server: ServerState,
        executor: CommandExecutor,
        settings: CentrifugoSettings,
        prefix: str,
    ) -> None:
        """`prefix` is put in front of all paths."""
        self._server = server
        self._executor = executor
        self._reaper = Reaper()
        self._heartbeat = Heartbeat(interval_s=settings.ping_interval, beat=websocket.PING)
        self._open: set[AdminConnection] = set()
        # As for clients, close connections that do not authenticate in time.
        self._stale: Deadlines[AdminConnection] = Deadlines(
            settings.stale_connection_close_delay, AdminConnection.expire
        )
        self._auth_path = f"{prefix}/auth"
        self.routes: list[web.AbstractRouteDef] = []
        if settings.admin or settings.web:
            self.routes.append(web.route("*", f"{prefix}/socket", self._socket))
        if settings.web:
            self.routes.append(web.route("*", self._auth_path, self._redirect))
            self.routes.append(web.route("*", f"{self._auth_path}/", self._auth))
            self.routes.append(web.get(f"{prefix}/", self._page))
            self.routes += server.context.console(prefix, lambda: server.settings.admin_password)
        if settings.debug:
            self.routes.append(web.get(f"{prefix}/debug/", self._debug))

    async def closed(self) -> None:
        """Close all administrators. Most have no session in the hub."""
        for administrator in list(self._open):
            administrator.disconnect(Reason.STOPPING)

    # ---- page -----------------------------------------------------------------------------------

    async def _page(self, _request: web.Request) -> web.Response:
        """Redirect from the address of Centrifugo's page to the console."""
        # Relative, because a proxy may have removed a prefix.
        return web.Response(status=307, headers={"Location": "console/"})

    # ---- /auth/ ---------------------------------------------------------------------------------

    async def _redirect(self, _request: web.Request) -> web.Response:
        return web.Response(status=301, headers={"Location": f"{self._auth_path}/"})

    async def _auth(self, request: web.Request) -> web.Response:
        settings = self._server.settings
        if settings.insecure_admin:
            return _token(_INSECURE)
        try:
            fields = await go_http.form(request, _FORM_BYTES)
        except ValueError:
            return go_error(400, "Bad Request")
        except BodyRejected as exc:
            return go_http.body_error(exc)
        password = settings.admin_password.get_secret_value().encode()
        given = fields.get("password", b"")
        is_possible = password and given and self._key()
        attempts = self._server.context.login_attempts
        address = connection_of(request).address
        try:
            # The password is that of the console, too.
            if is_possible and (wait_s := await attempts.begin(address)):
                self._server.context.metrics.rejected(encoders.DOOR, Reason.LIMIT_EXCEEDED)
                answer = go_error(429, "Too Many Requests")
                answer.headers["Retry-After"] = str(math.ceil(wait_s))
                return answer
            if not (is_possible and hmac.compare_digest(password, given)):
                self._server.context.metrics.rejected(encoders.DOOR, Reason.BAD_REQUEST)
                return go_error(400, "Bad Request")
            await attempts.succeeded(address)
        except RelayError:
            return go_error(503, "Service Unavailable")
        claims = {"aud": _AUDIENCE, "exp": int(time.time()) + _TOKEN_S}
        return _token(jwt.encode(claims, self._key(), algorithm="HS256"))

    def _key(self) -> bytes:
        secret = self._server.settings.admin_secret.get_secret_value().encode()
        # The derived key is long enough for any secret, and is used for nothing else.
        return hmac.digest(secret, _AUDIENCE.encode(), "sha256") if secret else b""

    def _is_valid(self, token: str) -> bool:
        key = self._key()
        if not key or not self._server.settings.admin_password.get_secret_value():
            return False
        try:
            jwt.decode(token, key, algorithms=["HS256"], audience=_AUDIENCE)
        except jwt.InvalidTokenError:
            return False
        return True

    # ---- /socket --------------------------------------------------------------------------------

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        head = websocket.accept_headers(request)
        if isinstance(head, web.Response):
            return go_error(400, "Bad Request")
        settings = self._server.settings
        socket = websocket.WebSocketConnection(
            buffer_bytes=settings.client_queue_max_size,
            max_frame_bytes=settings.api_max_bytes
            if settings.insecure_admin
            else min(settings.api_max_bytes, _STRANGER_BYTES),
            reaper=self._reaper,
            heartbeat=self._heartbeat,
        )
        administrator = AdminConnection(self._server, self._executor, self._is_valid)
        self._open.add(administrator)

        def closed() -> None:
            self._open.discard(administrator)
            self._stale.remove(administrator)
            administrator.on_closed()

        socket.on_text = socket.on_binary = administrator.on_frame
        socket.on_full = administrator.on_full
        socket.on_drained = administrator.on_drained
        socket.on_closed = closed
        administrator.on_open(socket)
        if settings.stale_connection_close_delay:
            self._stale.add(administrator)
        return take_over(request, head, socket)

    # ---- /debug/ --------------------------------------------------------------------------------

    async def _debug(self, _request: web.Request) -> web.Response:
        hub = self._server.context.hub
        doors = Counter(session.principal.door for session in hub.sessions())
        lines = ["# connections"]
        lines += [f"{count:8} {door}" for door, count in doors.most_common()]
        lines += [f"{len(hub.feeds()):8} followed channels", "", "# memory, bytes"]
        lines += [f"{size:12} {name}" for name, size in sorted(memory().items())]
        lines += [
            f"{len(gc.get_objects()):12} objects tracked by the garbage collector",
            "",
            "# tasks",
        ]
        for task in sorted(asyncio.all_tasks(), key=lambda each: each.get_name()):
            frames = task.get_stack(limit=1)
            where = f"{frames[0].f_code.co_qualname}:{frames[0].f_lineno}" if frames else "ends"
            lines.append(f"{task.get_name()}  {where}")
        return web.Response(text="\n".join(lines) + "\n")


def _token(token: str) -> web.Response:
    # Go's encoder appends a newline.
    body = orjson.dumps({"token": token}) + b"\n"
    return web.Response(body=body, content_type="application/json")
