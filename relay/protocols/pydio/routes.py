"""Routes of the Pydio protocol: the public channel for browsers and the private one for PHP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web
from typing_extensions import override

from relay.core.errors import ClientError, Unauthorized, Unavailable
from relay.core.reasons import Reason
from relay.doorkit.contract import FrontDoor, Listener, Mounted
from relay.doorkit.first_subscriptions import DeferredLog
from relay.doorkit.http_status import status_of
from relay.doorkit.open_connections import OpenConnections
from relay.protocols.pydio import codec
from relay.protocols.pydio.accounts import Account, Accounts
from relay.protocols.pydio.browser import CLOSES, Browser
from relay.protocols.pydio.credentials import CredentialsReader
from relay.protocols.pydio.npm.service import NpmService
from relay.protocols.pydio.outbound import OutboundQueue
from relay.protocols.pydio.private import ADMIN_KEY, PrivateChannel
from relay.protocols.pydio.registration import BrowserServices
from relay.protocols.pydio.server import PydioServer
from relay.protocols.pydio.settings import PydioSettings
from relay.transports.socket import websocket
from relay.transports.socket.heartbeat import Heartbeat
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import connection_of, drop, take_over

if TYPE_CHECKING:
    from relay.doorkit.contract import DoorContext

_MAX_FRAME_BYTES = 4096


class MountedPydio(Mounted):
    """The Pydio protocol while it is served."""

    def __init__(self, context: DoorContext, settings: PydioSettings) -> None:
        loop = asyncio.get_running_loop()
        self._context = context
        self._settings = settings
        self._open = OpenConnections(context.metrics.connections.labels("pydio"))
        self._reaper = Reaper()
        self._outbound = OutboundQueue(context.publish, clock=loop.time)
        self._private = PrivateChannel(context, settings, self._outbound, self._reaper, loop)
        self._accounts = Accounts(
            PydioServer(settings, context.http),
            settings,
            spawn=context.spawn,
            recheck=context.hub.recheck,
            loop=loop,
        )
        context.on_drop(lambda _, user: self._accounts.rights_changed(user))
        self._services = BrowserServices(
            subscribe=context.subscribe,
            count_rejection=partial(context.metrics.rejected, "pydio"),
            renew=self._renew,
            loop=loop,
            not_reading=context.not_reading,
            clock=context.clock,
            deferred=DeferredLog("Pydio"),
        )
        self._npm = NpmService(
            context,
            settings,
            self._accounts,
            self._services,
            reader=lambda: self._reader,
            open_connections=self._open,
        )
        private = _routes(settings.private_path, self._private.handle)
        self.listeners: list[Listener] = []
        # PHP does not repeat messages, so its path is served until the end of a shutdown.
        self.producers: Sequence[web.AbstractRouteDef] = ()
        if settings.private_port:
            self.routes = _routes(settings.public_path, self._public)
            self.listeners.append(
                Listener(
                    host=settings.private_host,
                    port=settings.private_port,
                    routes=private,
                    producers=private,
                    plain=True,
                )
            )
        elif settings.private_path == settings.public_path:
            self.routes = _routes(settings.public_path, self._either)
            self.producers = _routes(settings.public_path, self._with_key)
        else:
            # Don't accept the key on the public path, because a proxy may expose it to everyone.
            self.routes = _routes(settings.public_path, self._public) + private
            self.producers = private
        # Socket.IO clients append a slash to their path.
        self.routes += [
            web.options(settings.public_path, self._npm.clients.endpoint.handle),
            web.options(f"{settings.public_path}/", self._npm.clients.endpoint.handle),
        ]
        self.reload(settings)
        _ = context.spawn(self._outbound.run(), name="pydio outbound")

    @override
    def reload(self, settings: PydioSettings) -> None:
        # Paths change at a restart only. Open connections keep their heartbeat interval.
        self._settings = settings
        self.drain_s = settings.drain_s
        self._reader = CredentialsReader(settings)
        self._npm.reload(settings)
        self._private.reload(settings)
        self._accounts.reload(settings)
        self._heartbeat = Heartbeat(
            interval_s=settings.heartbeat_s,
            beat=websocket.PING,
            deadline_s=settings.pong_timeout_s,
            farewell=websocket.frame_close(*CLOSES[Reason.NO_PONG]),
        )

    @override
    async def closed(self) -> None:
        self._accounts.close()
        await self._private.closed()
        await self._outbound.wait_empty()
        await self._npm.clients.closed()
        await self._open.wait_closed()

    async def _either(self, request: web.Request) -> web.StreamResponse:
        # Pydio 6.4.2 has one path for both. Only PHP sends the Admin-Key header.
        if _is_private(request):
            return await self._private.handle(request)
        return await self._public(request)

    async def _with_key(self, request: web.Request) -> web.StreamResponse:
        return await self._private.handle(request) if _is_private(request) else drop(request)

    # ---- the public channel -----------------------------------------------------------------

    async def _public(self, request: web.Request) -> web.StreamResponse:
        if "EIO" in request.query:
            return await self._npm.clients.endpoint.handle(request)
        try:
            return await self._admit(request)
        except (ClientError, Unavailable) as exc:
            self._context.metrics.rejected("pydio", exc.code)
            return web.Response(status=status_of(exc), text=f"{exc}\n")

    async def _admit(self, request: web.Request) -> web.StreamResponse:
        accepted = websocket.accept_headers(request)
        if isinstance(accepted, web.Response):
            return accepted
        if not self._settings.auth_url:
            raise Unavailable(
                "[protocol:pydio] auth_url is empty: browsers cannot be authenticated"
            )
        context = self._context
        credentials = self._reader.read(request.headers, request.query)
        async with self._accounts.connecting(credentials) as account:
            browser = Browser(account, self._services)
            encoder = codec.encoder_for(account.identity.masked)
            session = await context.open(
                account.principal, encoder, browser, info=connection_of(request)
            )
            browser.session = session
            account.members.add(browser)
        if not account.valid:
            # Pydio rejected the credentials while the session was being opened.
            self._accounts.remove_member(account, browser)
            session.end()
            raise Unauthorized("Pydio session expired")
        socket = websocket.WebSocketConnection(
            buffer_bytes=context.client_buffer_bytes,
            max_frame_bytes=_MAX_FRAME_BYTES,
            reaper=self._reaper,
            heartbeat=self._heartbeat,
        )

        def closed() -> None:
            self._open.closed()
            self._accounts.remove_member(account, browser)
            session.end()

        self._open.opened()
        socket.on_text = browser.on_text
        socket.on_full = session.pause
        socket.on_drained = session.resume
        socket.on_closed = closed
        response = take_over(request, accepted, socket)
        session.attach(socket)
        browser.attached(socket)
        context.hub.flush_soon()
        return response

    def _renew(self, account: Account, then: Callable[[], None]) -> None:
        async def ask() -> None:
            await self._accounts.renew(account)
            then()

        _ = self._context.spawn(ask(), name="pydio rights")


def _is_private(request: web.Request) -> bool:
    return ADMIN_KEY in request.headers and "EIO" not in request.query


def _routes(
    path: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> list[web.AbstractRouteDef]:
    # phpws serves every path below that of a handler as well.
    below = path.rstrip("/") + "/{rest:.*}"
    return [
        route
        for each in (path, below)
        for route in (web.get(each, handler, allow_head=False), web.post(each, handler))
    ]


class PydioDoor(FrontDoor):
    """Serves Pydio's browsers and PHP."""

    @override
    def mount(self, context: DoorContext, settings: PydioSettings) -> MountedPydio:
        return MountedPydio(context, settings)


DOOR = PydioDoor()
