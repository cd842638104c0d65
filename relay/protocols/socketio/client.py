"""One client: its connection to the namespace, its rooms and its session in the hub.

    connecting ── token ── session ── rooms ── CONNECT ── events
        └ refused: CONNECT_ERROR (2.x: ERROR), then the connection is closed

A client joins `allusers` and the room of its user ID when it connects. Emitters can add it to other
rooms. Each room is one subscription of the client's session. The socket is attached to the session
once all subscriptions are confirmed, so that CONNECT is sent before the first event.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from typing_extensions import override

from relay.core.client_libraries import keeps_offsets
from relay.core.errors import (
    ClientError,
    Forbidden,
    RelayError,
    Unauthorized,
    Unavailable,
)
from relay.core.model import Channel, EntryID, Position, Principal
from relay.core.reasons import Reason
from relay.doorkit.first_subscriptions import (
    DeferredLog,
    FirstSubscriptions,
    defer_if_away,
    problems,
)
from relay.doorkit.recoverable_sessions import SavedSession, new_pid
from relay.hub.recovery import Notice
from relay.hub.session import Client
from relay.protocols.socketio.credentials import find_token, read_profile
from relay.protocols.socketio.entry_format import EVERYBODY, SOCKET, UnusableEmit, channel_of
from relay.protocols.socketio.rooms import Rooms
from relay.transports.socketio.connection import Acknowledge, SocketIoConnection

if TYPE_CHECKING:
    from relay.doorkit.contract import DoorContext
    from relay.doorkit.engineio_clients import EngineIoClients
    from relay.doorkit.origins import AllowedOrigins
    from relay.doorkit.recoverable_sessions import RecoverableSessions
    from relay.hub.session import Encoder, Session, Subscription
    from relay.protocols.socketio.settings import SocketIoSettings
    from relay.rights.token import TokenReader
    from relay.transports.engineio.engine import Engine
    from relay.transports.socket.exchange import HttpRequest

_GOODBYE_S = 1.0
# Time in which a client must join the namespace: Socket.IO's `connectTimeout`.
_JOIN_S = 45.0

RoomIds = Mapping[str, EntryID]


class ClientOwner(Protocol):
    """State and functions that the clients of this worker share."""

    context: DoorContext
    settings: SocketIoSettings
    tokens: TokenReader
    origins: AllowedOrigins
    sessions: RecoverableSessions[RoomIds]
    clients: EngineIoClients[SocketClient]
    deferred: DeferredLog

    def encoder(self, version: int, *, recovers: bool) -> Encoder:
        """Return the encoder for clients of this Engine.IO version. `recovers` is True if the
        client is known to support connection state recovery."""


class SocketClient(Client):
    """Connects an Engine.IO session with a session in the hub."""

    __slots__ = (
        "_door",
        "_first",
        "_missing",
        "_recovers",
        "_refused",
        "_request",
        "_timer",
        "connection",
        "engine",
        "pid",
        "rooms",
        "session",
        "sid",
        "uid",
    )

    def __init__(self, door: ClientOwner, engine: Engine, request: HttpRequest) -> None:
        self._door = door
        self._request: HttpRequest | None = request
        self.engine = engine
        self.connection = SocketIoConnection(engine, self)
        self.session: Session | None = None
        self.uid = ""
        self.sid = ""
        self.pid = ""
        self.rooms = Rooms({})
        # Channels of rooms that the client may not read.
        self._refused: set[Channel] = set()
        # None except while the client joins its rooms.
        self._first: FirstSubscriptions | None = None
        self._missing = False
        self._recovers = False
        engine.on_message = self.connection.on_message
        engine.on_closed = self.connection.on_closed
        self._timer: asyncio.TimerHandle | None = None
        self._expect_join()

    # ---- from the client (relay.transports.socketio.connection.SocketIoHandler) -------------

    def connecting(self, namespace: str, auth: Mapping[str, Any], query: str) -> None:
        """Check the token, then join. Nothing is sent to the client before that."""
        request, door = self._request, self._door
        if namespace != door.settings.namespace:
            self.connection.answer_other(namespace)
            return
        if request is None:
            return
        try:
            token = find_token(request, auth, query, door.origins)
            profile = read_profile(door.tokens, token)
            channel_of(profile.uid)
        except (Unauthorized, Forbidden) as exc:
            self._refuse(exc)
            return
        except UnusableEmit:
            self._refuse(Unauthorized("the token's uid cannot be a room"))
            return
        self.uid = profile.uid
        principal = Principal(
            user=profile.uid,
            groups=profile.roles,
            expires_at=profile.expires_at,
            door="socketio",
            grant=self._grants,
        )
        self._recovers = keeps_offsets(request.query, auth)
        _ = door.context.spawn(self._join(principal, dict(auth)), name="socketio join")

    def event(
        self, namespace: str, name: str, args: list[Any], acknowledge: Acknowledge | None
    ) -> None:
        """Ignore the event: AcceleratXR's service handles none."""

    def left(self, namespace: str) -> None:
        """End the session for good, because the client has left."""
        if namespace != self._door.settings.namespace:
            return
        self._forget()
        self._end_session()
        if self.connection.is_idle:
            self.engine.close()
        else:
            self._expect_join()

    def closed(self) -> None:
        """End the session in the hub. The saved session can be resumed for a while."""
        self._stop_timer()
        self._request = None
        self._door.clients.remove(self)
        self._end_session()

    # ---- joining ----------------------------------------------------------------------------

    def _grants(self, channel: Channel) -> bool:
        # Called at every check of rights, because the client may have left the room meanwhile.
        return self.rooms.grants(channel)

    async def _join(self, principal: Principal, auth: dict[str, Any]) -> None:
        try:
            await self._subscribe(principal, auth)
        except RelayError as exc:
            self._end_session()
            self._refuse(exc)

    async def _subscribe(self, principal: Principal, auth: dict[str, Any]) -> None:
        door = self._door
        record: SavedSession[RoomIds] | None = None
        kept = None
        if self.connection.version == 4:
            kept = await door.sessions.find(auth, self.uid)
        positions: dict[Channel, Position] | None = None
        rooms = Rooms.new((EVERYBODY, self.uid))
        if kept is not None:
            self.pid, record = kept
            channels = Rooms(record.state).channels()
            positions = record.positions(auth, channels)
            if positions is None:
                record = None
        if record is not None:
            door.sessions.take_over(self.pid, record)
            rooms = Rooms(record.state)
        await self._open(principal, rooms, positions or {}, record)
        if record is not None and self._missing:
            # Events are missing. A new session ID tells the client so.
            self._end_session()
            record = None
            await self._open(principal, Rooms.new((EVERYBODY, self.uid)), {}, None)
        await self._begin(record)

    async def _open(
        self,
        principal: Principal,
        rooms: Rooms,
        positions: Mapping[Channel, Position],
        record: SavedSession[RoomIds] | None,
    ) -> None:
        door, context = self._door, self._door.context
        channels = rooms.channels()
        away = problems(context.not_reading, channels)
        if len(away) == len(channels):
            raise Unavailable(context.not_reading(channels))
        self.rooms, self._missing = rooms, False
        self.sid = record.sid if record is not None else self._new_sid()
        principal = replace(principal, client=self.sid)
        encoder = door.encoder(self.connection.version, recovers=self._recovers)
        session = self.session = await context.open(principal, encoder, self, info=self.engine.info)
        if self.engine.closing:
            raise Unavailable("the client has disconnected")
        first = self._first = FirstSubscriptions(context.not_reading, context.clock)
        first.expect(channels)
        for channel in channels:
            context.subscribe(session, channel, positions.get(channel))
        try:
            await first.wait(session)
        finally:
            self._first = None
        door.deferred.report(first.away)

    async def _begin(self, record: SavedSession[RoomIds] | None) -> None:
        door, session = self._door, self.session
        if session is None or self.engine.closing:
            raise Unavailable("the client has disconnected")
        self.rooms.began(session)
        if record is None:
            recoverable = self.connection.version == 4 and door.sessions.recovery_s
            self.pid = new_pid() if recoverable else ""
        if self.pid and not await door.sessions.save_first(self.pid, self.saved_session()):
            self.pid = ""
        connection, namespace = self.connection, door.settings.namespace
        if self.engine.closing or session.closed or not connection.wants(namespace):
            raise Unavailable("the client has disconnected")
        self._stop_timer()
        more = {"pid": self.pid} if self.pid else {}
        self.engine.authorize()
        connection.out = session.reply
        connection.accept(namespace, self.sid, **more)
        engine = self.engine
        engine.on_full, engine.on_drained = session.pause, session.resume
        door.sessions.joined(self)
        session.attach(engine)
        if engine.full:
            session.pause()

    def _new_sid(self) -> str:
        if self.connection.version == 3:
            # A 2.x client derives the same ID from its Engine.IO session ID.
            return f"{self._door.settings.namespace}#{self.engine.sid}"
        return SOCKET + secrets.token_urlsafe(15)

    def _refuse(self, error: RelayError) -> None:
        """Reject the client and close the connection.

        DISCONNECT follows CONNECT_ERROR, because clients before 4.0 would reconnect otherwise.
        """
        if self.engine.closing:
            return
        door, connection = self._door, self.connection
        code = error.code if isinstance(error, ClientError | Unavailable) else Reason.UNAVAILABLE
        door.context.metrics.rejected("socketio", code)
        door.context.turned_away(self.engine.info, "socketio", code, str(error))
        connection.out = self.engine.write
        namespace = door.settings.namespace
        # Temporary errors must not be sent as CONNECT_ERROR: a 4.x client would stop reconnecting.
        if isinstance(error, ClientError):
            connection.refuse(namespace, str(error))
            connection.server_disconnect(namespace)
            self._close_soon()
        else:
            self.engine.close()

    # ---- rooms ------------------------------------------------------------------------------

    def names(self) -> set[str]:
        """Return the names by which emitters address this client: its rooms and its ID."""
        return {*self.rooms.joined, self.sid}

    def join(self, room: str, place: EntryID | None) -> None:
        """Join a room on behalf of an emitter, from `place` in the room's stream."""
        session = self.session
        if session is None or session.closed or room in self.rooms.joined:
            return
        try:
            channel = self.rooms.add(room, place, session)
        except UnusableEmit:
            return
        if channel is None:
            self._door.sessions.changed(self)
        elif channel not in session.reserved:
            asked = None if place is None else Position(place)
            context = self._door.context
            context.subscribe(session, channel, asked)
            defer_if_away(context.not_reading, context.clock, session, channel)

    def leave(self, room: str) -> None:
        """Leave a room on behalf of an emitter."""
        session = self.session
        if session is None or session.closed or room not in self.rooms.joined:
            return
        channel = self.rooms.remove(room)
        if channel in session.subscriptions or channel in session.reserved:
            self._door.context.hub.unsubscribe(session, channel)
        self._door.sessions.changed(self)

    # ---- from the hub (relay.hub.session.Client) --------------------------------------------

    @override
    def subscribed(self, subscription: Subscription) -> None:
        if subscription.pending_notice is not None:
            self._missing = True
        self.rooms.placed(subscription)
        if self._first is None:
            # An emitter has added the client to this room.
            self._door.sessions.changed(self)
        else:
            self._first.decide(subscription.feed.channel)

    @override
    def refused(self, channel: Channel, error: RelayError) -> None:
        self.rooms.lost(channel)
        if isinstance(error, Forbidden):
            self._refused.add(channel)
        if self._first is None or not self._first.is_waiting:
            if not self.rooms.joined:
                self.server_disconnect()
            return
        if isinstance(error, Forbidden) and self.rooms.joined:
            # The user's right to this room was revoked. The client joins its other rooms.
            self._first.decide(channel)
        else:
            self._first.fail(error)

    @override
    def dropped(self, channel: Channel, notice: Notice) -> None:
        # The protocol has no notice for this. A client without rooms is disconnected.
        self.rooms.lost(channel)
        if notice.reason in (Reason.REVOKED, Reason.RIGHTS_CHANGED):
            self._refused.add(channel)
        session = self.session
        if session is not None and not session.subscriptions and notice.reason != Reason.EXPIRED:
            self.server_disconnect()
        else:
            self._door.sessions.changed(self)

    @override
    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        del subscription
        if notice.kind in ("gap", "reset"):
            # Events may be missing. After its reconnect the client's `recovered` is false.
            self._restart()

    def rights_changed(self, channel: Channel | None, user: str | None) -> None:
        """Let a client that may not read a room join again. None stands for all."""
        session = self.session
        if session is None or session.closed or user not in (None, session.principal.user):
            return
        if self._refused if channel is None else channel in self._refused:
            self._restart()

    def _restart(self) -> None:
        """Close the connection and delete its session. The client reconnects by itself."""
        self._refused.clear()
        self._forget()
        self._end_session()
        self.engine.close()

    @override
    def expired(self) -> None:
        # The client must not reconnect by itself, because its token would be rejected.
        self.server_disconnect()

    @override
    def disconnect(self, reason: Reason) -> None:
        if reason == Reason.STOPPING:
            # The client reconnects, to another worker.
            self._end_session()
            self.engine.close()
        else:
            self.server_disconnect()

    def close_superseded(self) -> None:
        """Close the connection: its client has resumed the session on another one."""
        self.pid = ""
        self._end_session()
        self.engine.close()

    def server_disconnect(self) -> None:
        """Disconnect the client for good: it does not reconnect (`io server disconnect`)."""
        session = self.session
        self._forget()
        if session is not None and not session.closed:
            self.connection.leave(self._door.settings.namespace)
            self._end_session()
        self._close_soon()

    # ---- inner workings ---------------------------------------------------------------------

    def saved_session(self) -> SavedSession[RoomIds]:
        """Return what another worker needs to resume this session."""
        return SavedSession(
            sid=self.sid,
            user=self.uid,
            worker=self._door.context.bus.address,
            state=dict(self.rooms.joined),
            start=self.rooms.start(),
        )

    def _forget(self) -> None:
        pid, self.pid = self.pid, ""
        if pid:
            self._door.sessions.forget(pid)

    def _end_session(self) -> None:
        session, self.session = self.session, None
        if self._first is not None:
            self._first.fail(Unavailable("the client has disconnected"))
        # The cached subscriptions refer to the session and to this client.
        self.rooms.reset_cache()
        if session is not None and not session.closed:
            session.write_out()
            session.end()
            self.connection.out = self.engine.write

    def _close_soon(self) -> None:
        """Close the connection in a second, unless the client closes it before.

        A 4.x client handles packets one turn after the end of its transport, and would miss a
        packet that is followed by the end at once.
        """
        self._stop_timer()
        # A client that was rejected cannot try another token on the same connection.
        self._request = None
        self._timer = asyncio.get_running_loop().call_later(_GOODBYE_S, self.engine.dismiss)

    def _expect_join(self) -> None:
        """Close the connection if the client does not join the namespace in time."""
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(_JOIN_S, self.engine.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
