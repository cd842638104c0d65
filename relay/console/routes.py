"""The console's routes: its page, login and logout, and the admin API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import orjson
from aiohttp import web
from pydantic import SecretStr
from typing_extensions import override

from relay.console import channels, clients, dead_letters, journal, overview, page, tap
from relay.console.access import SESSION_S, Access, TooManyAttempts
from relay.console.services import ApiRequest, JsonBody
from relay.core.errors import (
    BadRequest,
    ClientError,
    NotDurable,
    RedisUnavailable,
    RelayError,
    Unavailable,
)
from relay.core.reasons import Reason
from relay.doorkit import static_page
from relay.doorkit.contract import Listener, Mounted
from relay.doorkit.http_status import status_of
from relay.stream.connection.connect import CommandRefused
from relay.transports.socket.bodies import BodyRejected, read_body

if TYPE_CHECKING:
    from relay.config.settings import ConsoleSettings
    from relay.console.services import ApiHandler, ConsoleServices

PATH = "/console"
# Before the login, and of a request that publishes an event.
_LOGIN_BYTES, _BODY_BYTES = 4096, 8 << 20
_READS: Mapping[str, ApiHandler] = {
    "overview": overview.overview,
    "channels": channels.channels,
    "entries": channels.entries,
    "presence": channels.presence,
    "rights": channels.rights,
    "connections": clients.connections,
    "connection": clients.connection,
    "tap": tap.tap,
    "events": journal.events,
    "explain": journal.explain,
    "dead-letters": dead_letters.dead_letters,
    "dead-letter": dead_letters.dead_letter,
}
_ACTIONS: Mapping[str, ApiHandler] = {
    "publish": channels.publish,
    "trim": channels.trim,
    "delete": channels.delete,
    "revoke": channels.revoke,
    "grant": channels.grant,
    "disconnect": clients.disconnect,
    "close": clients.close,
    "unsubscribe": clients.unsubscribe,
    "dead-letters/requeue": dead_letters.requeue,
    "dead-letters/drop": dead_letters.drop,
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class LoginBody(JsonBody):
    """Body of `login`."""

    password: str


class Console(Mounted):
    """The console at /console, and at the addresses that protocols request."""

    producers: Sequence[web.AbstractRouteDef] = ()
    listeners: Sequence[Listener] = ()
    drain_s: float | None = None

    def __init__(self, services: ConsoleServices, settings: ConsoleSettings) -> None:
        self._services = services
        self._settings = settings
        self._doctor = overview.Doctor(services.examine)
        self.routes = self._address("", lambda: [self._settings.password])

    def at(self, prefix: str, password: Callable[[], SecretStr]) -> list[web.AbstractRouteDef]:
        """Return the routes of the console below `prefix`.

        `password` is accepted there, and that of [console] unless [console] port keeps the console
        away from the public listeners. Empty passwords are not accepted.
        """

        def valid() -> list[SecretStr]:
            return [password(), *([] if self._settings.port else [self._settings.password])]

        return self._address(prefix, valid)

    def _address(
        self, prefix: str, valid: Callable[[], Sequence[SecretStr]]
    ) -> list[web.AbstractRouteDef]:
        def passwords() -> list[str]:
            return [text for each in valid() if (text := each.get_secret_value())]

        return ConsoleAddress(self._services, self._doctor, prefix, passwords).routes

    @override
    def reload(self, settings: ConsoleSettings) -> None:
        self._settings = settings

    @override
    async def closed(self) -> None:
        # There are no long-lived connections to wait for.
        return


class ConsoleAddress:
    """The console below one prefix."""

    def __init__(
        self,
        services: ConsoleServices,
        doctor: overview.Doctor,
        prefix: str,
        passwords: Callable[[], Sequence[str]],
    ) -> None:
        """`passwords` returns the valid ones. Without any, all paths return 404."""
        self._services = services
        self._passwords = passwords
        base = f"{prefix}{PATH}"
        self._access = Access(store=services.store, attempts=services.attempts, passwords=passwords)
        api = f"{base}/api"
        reads = {**_READS, "doctor": doctor.findings}
        self.routes: list[web.AbstractRouteDef] = [
            web.get(base, self._redirect),
            *(web.get(asset.path, self._file(asset)) for asset in page.load(base)),
            web.get(f"{api}/session", self._answering(self._session)),
            web.post(f"{api}/login", self._answering(self._login)),
            web.post(f"{api}/logout", self._answering(self._logout)),
            *(
                web.get(f"{api}/{name}", self._answering(self._api(handler)), allow_head=False)
                for name, handler in reads.items()
            ),
            *(
                web.post(f"{api}/{name}", self._answering(self._api(handler, _BODY_BYTES)))
                for name, handler in _ACTIONS.items()
            ),
        ]

    # ---- page -----------------------------------------------------------------------------------

    async def _redirect(self, _request: web.Request) -> web.Response:
        self._check_enabled()
        # Relative, because a proxy may have removed a prefix.
        return web.Response(status=308, headers={"Location": "console/"})

    def _file(self, asset: static_page.Asset) -> _Handler:
        async def serve(request: web.Request) -> web.Response:
            self._check_enabled()
            return static_page.respond(request, asset)

        return serve

    def _check_enabled(self) -> None:
        if not self._passwords():
            raise web.HTTPNotFound

    # ---- login ----------------------------------------------------------------------------------

    async def _login(self, request: web.Request) -> web.Response:
        body = ApiRequest(request, self._services, await _json_body(request, _LOGIN_BYTES))
        session = await self._access.login(request, body.body(LoginBody).password)
        response = _json({"csrf": session.csrf, "expires_in_s": SESSION_S})
        self._access.set_cookie(request, response, session.id)
        return response

    async def _logout(self, request: web.Request) -> web.Response:
        await self._access.logout(await self._access.session(request))
        response = _json({})
        self._access.set_cookie(request, response, "")
        return response

    async def _session(self, request: web.Request) -> web.Response:
        session = await self._access.session(request)
        return _json({"csrf": session.csrf})

    # ---- API ------------------------------------------------------------------------------------

    def _api(self, handler: ApiHandler, body_bytes: int = 0) -> _Handler:
        async def handle(request: web.Request) -> web.Response:
            # Check the session before the body is read.
            await self._access.session(request)
            raw = await _json_body(request, body_bytes) if body_bytes else b""
            return _json(await handler(ApiRequest(request, self._services, raw)))

        return handle

    def _answering(self, handler: _Handler) -> _Handler:
        """Return error responses for the errors that the handler raises."""

        async def handle(request: web.Request) -> web.StreamResponse:
            self._check_enabled()
            try:
                self._access.check_origin(request)
                return await handler(request)
            except TooManyAttempts as exc:
                return _error(429, exc.code, str(exc), {"Retry-After": str(exc.wait_s)})
            except (ClientError, Unavailable) as exc:
                return _error(status_of(exc), exc.code, str(exc))
            except BodyRejected as exc:
                return _error(exc.status, Reason.BAD_REQUEST, str(exc))
            except RedisUnavailable as exc:
                return _error(503, Reason.UNAVAILABLE, str(exc))
            except NotDurable as exc:
                return _error(503, Reason.UNAVAILABLE, str(exc))
            except CommandRefused as exc:
                hint = (
                    ": set [console] redis_url to one with the rights of `maintenance`"
                    if exc.code == "NOPERM"
                    else ""
                )
                return _error(502, Reason.FORBIDDEN, f"Redis rejected {exc}{hint}")
            except RelayError as exc:
                return _error(400, Reason.BAD_REQUEST, str(exc))

        return handle


async def _json_body(request: web.Request, limit_bytes: int) -> bytes:
    # A form of another site cannot have this type.
    if request.content_type != "application/json":
        raise BadRequest("Content-Type must be application/json")
    return await read_body(request, limit_bytes)


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json", headers=_HEADERS)


def _error(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> web.Response:
    response = _json({"error": {"code": code, "message": message}})
    response.set_status(status)
    response.headers.update(headers or {})
    return response
