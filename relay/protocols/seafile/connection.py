"""One client's connection: messages in, subscriptions and `jwt-expired` out. No I/O of its own.

The handshake carries no credential. Each library is opened by a JWT of its own, and the user of the
connection is whom the last valid one names; so the session in the hub begins with the first one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from producers.seaf_events import PREFIX, channel_of
from producers.seaf_tokens import Refused
from relay.errors import Forbidden, RelayError
from relay.hub.recovery import incarnation_of
from relay.model import Channel, EntryID, Position, Principal
from relay.protocols.seafile import codec, missed
from relay.protocols.seafile.encoders import SEAFILE
from relay.transports.websocket import frame_close

if TYPE_CHECKING:
    from producers.seaf_tokens import Claims
    from relay.hub.recovery import Notice
    from relay.hub.session import Session, Subscription
    from relay.model import Event
    from relay.protocols.seafile.service import Service
    from relay.transports.websocket import WebSocketConnection

_log = logging.getLogger(__name__)

GOING_AWAY = 1001
# Libraries of one message that are dealt with in one turn of the loop: each costs an HMAC.
_TURN = 50
_WAITING = 100_000
# A storm of subscribes is over by then, and a relay that is killed after it has noted it.
_NOTE_S = 2.0


class SeafileClient:
    """The table: message in, hub call and reply out."""

    __slots__ = (
        "__weakref__",
        "_address",
        "_agent",
        "_busy",
        "_id",
        "_libraries",
        "_missed",
        "_noting",
        "_places",
        "_planned",
        "_service",
        "_socket",
        "_work",
        "session",
        "watched",
    )

    def __init__(
        self, service: Service, socket: WebSocketConnection, *, agent: str, address: str
    ) -> None:
        """`address` is for the log."""
        self.session: Session | None = None
        # Channel -> when its token runs out: what the client follows, as far as it is concerned.
        self._libraries: dict[Channel, int] = {}
        self.watched: dict[Channel, int] = {}
        self._service = service
        self._socket = socket
        self._agent = agent
        self._address = address
        self._id = service.next_id()
        # Made when it is needed: an empty one takes as much as all the rest here.
        self._work: deque[codec.Subscribe | codec.Unsubscribe] | None = None
        # A task works for this client: what comes meanwhile waits for it.
        self._busy = False
        self._planned = False
        self._noting = False
        # Where the client was in libraries that it does not follow now.
        self._places: dict[Channel, EntryID] = {}
        # What it is sent once the hub agrees to its subscription.
        self._missed: dict[Channel, list[Event]] = {}

    # ---- from the client --------------------------------------------------------------------

    def on_message(self, text: bytes) -> None:
        """One message; what is none ends the connection without a word, as upstream."""
        if self._work is None:
            self._work = deque()
        try:
            self._work += codec.parse(text)
        except codec.BadMessage as exc:
            _log.info("client %s: bad message, hanging up: %s", self._address, exc)
            self.hang_up("bad_message")
            return
        if len(self._work) > _WAITING:
            _log.info("client %s: too many libraries at once, hanging up", self._address)
            self.hang_up("limit_exceeded")
            return
        if not self._planned:
            self._turn()

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
            if isinstance(item, codec.Unsubscribe):
                self._unsubscribe(item.repo_id)
            else:
                self._subscribe(item)
        if not self._planned:
            self._planned = True
            self._service.call_soon(self._turn)

    def _subscribe(self, wanted: codec.Subscribe) -> None:
        try:
            claims = self._service.tokens.read_for(wanted.repo_id, wanted.token, time.time())
            channel = channel_of(wanted.repo_id)
        except (Refused, ValueError) as exc:
            _log.info("client %s: token refused: %s", self._address, exc)
            self._service.refused("unauthorized")
            self._say(codec.jwt_expired(wanted.repo_id))
            return
        session = self.session
        if session is None or session.principal.user != claims.username:
            if self._work is not None:
                self._work.appendleft(wanted)
            self._busy = True
            self._service.spawn(self._begin(claims.username), name="seafile client")
            return
        self._follow(session, channel, claims, wanted.after)

    def _follow(
        self, session: Session, channel: Channel, claims: Claims, after: EntryID | None
    ) -> None:
        renewed = channel in self._libraries
        self._libraries[channel] = claims.expires_at
        self._service.expiries.watch(self, channel, claims.expires_at)
        if renewed and (channel in session.subscriptions or channel in session.reserved):
            return
        seen = after or self._places.pop(channel, None)
        if seen is not None and self._service.settings.missed_s:
            self._busy = True
            self._service.spawn(self._look_back(session, channel, seen), name="seafile client")
        else:
            self._service.context.subscribe(session, channel, None)

    def _unsubscribe(self, repo_id: str) -> None:
        try:
            channel = channel_of(repo_id)
        except ValueError:
            return
        self._leave(channel)

    def _leave(self, channel: Channel) -> None:
        if self._libraries.pop(channel, None) is None or self.session is None:
            return
        self._missed.pop(channel, None)
        subscription = self.session.subscriptions.get(channel)
        if subscription is not None:
            self._places[channel] = subscription.position.id
        if subscription is not None or channel in self.session.reserved:
            self._service.context.hub.unsubscribe(self.session, channel)

    # ---- what takes time --------------------------------------------------------------------

    async def _begin(self, user: str) -> None:
        """A session for this user, with what the connection follows already."""
        old = self.session
        positions: dict[Channel, Position | None] = dict.fromkeys(self._libraries)
        if old is not None:
            positions |= {name: each.position for name, each in old.subscriptions.items()}
            self._places = {}
            old.end()
        self.session = None
        principal = Principal(user=user, door=SEAFILE.door, grant=self._may_read)
        try:
            session = await self._service.context.open(principal, SEAFILE, self)
        except RelayError as exc:
            # It comes back after a minute; there are no words to tell it more.
            _log.info("client %s of %s is refused: %s", self._address, user, exc)
            self.hang_up(getattr(exc, "code", "unavailable"))
            return
        if self._socket.closing:
            session.end()
            return
        self.session = session
        session.attach(self._socket)
        if self._socket.full:
            session.pause()
        for channel, position in positions.items():
            if channel in self._libraries:
                self._service.context.subscribe(session, channel, position)
        if self._remembers and user:
            places = missed.read(await self._service.recall(missed.name(user, self._agent)))
            self._places = {Channel(PREFIX + repo): at for repo, (at, _) in places.items()}
        self._done()

    async def _look_back(self, session: Session, channel: Channel, seen: EntryID) -> None:
        """Reads the newest events of a library that the client was away from, then joins."""
        snapshot = await self._service.newest(channel)
        if not session.closed:
            position = None
            if snapshot is not None and snapshot.state.exists:
                state = snapshot.state
                self._missed[channel] = missed.needed(snapshot.events, seen, session.selectors)
                life = incarnation_of(state.incarnation, snapshot.server.replid)
                position = Position(state.last, state.added, life)
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
        for event in self._missed.pop(subscription.feed.channel, ()):
            subscription.session.reply(self._service.frame(event))
        if self._remembers and not self._noting:
            self._noting = True
            self._service.call_later(_NOTE_S, self._note)

    def refused(self, channel: Channel, error: RelayError) -> None:
        """A right that the site has taken away has no words: `jwt-expired` would bring the client
        back every two seconds."""
        self._libraries.pop(channel, None)
        self._missed.pop(channel, None)
        self._service.refused(getattr(error, "code", "unavailable"))
        _log.info("client %s may not read %s: %s", self._address, channel, error)
        if not isinstance(error, Forbidden):
            self.hang_up("unavailable")

    def dropped(self, channel: Channel, notice: Notice) -> None:
        """Ended by the hub, which looks at rights by itself: perhaps because the token ran out."""
        expires_at = self._libraries.pop(channel, None)
        if expires_at is not None and expires_at <= time.time():
            self._say(codec.jwt_expired(channel.removeprefix(PREFIX)))
        else:
            _log.info("client %s lost %s: %s", self._address, channel, notice.reason)

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

    def disconnect(self, reason: str) -> None:
        """See `relay.hub.session.Client`."""
        self.close(reason)

    # ---- expiry (relay.protocols.seafile.expiries.Holder) -----------------------------------

    def expires_at(self, channel: Channel) -> int | None:
        """See `Holder`."""
        return self._libraries.get(channel)

    def expire(self, channel: Channel) -> None:
        """The client fetches a new token and subscribes again within two seconds."""
        self._leave(channel)
        self._say(codec.jwt_expired(channel.removeprefix(PREFIX)))

    def _may_read(self, channel: Channel) -> bool:
        return self._libraries.get(channel, 0) > time.time()

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
        self._note(at_end=True)
        if self.session is not None:
            self.session.end()

    def close(self, reason: str = "") -> None:
        """With a close frame; what waits goes out before."""
        if self.session is not None:
            self.session.write_out()
        self._socket.close(frame_close(GOING_AWAY, reason))

    def hang_up(self, reason: str) -> None:
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

    def _note(self, *, at_end: bool = False) -> None:
        self._noting = False
        session = self.session
        if session is None or session.closed or not session.principal.user or not self._remembers:
            return
        # What was sent shortly before the end may never have arrived, unless it said goodbye.
        lost_s = 0.0 if self._socket.goodbye else self._service.unheard_s
        latest = EntryID(int((time.time() - lost_s) * 1000), 0)
        places = {name.removeprefix(PREFIX): at for name, at in self._places.items() if at_end}
        for channel, subscription in session.subscriptions.items():
            at = subscription.position.id
            places[channel.removeprefix(PREFIX)] = min(at, latest) if lost_s else at
        if places:
            name = missed.name(session.principal.user, self._agent)
            self._service.remember(name, places, self._id)
