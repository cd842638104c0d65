"""The administrators' paths: `/auth/` and `/socket`, and `/debug/` for whoever reaches it."""

from __future__ import annotations

import asyncio
import gc
import hmac
import time
from collections import Counter
from typing import TYPE_CHECKING

import jwt
import orjson
from aiohttp import web

from relay.protocols.centrifugo import go_http
from relay.protocols.centrifugo.administrators.connection import AdminConnection
from relay.protocols.centrifugo.administrators.node import memory
from relay.transports.socket import websocket
from relay.transports.socket.bodies import BodyRejected
from relay.transports.socket.deadlines import Deadlines
from relay.transports.socket.heartbeat import Heartbeat
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import take_over

if TYPE_CHECKING:
    from relay.protocols.centrifugo.api.executor import CommandExecutor
    from relay.protocols.centrifugo.server_state import ServerState
    from relay.protocols.centrifugo.settings import CentrifugoSettings

# v1's tokens are securecookie's, and hold as long.
_TOKEN_S = 30 * 86400
_AUDIENCE = "centrifugo admin"
_FORM_BYTES = 65536
_INSECURE = "insecure"


class AdminRoutes:
    """What the settings at start leave open of them; which paths there are does not change."""

    def __init__(
        self, door: ServerState, api: CommandExecutor, settings: CentrifugoSettings, prefix: str
    ) -> None:
        """`prefix` stands before all of the paths."""
        self._door = door
        self._api = api
        self._reaper = Reaper()
        self._beat = Heartbeat(interval_s=settings.ping_interval, beat=websocket.PING)
        self._open: set[AdminConnection] = set()
        # As for clients: a connection that does not authenticate is closed.
        self._stale: Deadlines[AdminConnection] = Deadlines(
            settings.stale_connection_close_delay, AdminConnection.expire
        )
        self._auth_path = f"{prefix}/auth"
        self.routes: list[web.AbstractRouteDef] = []
        if settings.admin or settings.web:
            self.routes.append(web.route("*", f"{prefix}/socket", self._socket))
        if settings.web:
            self.routes.append(web.route("*", self._auth_path, self._moved))
            self.routes.append(web.route("*", f"{self._auth_path}/", self._auth))
        if settings.debug:
            self.routes.append(web.get(f"{prefix}/debug/", self._debug))

    async def closed(self) -> None:
        """Close administrators' sockets too: they have no session in the hub."""
        for administrator in list(self._open):
            administrator.disconnect("stopping")

    # ---- /auth/ ---------------------------------------------------------------------------------

    async def _moved(self, _request: web.Request) -> web.Response:
        return web.Response(status=301, headers={"Location": f"{self._auth_path}/"})

    async def _auth(self, request: web.Request) -> web.Response:
        settings = self._door.settings
        if settings.insecure_admin:
            return _token(_INSECURE)
        try:
            fields = await go_http.form(request, _FORM_BYTES)
        except ValueError:
            return go_http.error(400, "Bad Request")
        except BodyRejected as exc:
            return go_http.body_error(exc)
        password = settings.admin_password.get_secret_value().encode()
        given = fields.get("password", b"")
        if not (password and self._key() and hmac.compare_digest(password, given)):
            self._door.context.metrics.refused.labels("bad_request").inc()
            return go_http.error(400, "Bad Request")
        claims = {"aud": _AUDIENCE, "exp": int(time.time()) + _TOKEN_S}
        return _token(jwt.encode(claims, self._key(), algorithm="HS256"))

    def _key(self) -> bytes:
        secret = self._door.settings.admin_secret.get_secret_value().encode()
        # Long enough whatever the secret, and for nothing else.
        return hmac.digest(secret, _AUDIENCE.encode(), "sha256") if secret else b""

    def _is_valid(self, token: str) -> bool:
        key = self._key()
        if not key or not self._door.settings.admin_password.get_secret_value():
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
            return go_http.error(400, "Bad Request")
        settings = self._door.settings
        socket = websocket.WebSocketConnection(
            buffer_bytes=settings.client_queue_max_size,
            max_frame_bytes=settings.api_max_bytes,
            reaper=self._reaper,
            heartbeat=self._beat,
        )
        administrator = AdminConnection(self._door, self._api, self._is_valid)
        self._open.add(administrator)

        def closed() -> None:
            self._open.discard(administrator)
            self._stale.remove(administrator)
            administrator.gone()

        socket.on_text = socket.on_binary = administrator.on_frame
        socket.on_full = administrator.filled
        socket.on_drained = administrator.drained
        socket.on_closed = closed
        administrator.attached(socket)
        if settings.stale_connection_close_delay:
            self._stale.add(administrator)
        return take_over(request, head, socket)

    # ---- /debug/ --------------------------------------------------------------------------------

    async def _debug(self, _request: web.Request) -> web.Response:
        hub = self._door.context.hub
        doors = Counter(session.principal.door for session in hub.sessions())
        lines = ["# connections"]
        lines += [f"{count:8} {door}" for door, count in doors.most_common()]
        lines += [f"{len(hub.feeds()):8} streams followed", "", "# memory, bytes"]
        lines += [f"{size:12} {name}" for name, size in sorted(memory().items())]
        lines += [f"{len(gc.get_objects()):12} objects that the collector knows", "", "# tasks"]
        for task in sorted(asyncio.all_tasks(), key=lambda each: each.get_name()):
            frames = task.get_stack(limit=1)
            where = f"{frames[0].f_code.co_qualname}:{frames[0].f_lineno}" if frames else "ends"
            lines.append(f"{task.get_name()}  {where}")
        return web.Response(text="\n".join(lines) + "\n")


def _token(token: str) -> web.Response:
    # Go's encoder ends with a newline.
    body = orjson.dumps({"token": token}) + b"\n"
    return web.Response(body=body, content_type="application/json")
