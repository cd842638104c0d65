"""One client of Centrifugo v1: commands in, hub calls and replies out. No I/O of its own.

Commands are carried out in the order in which they came; subscriptions that follow each other wait
for their streams together. What v1 calls fatal closes the connection with code 3000 and a reason
in JSON, and the rest of its frame is not answered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING

from relay.core.errors import LimitExceeded, RelayError
from relay.core.json_text import is_json
from relay.core.model import Channel
from relay.protocols.centrifugo import codec
from relay.protocols.centrifugo.clients import credentials, requests
from relay.protocols.centrifugo.clients.reply_queue import ReplyQueue, ReplySlot
from relay.protocols.centrifugo.clients.slow_client_timer import SlowClientTimer
from relay.protocols.centrifugo.clients.subscriptions import Subscriptions
from relay.protocols.centrifugo.commands import InvalidCommand
from relay.protocols.centrifugo.encoders import CentrifugoEncoder
from relay.protocols.centrifugo.server_state import (
    ClientTransport,
    FatalError,
    ReadControl,
    ServerState,
)

if TYPE_CHECKING:
    from relay.core.model import Principal
    from relay.hub.recovery import Notice
    from relay.hub.session import Session, Subscription
    from relay.protocols.centrifugo.commands import CentrifugoCommand

CLOSE_CODE = 3000
# Commands that wait for their turn before no more is read from the client, and before it is closed
# where its reading cannot be stopped.
_WAITING = 64
_TOO_MANY = 16384
# Commands that are begun in one turn of the loop, and frames that wait behind a long one.
_TURN = 50
_UNREAD = 128
# As in answers.py.
_NOTHING: deque[ReplySlot | None] = deque(maxlen=0)
_DISCONNECTS = {"disconnected": ("disconnect", False), "stopping": ("shutting down", True)}


class CentrifugoConnection:
    """The table, and the hub's view of the client (`relay.hub.session.Client`)."""

    __slots__ = (
        "_answers",
        "_busy",
        "_held",
        "_info",
        "_input",
        "_reading",
        "_socket",
        "_stall",
        "_timer",
        "_turned",
        "_unread",
        "_waiting",
        "client",
        "closed",
        "door",
        "format",
        "pending",
        "session",
        "subscriptions",
    )

    def __init__(self, door: ServerState, encoder: CentrifugoEncoder, client: str) -> None:
        """`client` is the new connection's ID, a UUID."""
        self.door = door
        self.format = encoder
        self.client = client
        self.session: Session | None = None
        self.closed = False
        self.subscriptions = Subscriptions(door, self)
        # Commands under way, of which only subscriptions may be several.
        self.pending = 0
        self._info = ""
        self._socket: ClientTransport | None = None
        self._answers = ReplyQueue(self._say, door.stats)
        # None stands for a frame that cannot be read.
        self._waiting = _NOTHING
        # Frames behind a long one that is being parsed.
        self._unread: deque[bytes] | None = None
        self._busy = self._held = self._turned = False
        self._reading = True
        self._input: ReadControl | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stall: SlowClientTimer | None = None

    def attached(self, socket: ClientTransport, input: ReadControl | None = None) -> None:
        """The socket is there; the client has some time to say who it is. `input` is where its
        reading can be stopped."""
        self._socket, self._input = socket, input
        self.door.unauthenticated.add(self)
        if delay := self.door.settings.stale_connection_close_delay:
            self._timer = self.door.call_later(delay, lambda: self.close("stale"))

    @property
    def user(self) -> str:
        """'' for who has no name, or has not said it yet."""
        return self.session.principal.user if self.session is not None else ""

    def info(self, name: str) -> bytes:
        """Who this client is in a channel, as pushes and presence say it."""
        return codec.info_json(self.user, self.client, self._info, self.subscriptions.info(name))

    # ---- from the client ------------------------------------------------------------------------

    def on_frame(self, frame: bytes) -> None:
        """One frame; it is dealt with once those before it have been."""
        if self.closed:
            return
        if len(frame) > self.door.settings.client_request_max_size:
            self.oversized()
            return
        if self._unread is not None:
            self._unread.append(frame)
            if len(self._unread) > _UNREAD:
                self.oversized()
        elif len(frame) > codec.SMALL_BYTES:
            self._unread = deque([frame])
            self._read_or_not()
            _ = self.door.context.spawn(
                self._read(self._unread), name=f"centrifugo {self.client} frame"
            )
        else:
            found: list[CentrifugoCommand] | None = None
            with contextlib.suppress(InvalidCommand):
                found = codec.parse(frame)
            self._expect(frame, found)

    def _expect(self, frame: bytes, found: list[CentrifugoCommand] | None) -> None:
        """Queue the commands of a frame; None stands for one that cannot be read."""
        if not self._waiting:
            self._waiting = deque()
        if found is None:
            self._waiting.append(None)
        else:
            self._waiting.extend(self._answers.expect(found, len(frame)))
        self._advance()

    async def _read(self, frames: deque[bytes]) -> None:
        """Parse a long frame, and those that come behind it meanwhile."""
        while frames and not self.closed:
            frame = frames.popleft()
            found: list[CentrifugoCommand] | None = None
            with contextlib.suppress(InvalidCommand):
                found = await codec.parse_in_slices(frame)
            if not self.closed:
                self._expect(frame, found)
        self._unread = None
        self._read_or_not()

    def oversized(self) -> None:
        """A frame too large, where the transport lets it through or has none of its own words."""
        self.close(codec.LIMIT_EXCEEDED)

    def _advance(self) -> None:
        if self._busy or self._turned or self.closed:
            return
        self._busy = True
        begun = 0
        try:
            while self._waiting and not self.closed:
                if begun == _TURN:
                    self._turned = True
                    asyncio.get_running_loop().call_soon(self._next_turn)
                    break
                begun += 1
                slot = self._waiting.popleft()
                if not self._begin(slot):
                    self._waiting.appendleft(slot)
                    break
        except InvalidCommand:
            self.close(codec.INVALID_MESSAGE)
        except FatalError as fatal:
            self.close(fatal.reason, reconnect=fatal.reconnect)
        finally:
            self._busy = False
        if not self._waiting:
            self._waiting = _NOTHING
        self._read_or_not()

    def _next_turn(self) -> None:
        self._turned = False
        self._advance()

    def _begin(self, slot: ReplySlot | None) -> bool:
        """Whether its turn had come, and it was begun."""
        method = "" if slot is None else slot.command.method
        if self.pending and not (
            method == "subscribe" and self.pending == self.subscriptions.asked
        ):
            return False
        if self._socket is None or self._socket.full:
            # Who does not read is not given answers that would have to be kept.
            return False
        if slot is None:
            raise FatalError(codec.INVALID_MESSAGE)
        if self.session is None and method != "connect":
            raise FatalError(codec.UNAUTHORIZED)
        handler = _METHODS.get(method)
        if handler is None:
            raise FatalError(codec.METHOD_NOT_FOUND)
        return handler(self, slot)

    def _read_or_not(self) -> None:
        reading = len(self._waiting) < _WAITING and self._unread is None
        if self._input is not None and reading != self._reading and not self.closed:
            self._reading = reading
            (self._input.resume_reading if reading else self._input.pause_reading)()
        if len(self._waiting) > _TOO_MANY:
            self.oversized()

    def connect(self, slot: ReplySlot) -> bool:
        """Answered once the user's connections on all workers have been counted."""
        if self.session is not None:
            raise FatalError(codec.INVALID_MESSAGE)
        given = codec.credentials(slot.command.params)
        grant = self.subscriptions.admitted.__contains__
        principal, expired = credentials.principal(self.door, given, self.client, grant)
        self.later(self._open(slot, principal, given.info, expired=expired))
        return True

    async def _open(
        self, slot: ReplySlot, principal: Principal, info: str, *, expired: bool
    ) -> None:
        settings = self.door.settings
        try:
            session = await self.door.context.open(
                principal, self.format, self, limit=settings.user_connection_limit
            )
        except LimitExceeded:
            raise FatalError(codec.LIMIT_EXCEEDED) from None
        ttl = settings.connection_lifetime
        if self.closed or self._socket is None or expired:
            session.end()
            # No error: until it is stale, the client may come with a new token.
            self.answer(slot, codec.connect_body("", ttl, expired=True))
            return
        self.session = session
        self._info = info if is_json(info.encode()) else ""
        self.door.authenticated(self)
        self._stop_timer()
        session.attach(self._socket)
        self.answer(slot, codec.connect_body(self.client, ttl))

    def refresh(self, slot: ReplySlot) -> bool:
        """A new token for the same connection, whose user stays. It counts in insecure mode too."""
        given = codec.credentials(slot.command.params)
        term, session = credentials.renewed(self.door, given), self.session
        if not term.expired:
            if is_json(given.info.encode()):
                self._info = given.info
                self.subscriptions.introduce()
            if term.closes_at is not None and session is not None:
                principal = replace(session.principal, expires_at=term.closes_at)
                self.door.context.hub.change_principal(session, principal)
        lifetime = self.door.settings.connection_lifetime
        self.reply(slot, codec.connect_body(self.client, lifetime, expired=term.expired))
        return True

    # ---- to the client --------------------------------------------------------------------------

    def later(self, work: Coroutine[object, object, None]) -> None:
        """Carry out a command that waits for others; it ends with `answer`, or is fatal."""
        self.pending += 1
        # It ends by itself; the relay keeps it.
        _ = self.door.context.spawn(self._carry_out(work), name=f"centrifugo {self.client}")

    async def _carry_out(self, work: Coroutine[object, object, None]) -> None:
        try:
            await work
        except FatalError as fatal:
            self.close(fatal.reason, reconnect=fatal.reconnect)
        except RelayError:
            self.close(codec.INTERNAL_ERROR, reconnect=True)

    def reply(
        self,
        slot: ReplySlot,
        body: bytes | None,
        error: str = "",
        advice: str = "",
        *,
        holds: bool = False,
    ) -> None:
        """The answer to a command that did not have to wait."""
        self._answers.fill(slot, codec.reply(slot.command, body, error, advice), holds=holds)

    def answer(
        self,
        slot: ReplySlot,
        body: bytes,
        error: str = "",
        advice: str = "",
        *,
        holds: bool = False,
    ) -> None:
        """The answer to a command that was under way. `holds`: nothing may reach the client before
        it."""
        if self.closed:
            return
        self.pending -= 1
        text = codec.reply(slot.command, body, error, advice)
        self._answers.fill(slot, text, holds=holds)
        self._hold_or_not()
        self._advance()

    def _hold_or_not(self) -> None:
        # A session that is paused is given no events; it is served from the stream afterwards.
        session, held = self.session, self._answers.held > 0
        if session is None or held == self._held:
            return
        self._held = held
        if held:
            session.pause()
        else:
            self.drained()

    def _say(self, payload: bytes) -> None:
        data = self.format.frame(payload)
        if self.session is not None:
            self.session.reply(data)
        elif self._socket is not None:
            self._socket.write(data)

    # ---- from the socket ------------------------------------------------------------------------

    def filled(self) -> None:
        """Too much waits for the client: it is served from the stream, as long as it takes it."""
        if self.session is not None:
            self.session.pause()
        if self._stall is None and self._socket is not None:
            self._stall = SlowClientTimer(
                self.door,
                self._socket,
                lambda reason, reconnect: self.close(reason, reconnect=reconnect),
            )

    def drained(self) -> None:
        """There is room again: for events, and for answers."""
        if self._socket is None or self._socket.full:
            return
        self._stop_watching()
        if self.session is not None and not self._held:
            self.session.resume()
        self._advance()

    def gone(self) -> None:
        """The socket is closed."""
        self.closed = True
        self._forget()
        self._socket = self._input = None

    # ---- from the hub (relay.hub.session.Client) ------------------------------------------------

    def subscribed(self, subscription: Subscription) -> None:
        """See `relay.hub.session.Client`."""
        self.subscriptions.stands(subscription)

    def refused(self, channel: Channel, error: RelayError) -> None:
        """See `relay.hub.session.Client`."""
        try:
            self.subscriptions.refused(channel, error)
        except FatalError as fatal:
            self.close(fatal.reason, reconnect=fatal.reconnect)

    def dropped(self, channel: Channel, notice: Notice) -> None:
        """See `relay.hub.session.Client`."""
        del notice
        self.subscriptions.dropped(channel)

    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        """Something may be missing, and v1 has no words for it: the client comes back, asks for
        what follows its last message, and is told that it was not recovered."""
        del subscription, notice
        self.close("insufficient state", reconnect=True)

    def expired(self) -> None:
        """See `relay.hub.session.Client`."""
        self.close("expired", reconnect=True)

    def disconnect(self, reason: str) -> None:
        """See `relay.hub.session.Client`."""
        text, reconnect = _DISCONNECTS.get(reason, (reason, True))
        self.close(text, reconnect=reconnect)

    # ---- the end --------------------------------------------------------------------------------

    def close(self, reason: str, *, reconnect: bool = False) -> None:
        """Say why, and leave the hub. Idempotent."""
        if self.closed:
            return
        self.closed = True
        if self.session is not None:
            self.session.write_out()
        self._forget()
        if self._socket is not None:
            self._socket.close_with(CLOSE_CODE, codec.close_reason(reason, reconnect=reconnect))

    def cut(self) -> None:
        """Close without a word, as v1 at its stop who has not said who he is."""
        self.closed = True
        self._forget()
        if self._socket is not None:
            self._socket.abort()

    def _forget(self) -> None:
        self._stop_timer()
        self._stop_watching()
        self._waiting = _NOTHING
        self.door.unauthenticated.discard(self)
        self.subscriptions.end()
        if self.session is not None:
            self.session.end()

    def _stop_watching(self) -> None:
        if self._stall is not None:
            self._stall.end()
            self._stall = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


_METHODS: dict[str, Callable[[CentrifugoConnection, ReplySlot], bool]] = {
    "connect": CentrifugoConnection.connect,
    "refresh": CentrifugoConnection.refresh,
    "subscribe": lambda connection, slot: connection.subscriptions.subscribe(slot),
    "unsubscribe": lambda connection, slot: connection.subscriptions.unsubscribe(slot),
    "publish": requests.publish,
    "presence": requests.presence,
    "history": requests.history,
    "ping": requests.ping,
}
