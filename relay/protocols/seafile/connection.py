"""One client's connection: messages in, subscriptions and `jwt-expired` out. No I/O of its own.

The handshake carries no credential. Each library is opened by a JWT of its own, and the user of the
connection is whom the last valid one names; so the session in the hub begins with the first one.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import random
import termios
import time
from array import array
from collections import deque
from typing import TYPE_CHECKING, Any

from relay.core.errors import Forbidden, RelayError
from relay.core.model import Channel, EntryID, Position, Principal
from relay.core.reasons import Reason
from relay.core.slices import in_slices
from relay.protocols.seafile import codec, missed
from relay.protocols.seafile.encoders import SEAFILE
from relay.protocols.seafile.event_format import PREFIX, channel_of
from relay.protocols.seafile.missed import Place, Seen
from relay.protocols.seafile.tokens import InvalidSeafileToken
from relay.transports.socket.websocket import WebSocketConnection, frame_close

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from relay.core.model import Event
    from relay.hub.recovery import Notice
    from relay.hub.session import Session, Subscription
    from relay.protocols.seafile.service import Service
    from relay.protocols.seafile.tokens import SeafileClaims

_log = logging.getLogger(__name__)

GOING_AWAY = 1001
# Libraries of one message that are dealt with in one turn of the loop: each costs an HMAC.
_TURN = 50
_WAITING = 100_000
# Seconds after which the places of a client are stored: first when a storm of subscribes is over,
# then again and again, so that a killed relay repeats little and nothing outlives its time limit.
_NOTE_S = 2.0
_NOTE_AGAIN_S = 30.0
# A sync client pings every second, and hangs up after 5 seconds without a pong. Events that were
# written so long before it was last heard have arrived.
_ARRIVED_S = 6.0


# Two pings of a sync client.
_RECENTLY_S = 2.0


class SeafileSocket(WebSocketConnection):
    """A client's websocket that knows up to when everything has certainly arrived."""

    __slots__ = ("_complete", "_heard_at")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._heard_at = time.monotonic()
        self._complete = False

    @property
    def arrived_at(self) -> float | None:
        """Return the time (`time.monotonic`) before which everything that was sent has arrived,
        None if all of it has."""
        return None if self.close_received or self._complete else self._heard_at - _ARRIVED_S

    def data_received(self, data: bytes) -> None:
        """See `WebSocketConnection`."""
        self._heard_at = time.monotonic()
        super().data_received(data)

    def eof_received(self) -> None:
        """See `WebSocketConnection`. A client that closes its socket without a close frame, but
        recently sent something and has acknowledged all bytes, has received everything."""
        recently = time.monotonic() - self._heard_at < _RECENTLY_S
        self._complete = recently and not self.waiting_bytes() and not self._unacknowledged()
        super().eof_received()

    def _unacknowledged(self) -> bool:
        transport = self._transport
        connection = None if transport is None else transport.get_extra_info("socket")
        if connection is None:
            return True
        count = array("i", [0])
        try:
            fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, count)
        except OSError:
            return True
        return bool(count[0])


class _Library:
    """A library that the client follows: when its token runs out, the token's digest, and the
    event up to which the client has certainly received everything."""

    __slots__ = ("expires_at", "floor", "token")

    def __init__(self) -> None:
        self.expires_at = 0
        self.token = 0
        self.floor: EntryID | None = None


class SeafileClient:
    """The table: message in, hub call and reply out."""

    __slots__ = (
        "__weakref__",
        "_address",
        "_agent",
        "_busy",
        "_id",
        "_left",
        "_libraries",
        "_memory",
        "_missed",
        "_note_task",
        "_note_timer",
        "_noted",
        "_noted_at",
        "_planned",
        "_refused",
        "_service",
        "_settled",
        "_socket",
        "_unread",
        "_work",
        "session",
        "watched",
    )

    def __init__(
        self, service: Service, socket: SeafileSocket, *, agent: str, address: str
    ) -> None:
        """`address` is for the log."""
        self.session: Session | None = None
        # What the client follows, as far as it is concerned.
        self._libraries: dict[Channel, _Library] = {}
        # Libraries that its tokens open and the site's rights do not.
        self._refused: set[Channel] = set()
        self.watched: dict[Channel, int] = {}
        self._service = service
        self._socket = socket
        self._agent = agent
        self._address = address
        self._id = service.next_id()
        # Made when it is needed: an empty one takes as much as all the rest here.
        self._work: deque[codec.LibrarySubscribe | codec.LibraryUnsubscribe] | None = None
        # Messages that wait for a long one, which is being read.
        self._unread: deque[bytes] | None = None
        # A task works for this client: what comes meanwhile waits for it.
        self._busy = False
        self._planned = False
        # Where this connection left libraries that it followed, and what is stored of earlier ones.
        self._left: dict[Channel, Place] = {}
        self._memory: missed.Stored = {}
        self._note_timer: asyncio.TimerHandle | None = None
        self._note_task: asyncio.Task[None] | None = None
        # The places that were stored last: a hash of them, when, and whether they were the same as
        # the time before.
        self._noted = 0
        self._noted_at = 0.0
        self._settled = False
        # What it is sent once the hub agrees to its subscription.
        self._missed: dict[Channel, list[Event]] = {}

    # ---- from the client --------------------------------------------------------------------

    def on_message(self, text: bytes) -> None:
        """Handle one message. Hang up without a word if it is malformed, as Seafile's server does.

        A long message is read in slices of time, and those behind it wait for it.
        """
        if self._unread is not None:
            self._unread.append(text)
        elif len(text) > codec.SMALL_BYTES:
            self._unread = deque([text])
            self._socket.pause_reading()
            _ = self._service.spawn(self._read(self._unread), name="seafile message")
        else:
            self._parse(text)

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
        self._unread = None
        self._socket.resume_reading()

    def _parse(self, text: bytes) -> None:
        if self._work is None:
            self._work = deque()
        try:
            self._work += codec.parse(text)
        except codec.BadMessage as exc:
            self._bad(exc)
            return
        if len(self._work) > _WAITING:
            _log.info("client %s: too many libraries at once, hanging up", self._address)
            self.hang_up(Reason.LIMIT_EXCEEDED)
            return
        if not self._planned:
            self._turn()

    def _bad(self, exc: codec.BadMessage) -> None:
        _log.info("client %s: bad message, hanging up: %s", self._address, exc)
        self.hang_up(Reason.BAD_MESSAGE)

    def _turn(self) -> None:
        """Some of what waits; the rest in later turns, so that nobody else has to wait for it."""
        self._planned = False
        for _ in range(_TURN):
            if not self._work:
                self._work = None
                return
            if self._busy or self._socket.closing:
                return
            # Who does not read the answers is asked nothing either; `drained` goes on.
            if self._socket.full:
                return
            item = self._work.popleft()
            if isinstance(item, codec.LibraryUnsubscribe):
                self._unsubscribe(item.repo_id)
            else:
                self._subscribe(item)
        if not self._planned:
            self._planned = True
            self._service.call_soon(self._turn)

    def _subscribe(self, wanted: codec.LibrarySubscribe) -> None:
        try:
            claims = self._service.tokens.read_for(wanted.repo_id, wanted.token, time.time())
            channel = channel_of(wanted.repo_id)
        except (InvalidSeafileToken, ValueError) as exc:
            _log.info("client %s: token refused: %s", self._address, exc)
            self._service.refused(Reason.UNAUTHORIZED)
            self._say(codec.jwt_expired(wanted.repo_id))
            return
        session = self.session
        if session is None or session.principal.user != claims.username:
            if self._work is not None:
                self._work.appendleft(wanted)
            self._busy = True
            _ = self._service.spawn(self._begin(claims.username), name="seafile client")
            return
        self._follow(session, channel, claims, wanted)

    def _follow(
        self,
        session: Session,
        channel: Channel,
        claims: SeafileClaims,
        wanted: codec.LibrarySubscribe,
    ) -> None:
        library = self._libraries.setdefault(channel, _Library())
        self._refused.discard(channel)
        library.expires_at = claims.expires_at
        library.token = missed.digest(wanted.token)
        self._service.expiries.watch(self, channel, claims.expires_at)
        if channel in session.subscriptions or channel in session.reserved:
            return
        library.floor = seen = wanted.after or self._seen(channel, library.token)
        if seen is not None and self._service.settings.missed_s:
            self._busy = True
            _ = self._service.spawn(self._look_back(session, channel, seen), name="seafile client")
        else:
            self._service.context.subscribe(session, channel, None)

    def _seen(self, channel: Channel, token: int) -> EntryID | None:
        left = self._left.pop(channel, None)
        if left is not None:
            return left.at
        repo_id = channel.removeprefix(PREFIX)
        places = missed.places_of(self._memory, repo_id)
        self._memory.pop(repo_id, None)
        return missed.resumed(places, token)

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
        if subscription is not None:
            at = subscription.position.id
            self._left[channel] = Place(at, self._id, library.token, ended=False)
        if subscription is not None or channel in self.session.reserved:
            self._service.context.hub.unsubscribe(self.session, channel)

    # ---- what takes time --------------------------------------------------------------------

    async def _begin(self, user: str) -> None:
        """A session for this user, with what the connection follows already."""
        old = self.session
        positions: dict[Channel, Position | None] = dict.fromkeys(self._libraries)
        if old is not None:
            positions |= {name: each.position for name, each in old.subscriptions.items()}
            self._left = {}
            old.end()
        self.session = None
        principal = Principal(user=user, door=SEAFILE.door, grant=self._may_read)
        try:
            session = await self._service.context.open(principal, SEAFILE, self)
        except RelayError as exc:
            # It comes back after a minute; there are no words to tell it more.
            _log.info("client %s of %s is refused: %s", self._address, user, exc)
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
                self._service.context.subscribe(session, channel, position)
        if self._remembers and user:
            self._memory = await self._service.recall(missed.name(user, self._agent))
        self._done()

    async def _look_back(self, session: Session, channel: Channel, seen: EntryID) -> None:
        """Reads the newest events of a library that the client was away from, then joins."""
        snapshot = await self._service.newest(channel)
        if not session.closed:
            position = None
            if snapshot is not None and snapshot.state.exists:
                state = snapshot.state
                self._missed[channel] = missed.needed(snapshot.events, seen, session.selectors)
                position = Position(state.last, state.added, state.incarnation)
            self._service.context.subscribe(session, channel, position)
        self._done()

    def _done(self) -> None:
        """The task is over; what came meanwhile is next."""
        self._busy = False
        if not self._planned:
            self._turn()

    # ---- from the hub (relay.hub.session.Client) --------------------------------------------

    def subscribed(self, subscription: Subscription) -> None:
        """The protocol says nothing then; what the client missed comes before all that follows."""
        channel = subscription.feed.channel
        for event in self._missed.pop(channel, ()):
            subscription.session.reply(self._service.frame(event))
        library = self._libraries.get(channel)
        if library is not None and library.floor is None:
            library.floor = subscription.position.id
        if self._remembers and self._note_timer is None:
            self._note_timer = self._service.call_later(_NOTE_S, self._note_again)

    def refused(self, channel: Channel, error: RelayError) -> None:
        """A right that the site has taken away has no words: `jwt-expired` would bring the client
        back every two seconds."""
        self._libraries.pop(channel, None)
        self._missed.pop(channel, None)
        self._service.refused(getattr(error, "code", Reason.UNAVAILABLE))
        _log.info("client %s may not read %s: %s", self._address, channel, error)
        if isinstance(error, Forbidden):
            self._refused.add(channel)
        else:
            self.hang_up(Reason.UNAVAILABLE)

    def dropped(self, channel: Channel, notice: Notice) -> None:
        """Ended by the hub, which looks at rights by itself: perhaps because the token ran out."""
        library = self._libraries.pop(channel, None)
        if library is not None and library.expires_at <= time.time():
            self._say(codec.jwt_expired(channel.removeprefix(PREFIX)))
        else:
            if library is not None:
                self._refused.add(channel)
            _log.info("client %s lost %s: %s", self._address, channel, notice.reason)

    def rights_changed(self, channel: Channel | None, user: str | None) -> None:
        """Invite the client to subscribe again to libraries that it was refused, once for each
        change of rights; None stands for every channel, or every user."""
        session = self.session
        if session is None or user not in (None, session.principal.user):
            return
        for refused in self._refused & {channel} if channel else set(self._refused):
            self._refused.discard(refused)
            self._say(codec.jwt_expired(refused.removeprefix(PREFIX)))

    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        """Events may be missing. A sync client fetches everything when it has reconnected, so that
        to be disconnected is the protocol's own word for it."""
        if notice.kind in ("gap", "reset") and not self._socket.closing:
            _log.warning(
                "client %s may have missed events of %s (%s): disconnected, so that it asks anew",
                self._address,
                subscription.feed.channel,
                notice.reason,
            )
            self.close()

    def expired(self) -> None:
        """Never called: sessions of this door have no end, only their libraries."""

    def disconnect(self, reason: Reason) -> None:
        """See `relay.hub.session.Client`."""
        self.close(reason)

    # ---- expiry (relay.protocols.seafile.expiries.Holder) -----------------------------------

    def expires_at(self, channel: Channel) -> int | None:
        """See `Holder`."""
        library = self._libraries.get(channel)
        return None if library is None else library.expires_at

    def expire(self, channel: Channel) -> None:
        """The client fetches a new token and subscribes again within two seconds."""
        self._leave(channel)
        self._say(codec.jwt_expired(channel.removeprefix(PREFIX)))

    def _may_read(self, channel: Channel) -> bool:
        library = self._libraries.get(channel)
        return library is not None and library.expires_at > time.time()

    # ---- the socket -------------------------------------------------------------------------

    def full(self) -> None:
        """The socket takes no more for now."""
        if self.session is not None:
            self.session.pause()

    def drained(self) -> None:
        """It does again."""
        if self.session is not None:
            self.session.resume()
        if self._work and not self._planned:
            self._turn()

    def gone(self) -> None:
        """The socket is closed, whoever wanted it."""
        self._work = None
        if self._note_timer is not None:
            self._note_timer.cancel()
        self._note_end()
        if self.session is not None:
            self.session.end()

    def close(self, reason: str = "") -> None:
        """With a close frame; what waits goes out before."""
        if self.session is not None:
            self.session.write_out()
        self._socket.close(frame_close(GOING_AWAY, reason))

    def hang_up(self, reason: Reason) -> None:
        """Without a word, as upstream."""
        self._service.refused(reason)
        if self.session is not None:
            self.session.write_out()
        self._socket.close()

    def _say(self, frame: bytes) -> None:
        if self.session is not None:
            self.session.reply(frame)
        else:
            self._socket.write(frame)

    # ---- where it was -----------------------------------------------------------------------

    @property
    def _remembers(self) -> bool:
        return bool(self._service.settings.missed_s) and not missed.is_browser(self._agent)

    def _note_again(self) -> None:
        self._note_timer = None
        if self._can_note():
            self._note_task = self._service.spawn(self._note(), name="seafile places")
            delay_s = _NOTE_AGAIN_S * random.uniform(0.75, 1.25)  # noqa: S311  # no secret
            self._note_timer = self._service.call_later(delay_s, self._note_again)

    def _can_note(self) -> bool:
        session = self.session
        return (
            session is not None
            and not session.closed
            and bool(session.principal.user)
            and self._remembers
        )

    async def _note(self) -> None:
        # Before the places, so that nothing later counts as certain.
        session, arrived_at = self.session, self._socket.arrived_at
        if session is None:
            return
        name = missed.name(session.principal.user, self._agent)
        seen = {
            repo_id: each
            async for repo_id, each in in_slices(self._seen_at(self._places(session), at_end=False))
        }
        if seen and not session.closed and self._must_note(seen):
            await self._service.remember(name, seen, arrived_at)

    def _note_end(self) -> None:
        if self.session is not None and self._can_note():
            name = missed.name(self.session.principal.user, self._agent)
            # Where each subscription is now: events that come from now on were not sent.
            subscriptions = self.session.subscriptions.items()
            places = [(channel, subscription.at) for channel, subscription in subscriptions]
            if places or self._left:
                work = self._note_last(name, places, self._socket.arrived_at)
                _ = self._service.spawn(work, name="seafile places")

    async def _note_last(
        self,
        name: str,
        places: Sequence[tuple[Channel, EntryID]],
        arrived_at: float | None,
    ) -> None:
        earlier = self._note_task
        if earlier is not None and not earlier.done():
            await asyncio.wait((earlier,))
        seen = {
            repo_id: each async for repo_id, each in in_slices(self._seen_at(places, at_end=True))
        }
        await self._service.remember(name, seen, arrived_at)

    def _places(self, session: Session) -> Iterator[tuple[Channel, EntryID]]:
        for channel, subscription in list(session.subscriptions.items()):
            yield channel, subscription.at

    def _seen_at(
        self, places: Iterable[tuple[Channel, EntryID]], *, at_end: bool
    ) -> Iterator[tuple[str, Seen]]:
        for channel, place in list(self._left.items()):
            yield channel.removeprefix(PREFIX), Seen(place._replace(ended=at_end), place.at)
        for channel, at in places:
            library = self._libraries.get(channel)
            if library is not None:
                place = Place(at, self._id, library.token, at_end)
                yield channel.removeprefix(PREFIX), Seen(place, library.floor or at)

    def _must_note(self, seen: Mapping[str, Seen]) -> bool:
        """Return False if these places are stored already and do not expire soon. The latest events
        had perhaps not arrived when places were stored first, so they are stored twice."""
        now, state = time.monotonic(), hash(tuple(each.place.at for each in seen.values()))
        same = state == self._noted
        if same and self._settled and now < self._noted_at + self._service.settings.missed_s / 2:
            return False
        self._noted, self._noted_at, self._settled = state, now, same
        return True
