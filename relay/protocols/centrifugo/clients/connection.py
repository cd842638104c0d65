"""Protocol state machine of one Centrifugo v1 client. Performs no I/O.

Commands run in the order in which they arrive. Only consecutive subscribe commands wait for their
streams at the same time. Errors that v1 calls fatal close the connection with code 3000 and a
reason in JSON; the other commands of that frame get no reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING

from typing_extensions import override

from relay.core.errors import LimitExceeded, RelayError
from relay.core.model import Channel
from relay.core.reasons import Reason
from relay.hub.session import Client
from relay.protocols.centrifugo import codec, encoders
from relay.protocols.centrifugo.clients import credentials, requests
from relay.protocols.centrifugo.clients.interfaces import (
    ClientTransport,
    CommandContext,
    FatalError,
    ReadControl,
)
from relay.protocols.centrifugo.clients.reply_queue import ReplyQueue, ReplySlot
from relay.protocols.centrifugo.clients.slow_client_timer import SlowClientTimer
from relay.protocols.centrifugo.clients.subscriptions import Subscriptions
from relay.protocols.centrifugo.commands import InvalidCommand
from relay.protocols.centrifugo.encoders import DOOR
from relay.stream.format.json_text import is_json

if TYPE_CHECKING:
    from relay.core.connection import ConnectionInfo
    from relay.core.model import Principal
    from relay.hub.recovery import Notice
    from relay.hub.session import Session, Subscription
    from relay.protocols.centrifugo.commands import CentrifugoCommand
    from relay.protocols.centrifugo.encoders import CentrifugoEncoder
    from relay.protocols.centrifugo.server_state import ServerState

# Reading pauses while this many commands wait. If the transport cannot pause, the connection is
# closed when the second limit is exceeded.
_PAUSE_AT = 64
_MAX_WAITING = 16384
# Commands that start in one turn of the event loop.
_COMMANDS_PER_TURN = 50
# Frames that may wait while a long frame is being parsed.
_MAX_UNPARSED = 128
# Shared by all connections without waiting commands, as in reply_queue.py.
_EMPTY: deque[ReplySlot | None] = deque(maxlen=0)


class ConnectionState(enum.Enum):
    """Life of a connection."""

    NEW = enum.auto()
    # The transport is open and the client has not authenticated.
    UNAUTHENTICATED = enum.auto()
    # The connection has a session in the hub.
    AUTHENTICATED = enum.auto()
    CLOSED = enum.auto()


_TRANSITIONS = {
    ConnectionState.NEW: {ConnectionState.UNAUTHENTICATED, ConnectionState.CLOSED},
    ConnectionState.UNAUTHENTICATED: {ConnectionState.AUTHENTICATED, ConnectionState.CLOSED},
    ConnectionState.AUTHENTICATED: {ConnectionState.CLOSED},
    ConnectionState.CLOSED: set[ConnectionState](),
}


class _Processing(enum.Enum):
    """Whether waiting commands are being started."""

    IDLE = enum.auto()
    RUNNING = enum.auto()
    # The rest of the commands starts in the next turn of the event loop.
    YIELDED = enum.auto()


class CentrifugoConnection(Client, CommandContext):
    """Executes a client's commands."""

    __slots__ = (
        "_info",
        "_paused_for_reply",
        "_processing",
        "_read_control",
        "_reading",
        "_replies",
        "_slow_timer",
        "_stale_timer",
        "_state",
        "_transport",
        "_unparsed",
        "_waiting",
        "encoder",
        "server",
        "subscriptions",
    )

    def __init__(self, server: ServerState, encoder: CentrifugoEncoder, client: str) -> None:
        """`client` is the new connection's ID, a UUID."""
        self.server = server
        self.encoder = encoder
        self.client = client
        self.session: Session | None = None
        self.subscriptions: Subscriptions = Subscriptions(server, self)
        # Commands that have started and have no reply. Only subscribe commands can be several.
        self.pending = 0
        self._state = ConnectionState.NEW
        self._info = ""
        self._transport: ClientTransport | None = None
        self._replies = ReplyQueue(self._send, server.stats)
        # None marks an invalid frame.
        self._waiting = _EMPTY
        # A long frame that is being parsed, and the frames after it.
        self._unparsed: deque[bytes] | None = None
        self._processing = _Processing.IDLE
        # The session is paused until the reply to a subscribe command has been sent.
        self._paused_for_reply = False
        self._reading = True
        self._read_control: ReadControl | None = None
        self._stale_timer: asyncio.TimerHandle | None = None
        self._slow_timer: SlowClientTimer | None = None

    @property
    @override
    def closed(self) -> bool:
        return self._state is ConnectionState.CLOSED

    @property
    def transport_info(self) -> ConnectionInfo | None:
        """The description of the network connection."""
        return self._transport.info if self._transport is not None else None

    @property
    @override
    def user(self) -> str:
        return self.session.principal.user if self.session is not None else ""

    @override
    def is_subscribed(self, name: str) -> bool:
        return name in self.subscriptions

    @override
    def info(self, name: str) -> bytes:
        return codec.info_json(self.user, self.client, self._info, self.subscriptions.info(name))

    async def add_presence(self, wanted: Callable[[Channel], bool]) -> None:
        """Add the client to the presence of those of its channels for which `wanted` is True."""
        await self.subscriptions.add_presence(wanted)

    def _enter(self, state: ConnectionState) -> None:
        if state not in _TRANSITIONS[self._state]:
            raise RuntimeError(f"a connection cannot go from {self._state} to {state}")
        self._state = state

    # ---- from the client ------------------------------------------------------------------------

    def on_frame(self, frame: bytes) -> None:
        """Queue the commands of one frame after those of earlier frames."""
        if self.closed:
            return
        if len(frame) > self.server.settings.client_request_max_size:
            self.reject_oversized()
            return
        if self._unparsed is not None:
            self._unparsed.append(frame)
            if len(self._unparsed) > _MAX_UNPARSED:
                self.reject_oversized()
        elif len(frame) > codec.SMALL_BYTES:
            self._unparsed = deque([frame])
            self._update_reading()
            _ = self.server.context.spawn(
                self._parse(self._unparsed), name=f"centrifugo {self.client} frame"
            )
        else:
            commands: list[CentrifugoCommand] | None = None
            with contextlib.suppress(InvalidCommand):
                commands = codec.parse(frame)
            self._enqueue(frame, commands)

    def _enqueue(self, frame: bytes, commands: list[CentrifugoCommand] | None) -> None:
        """Queue the commands of a frame, None for an invalid frame."""
        if not self._waiting:
            self._waiting = deque()
        if commands is None:
            self._waiting.append(None)
        else:
            self._waiting.extend(self._replies.add_frame(commands, len(frame)))
        self._process()

    async def _parse(self, frames: deque[bytes]) -> None:
        """Parse a long frame, and the frames that arrive in the meantime."""
        while frames and not self.closed:
            frame = frames.popleft()
            commands: list[CentrifugoCommand] | None = None
            with contextlib.suppress(InvalidCommand):
                commands = await codec.parse_in_slices(frame)
            if not self.closed:
                self._enqueue(frame, commands)
        self._unparsed = None
        self._update_reading()

    def reject_oversized(self) -> None:
        """Close the connection because of a frame that is too large.

        Called if the transport has accepted the frame, or if it has no close code of its own.
        """
        self.close(Reason.LIMIT_EXCEEDED)

    def _process(self) -> None:
        """Start as many waiting commands as possible."""
        if self._processing is not _Processing.IDLE or self.closed:
            return
        self._processing = _Processing.RUNNING
        started = 0
        try:
            while self._waiting and not self.closed:
                if started == _COMMANDS_PER_TURN:
                    self._processing = _Processing.YIELDED
                    asyncio.get_running_loop().call_soon(self._process_rest)
                    break
                started += 1
                slot = self._waiting.popleft()
                if not self._start(slot):
                    self._waiting.appendleft(slot)
                    break
        except InvalidCommand:
            self.close(Reason.BAD_MESSAGE)
        except FatalError as fatal:
            self.close(fatal.reason)
        finally:
            if self._processing is _Processing.RUNNING:
                self._processing = _Processing.IDLE
        if not self._waiting:
            self._waiting = _EMPTY
        self._update_reading()

    def _process_rest(self) -> None:
        self._processing = _Processing.IDLE
        self._process()

    def _start(self, slot: ReplySlot | None) -> bool:
        """Start a command. Return False if it has to wait."""
        method = "" if slot is None else slot.command.method
        if self.pending and not (
            method == "subscribe" and self.pending == self.subscriptions.pending_count
        ):
            return False
        if self._transport is None or self._transport.full:
            # Don't create replies for a client that is not reading: they would accumulate in
            # memory.
            return False
        if slot is None:
            raise FatalError(Reason.BAD_MESSAGE)
        if self.session is None and method != "connect":
            raise FatalError(Reason.UNAUTHORIZED)
        handler = _METHODS.get(method)
        if handler is None:
            raise FatalError(Reason.UNKNOWN_COMMAND)
        return handler(self, slot)

    def _update_reading(self) -> None:
        reading = len(self._waiting) < _PAUSE_AT and self._unparsed is None
        if self._read_control is not None and reading != self._reading and not self.closed:
            self._reading = reading
            (self._read_control.resume_reading if reading else self._read_control.pause_reading)()
        if len(self._waiting) > _MAX_WAITING:
            self.reject_oversized()

    def connect(self, slot: ReplySlot) -> bool:
        """Authenticate. The reply follows when the user's connections have been counted."""
        if self.session is not None:
            raise FatalError(Reason.BAD_MESSAGE)
        params = codec.connect_params(slot.command.params)
        grant = self.subscriptions.admitted.__contains__
        principal, expired = credentials.authenticate(self.server, params, self.client, grant)
        self.run(self._open(slot, principal, params.info, expired=expired))
        return True

    async def _open(
        self, slot: ReplySlot, principal: Principal, info: str, *, expired: bool
    ) -> None:
        settings = self.server.settings
        try:
            session = await self.server.context.open(
                principal,
                self.encoder,
                self,
                info=self.transport_info,
                limit=settings.user_connection_limit,
            )
        except LimitExceeded:
            raise FatalError(Reason.LIMIT_EXCEEDED) from None
        ttl = settings.connection_lifetime
        if self.closed or self._transport is None or expired:
            session.end()
            # Not an error: the client may send a new token until the connection is stale.
            self.answer(slot, codec.connect_body("", ttl, expired=True))
            return
        self._enter(ConnectionState.AUTHENTICATED)
        self.session = session
        self._info = info if is_json(info.encode()) else ""
        self.server.unauthenticated.discard(self)
        self.server.stats.count("client_num_connect", "node_num_add_client_conn")
        self._cancel_stale_timer()
        session.attach(self._transport)
        self.answer(slot, codec.connect_body(self.client, ttl))

    def refresh(self, slot: ReplySlot) -> bool:
        """Replace the token of this connection. The user does not change.

        The token is checked in insecure mode too.
        """
        params = codec.connect_params(slot.command.params)
        lifetime, session = credentials.check_token(self.server, params), self.session
        if not lifetime.expired:
            if is_json(params.info.encode()):
                self._info = params.info
                self.subscriptions.update_presence()
            if lifetime.closes_at is not None and session is not None:
                principal = replace(session.principal, expires_at=lifetime.closes_at)
                self.server.context.hub.change_principal(session, principal)
        ttl = self.server.settings.connection_lifetime
        self.reply(slot, codec.connect_body(self.client, ttl, expired=lifetime.expired))
        return True

    # ---- to the client --------------------------------------------------------------------------

    @override
    def run(self, command: Coroutine[object, object, None]) -> None:
        self.pending += 1
        _ = self.server.context.spawn(self._run(command), name=f"centrifugo {self.client}")

    async def _run(self, command: Coroutine[object, object, None]) -> None:
        try:
            await command
        except FatalError as fatal:
            self.close(fatal.reason)
        except RelayError:
            self.close(Reason.UNAVAILABLE)

    @override
    def reply(self, slot: ReplySlot, body: bytes | None, error: str = "", advice: str = "") -> None:
        self._count_refusal(error)
        self._replies.fill(slot, codec.reply(slot.command, body, error, advice))

    def _count_refusal(self, reason: str) -> None:
        if reason in codec.ERRORS:
            self.server.context.metrics.rejected(encoders.DOOR, reason.replace(" ", "_"))

    @override
    def answer(
        self,
        slot: ReplySlot,
        body: bytes,
        error: str = "",
        advice: str = "",
        *,
        holds: bool = False,
    ) -> None:
        if self.closed:
            return
        self.pending -= 1
        self._count_refusal(error)
        text = codec.reply(slot.command, body, error, advice)
        self._replies.fill(slot, text, holds=holds)
        self._pause_for_reply()
        self._process()

    def _pause_for_reply(self) -> None:
        # A paused session receives no events. It catches up from the stream when it resumes.
        session, held = self.session, self._replies.held > 0
        if session is None or held == self._paused_for_reply:
            return
        self._paused_for_reply = held
        if held:
            session.pause()
        else:
            self.on_drained()

    def _send(self, payload: bytes) -> None:
        data = self.encoder.frame(payload)
        if self.session is not None:
            self.session.reply(data)
        elif self._transport is not None:
            self._transport.write(data)

    # ---- from the transport ---------------------------------------------------------------------

    def on_open(self, transport: ClientTransport, read_control: ReadControl | None = None) -> None:
        """Start the time limit for authentication.

        `read_control` is None if the transport cannot stop reading.
        """
        self._enter(ConnectionState.UNAUTHENTICATED)
        self._transport, self._read_control = transport, read_control
        self.server.unauthenticated.add(self)
        if delay := self.server.settings.stale_connection_close_delay:
            self._stale_timer = self.server.call_later(
                delay, lambda: self.close(Reason.NO_CREDENTIAL)
            )

    def on_full(self) -> None:
        """Pause the session: the send buffer is full. The client catches up from the stream."""
        if self.session is not None:
            self.session.pause()
        if self._slow_timer is None and self._transport is not None:
            self._slow_timer = SlowClientTimer(self.server, self._transport, self.close)

    def on_drained(self) -> None:
        """Resume the session and start waiting commands: the send buffer has room again."""
        if self._transport is None or self._transport.full:
            return
        self._cancel_slow_timer()
        if self.session is not None and not self._paused_for_reply:
            self.session.resume()
        self._process()

    def on_closed(self) -> None:
        """Release the connection: the transport has closed."""
        self._release()
        self._transport = self._read_control = None

    # ---- callbacks of the hub -------------------------------------------------------------------

    @override
    def subscribed(self, subscription: Subscription) -> None:
        self.subscriptions.confirm(subscription)

    @override
    def refused(self, channel: Channel, error: RelayError) -> None:
        try:
            self.subscriptions.reject(channel, error)
        except FatalError as fatal:
            self.close(fatal.reason)

    @override
    def dropped(self, channel: Channel, notice: Notice) -> None:
        del notice
        self.subscriptions.drop(channel)

    @override
    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        del subscription
        self.close(notice.reason)

    @override
    def expired(self) -> None:
        self.close(Reason.EXPIRED)

    @override
    def disconnect(self, reason: Reason) -> None:
        self.close(reason)

    # ---- closing --------------------------------------------------------------------------------

    def close(self, reason: Reason) -> None:
        """Close with v1's text for the reason. Do nothing if the connection is closed."""
        if self.closed:
            return
        self._enter(ConnectionState.CLOSED)
        self._count_refusal(codec.CLOSES[reason][0])
        if self.session is not None:
            self.session.write_out()
            self.session.ending = self.session.ending or reason
        elif reason is not Reason.STOPPING:
            text = codec.CLOSES[reason][0]
            self.server.context.turned_away(self.transport_info, DOOR, reason, text)
        self._release()
        if self._transport is not None:
            self._transport.close_with(codec.CLOSE_CODE, codec.close_reason(reason))

    def abort(self) -> None:
        """Close without a close frame, as v1 closes unauthenticated clients at shutdown."""
        self._release()
        if self._transport is not None:
            self._transport.abort()

    def _release(self) -> None:
        if not self.closed:
            self._enter(ConnectionState.CLOSED)
        self._cancel_stale_timer()
        self._cancel_slow_timer()
        self._waiting = _EMPTY
        self.server.unauthenticated.discard(self)
        self.subscriptions.clear()
        if self.session is not None:
            self.session.end()

    def _cancel_slow_timer(self) -> None:
        if self._slow_timer is not None:
            self._slow_timer.cancel()
            self._slow_timer = None

    def _cancel_stale_timer(self) -> None:
        if self._stale_timer is not None:
            self._stale_timer.cancel()
            self._stale_timer = None


_METHODS: dict[str, Callable[[CentrifugoConnection, ReplySlot], bool]] = {
    "connect": CentrifugoConnection.connect,
    "refresh": CentrifugoConnection.refresh,
    "subscribe": lambda connection, slot: connection.subscriptions.subscribe(slot),
    "unsubscribe": lambda connection, slot: connection.subscriptions.unsubscribe(slot),
    "publish": lambda connection, slot: requests.publish(connection.server, connection, slot),
    "presence": lambda connection, slot: requests.presence(connection.server, connection, slot),
    "history": lambda connection, slot: requests.get_history(connection.server, connection, slot),
    "ping": requests.ping,
}
