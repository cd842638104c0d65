"""Routes of the Seafile protocol: the websocket at `/` and `/notification`, `/events`, `/ping`.

Each path is served with and without `/notification`, which some proxies remove, with doubled
slashes, and with a slash at the end. None is redirected: the sync client requests `/ping` only
once, and a redirected POST is lost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiohttp import web
from typing_extensions import override

from relay.core.model import Channel, Principal
from relay.core.slices import for_each
from relay.doorkit.contract import FrontDoor, ReadsTokens
from relay.doorkit.http_status import go_error
from relay.doorkit.open_connections import OpenConnections
from relay.protocols.seafile import answers
from relay.protocols.seafile.connection import SeafileClient, SeafileSocket
from relay.protocols.seafile.event_format import channel_of
from relay.protocols.seafile.events import EventsHandler
from relay.protocols.seafile.service import SeafileService
from relay.protocols.seafile.settings import SeafileSettings
from relay.protocols.seafile.tokens import InvalidSeafileToken
from relay.transports.socket import websocket
from relay.transports.socket.heartbeat import Heartbeat
from relay.transports.socket.precedence import FallbackRoute, UpgradeRoute
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import take_over

if TYPE_CHECKING:
    from relay.doorkit.contract import DoorContext, Listener

_ROOT = "/{before:/*}"
_NOTIFICATION = "/{before:/*}notification{after:/*}"
_GOING_AWAY = 1001


class MountedSeafile(ReadsTokens):
    """The Seafile protocol while it is served."""

    listeners: Sequence[Listener] = ()
    drain_s: float | None = None

    def __init__(self, context: DoorContext, settings: SeafileSettings) -> None:
        self._context = context
        self._open = OpenConnections(context.metrics.connections.labels("seafile"))
        self._service = SeafileService(context, settings)
        self._events = EventsHandler(self._service, settings)
        self._reaper = Reaper()
        self._clients: set[SeafileClient] = set()
        context.on_drop(self._rights_changed)
        # seaf-server and Seahub do not retry events. These paths are served until the end of a
        # shutdown.
        self.producers: Sequence[web.AbstractRouteDef] = [
            web.route("*", _below("ping"), _ping),
            web.route("*", _below("events"), self._events.answer),
        ]
        self.routes: Sequence[web.AbstractRouteDef] = [
            UpgradeRoute(_ROOT, self._websocket),
            UpgradeRoute(_NOTIFICATION, self._websocket),
            FallbackRoute(_ROOT, _bad_request),
            web.route("*", _NOTIFICATION, _bad_request),
            *self.producers,
            web.route("*", "/{before:/*}notification/{rest:.*}", _not_found),
        ]
        if settings.port:
            self.routes = [*self.routes, FallbackRoute("/{rest:.*}", _not_found)]
        self.reload(settings)

    def _rights_changed(self, channel: Channel | None, user: str | None) -> None:
        for_each(
            list(self._clients),
            lambda client: client.rights_changed(channel, user),
            lambda work: self._service.context.spawn(work, name="seafile rights"),
        )

    @override
    def reload(self, settings: SeafileSettings) -> None:
        # Open connections keep their ping interval.
        self._settings = settings
        self._service.reload(settings)
        self._events.reload(settings)
        self._heartbeat = Heartbeat(
            interval_s=settings.ping_s,
            beat=websocket.PING,
            deadline_s=settings.pong_timeout_s,
            farewell=websocket.frame_close(_GOING_AWAY),
            # A sync client sends its own ping each second.
            only_quiet=True,
        )

    @override
    def read_token(self, token: str) -> Principal | None:
        # With a client's JWT a page can follow its library by SSE. A server's JWT gives no access.
        try:
            claims = self._service.tokens.read(token, time.time())
            channel = channel_of(claims.repo_id)
        except (InvalidSeafileToken, ValueError):
            return None
        if not claims.username:
            return None
        return Principal(
            user=claims.username,
            channels=frozenset({channel}),
            expires_at=float(claims.expires_at),
        )

    @override
    async def closed(self) -> None:
        for client in list(self._clients):
            # The hub has disconnected all sessions. A client that has not subscribed to a library
            # has no session.
            if client.session is None:
                client.close()
        await self._open.wait_closed()

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        accepted = websocket.accept_headers(request)
        if isinstance(accepted, web.Response):
            return answers.no_websocket()
        socket = SeafileSocket(
            buffer_bytes=self._context.client_buffer_bytes,
            max_frame_bytes=self._settings.message_max_bytes,
            reaper=self._reaper,
            heartbeat=self._heartbeat,
        )
        client = SeafileClient(
            self._service,
            socket,
            agent=request.headers.get("User-Agent", ""),
            address=answers.sender(request),
        )
        socket.on_text = socket.on_binary = client.on_message
        socket.on_full, socket.on_drained = client.full, client.drained
        self._clients.add(client)
        self._open.opened()

        def closed() -> None:
            self._clients.discard(client)
            self._open.closed()
            client.closed()

        socket.on_closed = closed
        return take_over(request, accepted, socket)


def _below(name: str) -> str:
    return f"/{{before:/*(?:notification/+)?}}{name}{{after:/*}}"


async def _ping(_request: web.Request) -> web.Response:
    return answers.pong()


async def _bad_request(_request: web.Request) -> web.Response:
    return answers.no_websocket()


async def _not_found(_request: web.Request) -> web.Response:
    return go_error(404, "404 page not found")


class SeafileDoor(FrontDoor):
    """Serves Seafile's clients and servers."""

    @override
    def mount(self, context: DoorContext, settings: SeafileSettings) -> MountedSeafile:
        return MountedSeafile(context, settings)


DOOR = SeafileDoor()
