"""Routes of the native protocol: `/sse`, `/ws` and the live page."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from aiohttp import web
from typing_extensions import override

from relay.core.client_libraries import allowed_headers, position_in
from relay.core.errors import (
    BadRequest,
    ClientError,
    LimitExceeded,
    RelayError,
    Unauthorized,
    Unavailable,
)
from relay.core.model import Channel, Position, Principal
from relay.core.reasons import Reason
from relay.doorkit import static_page
from relay.doorkit.contract import FrontDoor, Mounted
from relay.doorkit.first_subscriptions import NOT_READING, FirstSubscriptions, problems
from relay.doorkit.http_status import status_of
from relay.doorkit.open_connections import OpenConnections
from relay.doorkit.origins import AllowedOrigins
from relay.hub import cursor
from relay.hub.recovery import Notice
from relay.protocols.native import commands, encoders, page
from relay.protocols.native.credentials import SUBPROTOCOL, principal_of
from relay.protocols.native.encoders import WEBSOCKET, notice_block, sse_encoder
from relay.protocols.native.settings import NativeSettings
from relay.protocols.native.sse_client import SseClient, SubscriptionRejected
from relay.protocols.native.ws_client import CLOSES, WsClient
from relay.transports.socket import sse, websocket
from relay.transports.socket.heartbeat import Heartbeat
from relay.transports.socket.reaper import Reaper
from relay.transports.socket.take_over import connection_of, take_over

if TYPE_CHECKING:
    from relay.doorkit.contract import DoorContext, Listener
    from relay.hub.session import Session
    from relay.transports.socket.client_socket import ClientSocket

# An SSE request waits this long for Redis before its client is asked to reconnect.
_CONNECTION_S = 5.0
_UNUSABLE = Notice("reset", Reason.UNKNOWN_POSITION)
_PARAMETERS = frozenset({"channel", "token", "envelope"})


class MountedNative(Mounted):
    """The mounted protocol: its routes, settings and open connections."""

    listeners: Sequence[Listener] = ()
    producers: Sequence[web.AbstractRouteDef] = ()
    drain_s: float | None = None

    def __init__(self, context: DoorContext, settings: NativeSettings) -> None:
        self._context = context
        self._open = OpenConnections(context.metrics.connections.labels("native"))
        self.routes: list[web.AbstractRouteDef] = [
            route
            for slash in ("", "/")
            for route in (
                web.get(f"/sse{slash}", self._with_errors(self._with_retry(self._sse))),
                web.options(f"/sse{slash}", self._preflight),
                web.get(f"/ws{slash}", self._with_errors(self._ws), allow_head=False),
            )
        ]
        if settings.page:
            self.routes += static_page.routes(page.load())
        self._reaper = Reaper()
        self.reload(settings)

    @override
    def reload(self, settings: NativeSettings) -> None:
        # Open connections keep the heartbeat interval that they began with.
        self._settings = settings
        self._origins = AllowedOrigins(settings.origins(), "[protocol:native] allowed_origins")
        self._sse_beat = Heartbeat(
            interval_s=settings.heartbeat_s, beat=encoders.HEARTBEAT, only_quiet=True
        )
        self._ws_beat = Heartbeat(
            interval_s=settings.heartbeat_s,
            beat=websocket.PING,
            deadline_s=settings.pong_timeout_s,
            farewell=websocket.frame_close(CLOSES[Reason.NO_PONG], "no answer to pings"),
        )

    @override
    async def closed(self) -> None:
        await self._open.wait_closed()

    def _connect(self, socket: ClientSocket, session: Session) -> None:
        """Pass events of the socket to the session, and count the connection until it is closed."""
        self._open.opened()

        def closed() -> None:
            self._open.closed()
            session.end()

        socket.on_full = session.pause
        socket.on_drained = session.resume
        socket.on_closed = closed

    # ---- server-sent events -----------------------------------------------------------------

    async def _sse(self, request: web.Request) -> web.StreamResponse:
        settings, context = self._settings, self._context
        principal = self._principal(request)
        channels = _channels(request, settings.channels_per_connection)
        if not channels:
            raise BadRequest("channel is missing: /sse?channel=C")
        envelope = request.query.get("envelope", "0") not in ("", "0", "false")
        # The header takes precedence: a reconnecting browser repeats the URL and sends the newest
        # ID in the header.
        last = _position(request)
        last = request.headers.get("Last-Event-ID") or last
        positions, unusable = _positions(last, channels)
        if request.method == "HEAD":
            # Monitors ask for the head only. There is nobody to receive events.
            return web.Response(headers=sse.HEADERS | self._cors(request))
        if self._are_away(channels):
            await self._wait_connected(channels)
        first = FirstSubscriptions(context.not_reading, context.clock)
        first.expect(channels)
        client = SseClient(first, settings)
        encoder = sse_encoder(several=len(channels) > 1, envelope=envelope)
        session = client.session = await context.open(
            principal, encoder, client, info=connection_of(request)
        )
        try:
            for channel in channels:
                context.subscribe(session, channel, positions.get(channel))
            await first.wait(session)
        except BaseException:
            session.end()
            raise
        session.offer(self._first_block(session))
        for channel, problem in first.away.items():
            session.offer(encoders.sse_error(Unavailable(problem), channel))
        if unusable:
            for channel in channels:
                context.metrics.notified(_UNUSABLE, 1)
                session.offer(notice_block(channel, _UNUSABLE))
        socket = sse.SseConnection(
            buffer_bytes=context.client_buffer_bytes,
            reaper=self._reaper,
            heartbeat=self._sse_beat,
        )
        self._connect(socket, session)
        response = take_over(request, sse.head(self._cors(request)), socket)
        client.attached(socket)
        session.attach(socket)
        return response

    def _are_away(self, channels: Sequence[Channel]) -> bool:
        """Return True if none of these channels can be read now."""
        return len(problems(self._context.not_reading, channels)) == len(channels)

    async def _wait_connected(self, channels: Sequence[Channel]) -> None:
        """Wait for the connection to Redis, which may be restarting or failing over."""
        try:
            async with asyncio.timeout(_CONNECTION_S):
                await self._context.wait_connected(channels)
        except TimeoutError:
            if self._are_away(channels):
                raise Unavailable(self._context.not_reading(channels) or NOT_READING) from None

    def _with_retry(
        self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return an empty stream if a request fails for a temporary reason.

        A browser's EventSource reconnects after the end of a stream, but not after a 503.
        """

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except Unavailable as exc:
                return self._empty_stream(request, exc)
            except SubscriptionRejected as exc:
                if isinstance(exc.error, Unavailable):
                    return self._empty_stream(request, exc.error)
                raise

        return handle

    def _empty_stream(self, request: web.Request, error: Unavailable) -> web.Response:
        self._context.metrics.rejected("native", error.code)
        response = web.Response(
            body=encoders.empty_stream(random.randint(1000, 5000), str(error)),  # noqa: S311
            headers=sse.HEADERS | self._cors(request),
        )
        response.force_close()
        return response

    def _first_block(self, session: Session) -> bytes:
        positions = [
            (name, subscription.position) for name, subscription in session.subscriptions.items()
        ]
        at = cursor.encode(positions)
        ids = [(name, str(position.id)) for name, position in positions]
        return encoders.first_block(at, self._settings.next_retry_ms(), ids)

    async def _preflight(self, request: web.Request) -> web.Response:
        headers = self._cors(request)
        headers["Access-Control-Allow-Methods"] = "GET"
        headers["Access-Control-Max-Age"] = "600"
        headers |= allowed_headers(request.headers)
        return web.Response(status=204, headers=headers)

    # ---- websocket --------------------------------------------------------------------------

    async def _ws(self, request: web.Request) -> web.StreamResponse:
        settings, context = self._settings, self._context
        accepted = websocket.accept_headers(request, subprotocol=SUBPROTOCOL)
        if isinstance(accepted, web.Response):
            return accepted
        client = WsClient(context, settings, asyncio.get_running_loop().time)
        socket = websocket.WebSocketConnection(
            buffer_bytes=context.client_buffer_bytes,
            max_frame_bytes=settings.ws_max_frame_bytes,
            reaper=self._reaper,
            heartbeat=self._ws_beat,
        )
        # Scripts cannot read the response to a rejected handshake, so an invalid token is reported
        # over the open WebSocket. An Origin that is not allowed is rejected before.
        try:
            principal = self._principal(request)
            session = await context.open(principal, WEBSOCKET, client, info=connection_of(request))
        except (Unauthorized, LimitExceeded) as exc:
            context.metrics.rejected("native", exc.code)
            context.turned_away(connection_of(request), "native", exc.code, str(exc))
            response = take_over(request, accepted, socket)
            socket.write(websocket.frame_text(encoders.error_object(exc)))
            socket.close_with(CLOSES[exc.code], str(exc))
            return response
        client.session = session
        socket.on_text = client.on_text
        self._connect(socket, session)
        response = take_over(request, accepted, socket)
        client.attached(socket)
        session.attach(socket)
        self._subscribe_from_query(request, client)
        context.hub.flush_soon()
        return response

    def _subscribe_from_query(self, request: web.Request, client: WsClient) -> None:
        names = request.query.getall("channel", [])
        try:
            last = _position(request)
            channels = _channels(request, self._settings.channels_per_connection)
            positions = cursor.decode(last, channels) if last else {}
        except (ClientError, Unavailable) as exc:
            client.send_error(exc, names[0] if len(names) == 1 else None)
            return
        for channel in channels:
            try:
                client.subscribe(channel, positions.get(channel))
            except (ClientError, Unavailable) as exc:
                client.send_error(exc, channel)

    # ---- both -------------------------------------------------------------------------------

    def _cors(self, request: web.Request) -> dict[str, str]:
        return self._origins.cors(request.headers, request.path)

    def _principal(self, request: web.Request) -> Principal:
        context = self._context
        return principal_of(request, context.read_token, self._origins, insecure=context.insecure)

    def _with_errors(
        self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return error responses for the errors that the handler raises."""

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request)
            except SubscriptionRejected as exc:
                return self._error_response(request, exc.error, exc.channel)
            except (ClientError, Unavailable) as exc:
                return self._error_response(request, exc, None)

        return handle

    def _error_response(
        self, request: web.Request, error: RelayError, channel: Channel | None
    ) -> web.Response:
        if not isinstance(error, ClientError | Unavailable):
            raise error
        self._context.metrics.rejected("native", error.code)
        headers = self._cors(request)
        headers["Cache-Control"] = "no-store"
        if isinstance(error, Unavailable):
            headers["Retry-After"] = str(random.randint(1, 5))  # noqa: S311
        return web.Response(
            status=status_of(error),
            body=encoders.refusal(error, channel),
            content_type="application/json",
            headers=headers,
        )


def _position(request: web.Request) -> str | None:
    try:
        return position_in(request.query.items(), _PARAMETERS)
    except ValueError as exc:
        raise BadRequest(str(exc)) from None


def _positions(
    last: str | None, channels: Sequence[Channel]
) -> tuple[dict[Channel, Position], bool]:
    """Return the positions in the client's last event ID, and True if it cannot be used.

    Browsers send the ID of another server too. After an error they would not reconnect, so the
    client receives a notice for each channel instead.
    """
    if not last:
        return {}, False
    try:
        return cursor.decode(last, channels), False
    except BadRequest:
        return {}, True


def _channels(request: web.Request, most: int) -> Sequence[Channel]:
    names = list(dict.fromkeys(request.query.getall("channel", [])))
    if len(names) > most:
        raise LimitExceeded(f"more than {most} channels on one connection")
    try:
        return [commands.requested_channel(name) for name in names]
    except ValueError as exc:
        raise BadRequest(str(exc)) from None


class NativeDoor(FrontDoor):
    """Server-sent events and WebSocket with relay's own messages."""

    @override
    def mount(self, context: DoorContext, settings: NativeSettings) -> MountedNative:
        return MountedNative(context, settings)


DOOR = NativeDoor()
