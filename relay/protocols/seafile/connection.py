"""One client's connection: handles messages, and sends events and `jwt-expired`.

The handshake contains no credentials. A client subscribes to each library with a separate JWT, and
the user of the connection is that of the last valid JWT. The hub's session is therefore opened with
the first valid JWT.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from relay.core.errors import Forbidden, RelayError
from relay.core.model import Channel, EntryID, Position, Principal
from relay.core.reasons import Reason
from relay.core.slices import in_slices
from relay.doorkit.first_subscriptions import defer_if_away
from relay.hub.session import Client, SubscriptionMode
from relay.protocols.seafile import codec, missed
from relay.protocols.seafile.encoders import SEAFILE
from relay.protocols.seafile.event_format import PREFIX, channel_of
from relay.protocols.seafile.expiries import TokenHolder
from relay.protocols.seafile.missed import ClientPosition, UncertainPosition
from relay.protocols.seafile.tokens import InvalidSeafileToken
from relay.transports.socket.progress import unacknowledged_bytes
from relay.transports.socket.websocket import WebSocketConnection, frame_close

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from relay.core.model import Event
    from relay.hub.recovery import Notice
    from relay.hub.session import Session, Subscription
    from relay.protocols.seafile.service import SeafileService
    from relay.protocols.seafile.tokens import SeafileClaims

_log = logging.getLogger(__name__)

GOING_AWAY = 1001
# Libraries that are processed in one turn of the loop. Each requires an HMAC.
_PER_TURN = 50
_MAX_QUEUED = 100_000
# Number of messages that a client without a valid token may send at once, and then per second. A
# sync client sends one for each of its libraries, and its tokens may all have expired.
_UNKNOWN_BURST, _UNKNOWN_PER_S = 10_000, 1_000
# A client's positions are stored after the first time, when its many subscribe messages have been
# processed, and then periodically. If relay is killed, few events are repeated.
_FIRST_SAVE_S = 2.0
_SAVE_S = 30.0
# A sync client pings every second, and disconnects after 5 seconds without a pong. Events that were
# written this long before its last message have therefore arrived.
ARRIVED_S = 6.0
# Two pings of a sync client.
_RECENTLY_S = 2.0


class SeafileSocket(WebSocketConnection):
    """A client's websocket that records until when all events have certainly arrived."""

    __slots__ = ("_complete", "_received_at")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._received_at = time.monotonic()
        self._complete = False

    @property
    def arrived_at(self) -> float | None:
        """Return the time (`time.monotonic`) until which all sent events have arrived.

        None means that all events have arrived.
        """
        return None if self.close_received or self._complete else self._received_at - ARRIVED_S

    @override
    def data_received(self, data: bytes) -> None:
        self._received_at = time.monotonic()
        super().data_received(data)

    @override
    def eof_received(self) -> None:
        # The client may close its socket without a close frame. If it sent data recently and has
        # acknowledged all bytes, it has received everything.
        recently = time.monotonic() - self._received_at < _RECENTLY_S
        self._complete = recently and not unacknowledged_bytes(self._transport)
        super().eof_received()


class _Library:
    """A library that the client is subscribed to.

    `expires_at` and `token` are the expiry time and digest of its token. The client has certainly
    received all events up to `floor`.
    """

    __slots__ = ("expires_at", "floor", "token")

    def __init__(self) -> None:
        self.expires_at = 0
        self.token = 0
        self.floor: EntryID | None = None


class SeafileClient(Client, TokenHolder):
    """State of one connection."""

    __slots__ = (
        "__weakref__",
        "_address",
        "_agent",
        "_busy",
        "_id",
        "_left",
        "_libraries",
        "_missed",
        "_pace_timer",
        "_refused",
        "_save_task",
        "_save_timer",
        "_saved",
        "_saved_at",
        "_scheduled",
        "_service",
        "_socket",
        "_stored",
        "_unchanged",
        "_unknown_left",
        "_unparsed",
        "_work",
        "session",
        "watched",
    )

    def __init__(
        self, service: SeafileService, socket: SeafileSocket, *, agent: str, address: str
    ) -> None:
        """Create the client of a new connection. `address` is used in the log."""
        self.session: Session | None = None
        # The client's subscriptions, including those that the hub has not confirmed yet.
        self._libraries: dict[Channel, _Library] = {}
        # Libraries that the client has a token for, but that rights stored in relay deny.
        self._refused: set[Channel] = set()
        self.watched: dict[Channel, int] = {}
        self._service = service
        self._socket = socket
        self._agent = agent
        self._address = address
        self._id = service.next_id()
        # Requests to process. Created on demand: an empty deque takes as much memory as the rest of
        # this object.
        self._work: deque[codec.LibrarySubscribe | codec.LibraryUnsubscribe] | None = None
        # A long message that is being parsed, and the messages after it.
        self._unparsed: deque[bytes] | None = None
        # Number of messages that are read before a valid token has arrived, and the end of a pause.
        self._unknown_left = _UNKNOWN_BURST
        self._pace_timer: asyncio.TimerHandle | None = None
        # True while a task runs for this client. New requests wait for it.
        self._busy = False
        self._scheduled = False
        # Positions of libraries that this connection has unsubscribed from, and stored positions of
        # earlier connections.
        self._left: dict[Channel, ClientPosition] = {}
        self._stored: missed.Stored = {}
        self._save_timer: asyncio.TimerHandle | None = None
        self._save_task: asyncio.Task[None] | None = None
        # The positions that were saved last: their hash, the time, and whether they were the same
        # as the time before.
        self._saved = 0
        self._saved_at = 0.0
        self._unchanged = False
        # Missed events, which are sent when the hub has confirmed the subscription.
        self._missed: dict[Channel, list[Event]] = {}

    # ---- from the client --------------------------------------------------------------------

    def on_message(self, text: bytes) -> None:
        """Handle one message.

        If it is malformed, close the connection without a close frame, as Seafile's server does. A
        long message is parsed in slices of time. Later messages wait for it.
        """
        if self.session is None:
            self._pace()
        if self._unparsed is not None:
            self._unparsed.append(text)
        elif len(text) > codec.SMALL_BYTES:
            self._unparsed = deque([text])
            self._socket.pause_reading()
            _ = self._service.context.spawn(self._read(self._unparsed), name="seafile message")
        else:
            self._parse(text)

    def _pace(self) -> None:
        """Stop reading for a second if a client without a valid token sends many messages."""
        self._unknown_left -= 1
        if self._unknown_left <= 0 and self._pace_timer is None:
            self._unknown_left = _UNKNOWN_PER_S
            self._socket.pause_reading()
            self._pace_timer = asyncio.get_running_loop().call_later(1.0, self._end_pause)

    def _end_pause(self) -> None:
        self._pace_timer = None
        if self._unparsed is None:
            self._socket.resume_reading()

    async def _read(self, texts: deque[bytes]) -> None:
        while texts and not self._socket.closing:
            text = texts.popleft()
            if len(text) <= codec.SMALL_BYTES:
                self._parse(text)
                continue
            try:
                async for part in codec.parts(text):
                    self._parse(part)
                    if self._socket.closing:
                        break
            except codec.BadMessage as exc:
                self._bad(exc)
        self._unparsed = None
        if self._pace_timer is None:
            self._socket.resume_reading()

    def _parse(self, text: bytes) -> None:
        if self._work is None:
            self._work = deque()
        try:
            self._work += codec.parse(text)
        except codec.BadMessage as exc:
            self._bad(exc)
            return
        if len(self._work) > _MAX_QUEUED:
            _log.info(
                "Closed the connection of Seafile client %s: more than %d subscriptions are queued",
                self._address,
                _MAX_QUEUED,
            )
            self.hang_up(Reason.LIMIT_EXCEEDED)
            return
        if not self._scheduled:
            self._process()

    def _bad(self, exc: codec.BadMessage) -> None:
        _log.info(
            "Closed the connection of Seafile client %s: malformed message: %s", self._address, exc
        )
        self.hang_up(Reason.BAD_MESSAGE)

    def _process(self) -> None:
        """Process some of the requests, and the rest in later turns of the loop."""
        self._scheduled = False
        for _ in range(_PER_TURN):
            if not self._work:
                self._work = None
                return
            if self._busy or self._socket.closing:
                return
            # Don't send replies to a client that is not reading. `drained` continues.
            if self._socket.full:
                return
            item = self._work.popleft()
            if isinstance(item, codec.LibraryUnsubscribe):
                self._unsubscribe(item.repo_id)
            else:
                self._subscribe(item)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._process)

    def _subscribe(self, request: codec.LibrarySubscribe) -> None:
        try:
            claims = self._service.tokens.read_for(request.repo_id, request.token, time.time())
            channel = channel_of(request.repo_id)
        except (InvalidSeafileToken, ValueError) as exc:
            _log.info("Rejected a token of Seafile client %s: %s", self._address, exc)
            self._service.count_rejection(Reason.UNAUTHORIZED)
            self._service.context.turned_away(
                self._socket.info, SEAFILE.door, Reason.UNAUTHORIZED, str(exc)
            )
            self._send(codec.jwt_expired(request.repo_id))
            return
        session = self.session
        if session is None or session.principal.user != claims.username:
            if self._work is not None:
                self._work.appendleft(request)
            self._busy = True
            _ = self._service.context.spawn(
                self._open_session(claims.username), name="seafile client"
            )
            return
        self._follow(session, channel, claims, request)

    def _follow(
        self,
        session: Session,
        channel: Channel,
        claims: SeafileClaims,
        request: codec.LibrarySubscribe,
    ) -> None:
        library = self._libraries.setdefault(channel, _Library())
        self._refused.discard(channel)
        library.expires_at = claims.expires_at
        library.token = missed.digest(request.token)
        self._service.expiries.watch(self, channel, claims.expires_at)
        if channel in session.subscriptions or channel in session.reserved:
            return
        library.floor = seen = request.after or self._seen(channel, library.token)
        if seen is not None and self._service.settings.missed_s:
            self._busy = True
            _ = self._service.context.spawn(
                self._subscribe_after(session, channel, seen), name="seafile client"
            )
        else:
            self._join(session, channel, None)

    def _join(self, session: Session, channel: Channel, position: Position | None) -> None:
        context = self._service.context
        context.subscribe(session, channel, position)
        defer_if_away(context.not_reading, context.clock, session, channel)

    def _seen(self, channel: Channel, token: int) -> EntryID | None:
        left = self._left.get(channel)
        if left is not None and left.ended:
            # The right to the library was taken away, so delivery begins anew.
            return None
        if left is not None:
            del self._left[channel]
            return left.at
        repo_id = channel.removeprefix(PREFIX)
        positions = missed.positions_of(self._stored, repo_id)
        self._stored.pop(repo_id, None)
        return missed.resumed(positions, token)

    def _unsubscribe(self, repo_id: str) -> None:
        try:
            channel = channel_of(repo_id)
        except ValueError:
            return
        self._leave(channel)

    def _leave(self, channel: Channel) -> None:
        self._refused.discard(channel)
        library = self._libraries.pop(channel, None)
        if library is None or self.session is None:
            return
        self._missed.pop(channel, None)
        subscription = self.session.subscriptions.get(channel)
        if subscription is not None and subscription.has_position:
            at = subscription.position.id
            self._left[channel] = ClientPosition(at, self._id, library.token, ended=False)
        if subscription is not None or channel in self.session.reserved:
            self._service.context.hub.unsubscribe(self.session, channel)

    # ---- tasks ------------------------------------------------------------------------------

    async def _open_session(self, user: str) -> None:
        """Open a session for this user, and subscribe it to the connection's libraries."""
        old = self.session
        positions: dict[Channel, Position | None] = dict.fromkeys(self._libraries)
        if old is not None:
            positions |= {
                name: each.position for name, each in old.subscriptions.items() if each.has_position
            }
            self._left = {}
            old.end()
        self.session = None
        principal = Principal(user=user, door=SEAFILE.door, grant=self._may_read)
        try:
            session = await self._service.context.open(
                principal, SEAFILE, self, info=self._socket.info
            )
        except RelayError as exc:
            # The protocol has no error message. The client reconnects after a minute.
            _log.info("Rejected Seafile client %s of user %s: %s", self._address, user, exc)
            self.hang_up(getattr(exc, "code", Reason.UNAVAILABLE))
            return
        if self._socket.closing:
            session.end()
            return
        self.session = session
        session.attach(self._socket)
        if self._socket.full:
            session.pause()
        async for channel, position in in_slices(positions.items()):
            if session.closed:
                return
            if channel in self._libraries and channel not in session.subscriptions:
                self._join(session, channel, position)
        if self._stores_positions and user:
            self._stored = await self._service.stored_positions(missed.name(user, self._agent))
        self._continue()

    async def _subscribe_after(self, session: Session, channel: Channel, seen: EntryID) -> None:
        """Find the events that the client has missed after `seen`, then subscribe."""
        snapshot = await self._service.newest(channel)
        if not session.closed:
            position = None
            if snapshot is None:
                # The hub delivers all events after `seen` as soon as the server can be read.
                position = Position(seen)
            elif snapshot.state.exists:
                state = snapshot.state
                self._missed[channel] = missed.needed(snapshot.events, seen, session.selectors)
                position = Position(state.last, state.added, state.incarnation)
            self._join(session, channel, position)
        self._continue()

    def _continue(self) -> None:
        """Process the requests that were received while a task was running."""
        self._busy = False
        if not self._scheduled:
            self._process()

    # ---- callbacks of the hub ---------------------------------------------------------------

    @override
    def subscribed(self, subscription: Subscription) -> None:
        # The protocol has no confirmation. Missed events are sent before all later ones.
        channel = subscription.feed.channel
        for event in self._missed.pop(channel, ()):
            subscription.session.reply(self._service.frame(event))
        library = self._libraries.get(channel)
        if library is not None and library.floor is None:
            library.floor = subscription.position.id
        if self._stores_positions and self._save_timer is None:
            self._save_timer = asyncio.get_running_loop().call_later(
                _FIRST_SAVE_S, self._save_again
            )

    @override
    def refused(self, channel: Channel, error: RelayError) -> None:
        # The protocol has no message for a lost right. After `jwt-expired` the client would
        # subscribe again every two seconds.
        self._libraries.pop(channel, None)
        self._missed.pop(channel, None)
        self._service.count_rejection(getattr(error, "code", Reason.UNAVAILABLE))
        _log.info(
            "Rejected the subscription of Seafile client %s to %s: %s",
            self._address,
            channel,
            error,
        )
        if isinstance(error, Forbidden):
            self._refused.add(channel)
        else:
            self.hang_up(Reason.UNAVAILABLE)

    @override
    def dropped(self, channel: Channel, notice: Notice) -> None:
        # The hub has checked the rights. The token may have expired.
        library = self._libraries.pop(channel, None)
        expired = library is not None and library.expires_at <= time.time()
        if library is not None and notice.from_id is not None:
            # Stored at the end of the connection, so that nothing that was delivered comes again.
            self._left[channel] = ClientPosition(
                notice.from_id, self._id, library.token, ended=not expired
            )
        if expired:
            self._send(codec.jwt_expired(channel.removeprefix(PREFIX)))
        else:
            if library is not None:
                self._refused.add(channel)
            _log.info(
                "Ended the subscription of Seafile client %s to %s: %s",
                self._address,
                channel,
                notice.reason,
            )

    def rights_changed(self, channel: Channel | None, user: str | None) -> None:
        """Make the client subscribe again to libraries that it was denied.

        Called after each change of rights. None means every channel, or every user.
        """
        session = self.session
        if session is None or user not in (None, session.principal.user):
            return
        for refused in self._refused & {channel} if channel else set(self._refused):
            self._refused.discard(refused)
            self._send(codec.jwt_expired(refused.removeprefix(PREFIX)))

    @override
    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        # The protocol has no message for missed events. A sync client fetches everything after it
        # has reconnected, so that it is disconnected instead.
        if notice.kind in ("gap", "reset") and not self._socket.closing:
            _log.warning(
                "Disconnected Seafile client %s: it may have missed events of %s (%s), and fetches"
                " everything when it reconnects",
                self._address,
                subscription.feed.channel,
                notice.reason,
            )
            self.close()

    @override
    def expired(self) -> None:
        # The hub does not call this: only the tokens of libraries expire.
        pass

    @override
    def disconnect(self, reason: Reason) -> None:
        self.close(reason)

    # ---- callbacks of `Expiries` ------------------------------------------------------------

    @override
    def expires_at(self, channel: Channel) -> int | None:
        library = self._libraries.get(channel)
        return None if library is None else library.expires_at

    @override
    def expire(self, channel: Channel) -> None:
        # The client fetches a new token, and subscribes again within two seconds.
        self._leave(channel)
        self._send(codec.jwt_expired(channel.removeprefix(PREFIX)))

    def _may_read(self, channel: Channel) -> bool:
        library = self._libraries.get(channel)
        return library is not None and library.expires_at > time.time()

    # ---- the socket -------------------------------------------------------------------------

    def full(self) -> None:
        """Stop delivery, because the socket's buffer is full."""
        if self.session is not None:
            self.session.pause()

    def drained(self) -> None:
        """Continue delivery and the processing of requests, because the socket has room again."""
        if self.session is not None:
            self.session.resume()
        if self._work and not self._scheduled:
            self._process()

    def closed(self) -> None:
        """Save the client's positions and end the session, because the socket is closed."""
        self._work = None
        if self._save_timer is not None:
            self._save_timer.cancel()
        if self._pace_timer is not None:
            self._pace_timer.cancel()
        self._save_last()
        if self.session is not None:
            self.session.end()

    def close(self, reason: Reason | None = None) -> None:
        """Send pending events, then close with a close frame."""
        if self.session is not None:
            self.session.write_out()
        self._socket.close(frame_close(GOING_AWAY, reason or ""))

    def hang_up(self, reason: Reason) -> None:
        """Send pending events, then close without a close frame, as Seafile's server does."""
        self._service.count_rejection(reason)
        if self.session is not None:
            self.session.write_out()
            self.session.ending = self.session.ending or reason
        self._socket.close()

    def _send(self, frame: bytes) -> None:
        if self.session is not None:
            self.session.reply(frame)
        else:
            self._socket.write(frame)

    # ---- positions --------------------------------------------------------------------------

    @property
    def _stores_positions(self) -> bool:
        return bool(self._service.settings.missed_s) and not missed.is_browser(self._agent)

    def _save_again(self) -> None:
        self._save_timer = None
        if self._can_save():
            self._save_task = self._service.context.spawn(self._save(), name="seafile positions")
            delay_s = _SAVE_S * random.uniform(0.75, 1.25)  # noqa: S311  # no secret
            self._save_timer = asyncio.get_running_loop().call_later(delay_s, self._save_again)

    def _can_save(self) -> bool:
        session = self.session
        return (
            session is not None
            and not session.closed
            and bool(session.principal.user)
            and self._stores_positions
        )

    async def _save(self) -> None:
        # Read `arrived_at` before the positions, so that later events do not count as arrived.
        session, arrived_at = self.session, self._socket.arrived_at
        if session is None:
            return
        name = missed.name(session.principal.user, self._agent)
        seen = {
            repo_id: each
            async for repo_id, each in in_slices(
                self._with_floors(self._positions(session), at_end=False)
            )
        }
        if seen and not session.closed and self._must_save(seen):
            await self._service.store_positions(name, seen, arrived_at)

    def _save_last(self) -> None:
        if self.session is not None and self._can_save():
            name = missed.name(self.session.principal.user, self._agent)
            # Copy the positions now: later events are not sent any more.
            subscriptions = self.session.subscriptions.items()
            # A subscription that the hub has not confirmed yet has no position.
            positions = [
                (channel, subscription.at)
                for channel, subscription in subscriptions
                if subscription.mode is not SubscriptionMode.NEW
            ]
            if positions or self._left:
                work = self._save_at_end(name, positions, self._socket.arrived_at)
                _ = self._service.context.spawn(work, name="seafile positions")

    async def _save_at_end(
        self,
        name: str,
        positions: Sequence[tuple[Channel, EntryID]],
        arrived_at: float | None,
    ) -> None:
        earlier = self._save_task
        if earlier is not None and not earlier.done():
            await asyncio.wait((earlier,))
        seen = {
            repo_id: each
            async for repo_id, each in in_slices(self._with_floors(positions, at_end=True))
        }
        await self._service.store_positions(name, seen, arrived_at)

    def _positions(self, session: Session) -> Iterator[tuple[Channel, EntryID]]:
        for channel, subscription in list(session.subscriptions.items()):
            if subscription.mode is not SubscriptionMode.NEW:
                yield channel, subscription.at

    def _with_floors(
        self, positions: Iterable[tuple[Channel, EntryID]], *, at_end: bool
    ) -> Iterator[tuple[str, UncertainPosition]]:
        for channel, left in list(self._left.items()):
            position = left._replace(ended=at_end)
            yield channel.removeprefix(PREFIX), UncertainPosition(position, left.at)
        for channel, at in positions:
            library = self._libraries.get(channel)
            if library is not None:
                position = ClientPosition(at, self._id, library.token, at_end)
                floor = library.floor or at
                yield channel.removeprefix(PREFIX), UncertainPosition(position, floor)

    def _must_save(self, seen: Mapping[str, UncertainPosition]) -> bool:
        """Return False if these positions are stored and do not expire soon.

        They are stored twice, because the latest events may not have arrived at the first time.
        """
        now, state = time.monotonic(), hash(tuple(each.position.at for each in seen.values()))
        same = state == self._saved
        if same and self._unchanged and now < self._saved_at + self._service.settings.missed_s / 2:
            return False
        self._saved, self._saved_at, self._unchanged = state, now, same
        return True
