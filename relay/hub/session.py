"""One client: who it is, what it follows, and the way its bytes take.

Whatever is offered to a session within one turn of the loop leaves in one write. A session whose
socket is full, or which has no socket yet, is *paused*: it gets no events; its subscriptions go
behind and are served from the stream once it is drained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from relay.core.errors import RelayError
from relay.core.model import Channel, EntryID, Position, Principal
from relay.core.reasons import Reason
from relay.hub.recovery import Notice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay.hub.encoding import Encoder
    from relay.hub.feed import Feed
    from relay.hub.hub import Hub


class Outbox(Protocol):
    """The socket as the hub sees it."""

    full: bool

    def write(self, data: bytes) -> None:
        """Hand over bytes; never blocks, swallowed if the client is gone."""

    def close(self, last: bytes = b"") -> None:
        """Write `last`, then close once everything is out."""


class Client(Protocol):
    """The door's side of a session: what the hub tells it besides events and notices."""

    def subscribed(self, subscription: Subscription) -> None:
        """The subscription stands; events follow its position."""

    def refused(self, channel: Channel, error: RelayError) -> None:
        """The subscription was refused."""

    def dropped(self, channel: Channel, notice: Notice) -> None:
        """The subscription ended; the notice has been offered to the client already."""

    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        """A notice for which the format has no words. The subscription may be closed from here."""

    def expired(self) -> None:
        """The credential's time is over; its subscriptions have been dropped."""

    def disconnect(self, reason: Reason) -> None:
        """The operator or the relay's own stop ends this client."""


class Subscription:
    """One channel of one session.

    `cursor` is the last entry this client has been offered, or need not be; it is kept only while
    the subscription is not live: a live one is where its feed is.
    """

    __slots__ = (
        "added",
        "asked",
        "cursor",
        "digest",
        "feed",
        "known_deleted",
        "known_first",
        "live",
        "pending_notice",
        "rights_as_of",
        "session",
        "untold",
    )

    def __init__(self, session: Session, feed: Feed, asked: Position | None) -> None:
        self.session = session
        self.feed = feed
        self.asked = asked
        self.live = False
        self.cursor: EntryID | None = None
        self.added: int | None = None
        self.digest: int | None = None
        # As the client was last told of a gap: nothing new is missing while these stay the same.
        self.known_deleted: EntryID | None = None
        self.known_first: EntryID | None = None
        self.pending_notice: Notice | None = None
        self.untold: Position | None = None
        self.rights_as_of: EntryID | None = None

    @property
    def gone(self) -> bool:
        """Whether it was taken back while it was being examined."""
        return self.session.subscriptions.get(self.feed.channel) is not self

    @property
    def position(self) -> Position:
        """Where this client is, as a position that can be resumed from."""
        feed = self.feed
        if self.untold is not None:
            # What may be missing has not been told yet: from here it will be judged again.
            return self.untold
        if self.live:
            return Position(feed.position, feed.added, feed.incarnation, feed.digest)
        if self.cursor is None:
            return self.asked or Position(feed.position, feed.added, feed.incarnation, feed.digest)
        return Position(self.cursor, self.added, feed.incarnation, self.digest)

    @property
    def at(self) -> EntryID:
        """The ID of `position`, without the cost of making that."""
        if self.untold is not None:
            return self.untold.id
        if self.live:
            return self.feed.position
        if self.cursor is not None:
            return self.cursor
        return self.asked.id if self.asked else self.feed.position

    def behind_at(self, cursor: EntryID, added: int | None, digest: int | None) -> None:
        """No longer live: events after `cursor` are still owed."""
        self.live = False
        self.cursor, self.added, self.digest = cursor, added, digest

    def tell(self, notice: Notice) -> None:
        """The client sees it in its protocol's own words, in order with its events."""
        session = self.session
        session.hub.metrics.told(notice, 1)
        data = session.encoder.notice(self.feed.channel, notice)
        if data is None:
            session.client.noticed(self, notice)
        else:
            session.offer(data)

    def tell_later(self, notice: Notice, old: int | None) -> None:
        """A client that is behind learns of it too, and does not stay ahead of another life.

        Before this worker's position a gap shows in its pages; at it, it would not.
        """
        cursor = self.cursor
        if cursor is None or (notice.kind == "gap" and cursor < self.feed.position):
            return
        if self.untold is None:
            self.untold = Position(cursor, self.added, old, self.digest)
        if notice.kind == "reset":
            self.known_deleted = self.known_first = None
            if self.feed.position < cursor:
                self.behind_at(self.feed.position, None, None)
        to_id = notice.to_id if notice.kind == "gap" else self.cursor
        self.pending_notice = Notice(notice.kind, notice.reason, cursor, to_id)


class Session:
    """A client in the hub. Made by a door, registered by `Hub.open`."""

    __slots__ = (
        "__weakref__",
        "_outbox",
        "_pending",
        "client",
        "closed",
        "encoder",
        "hub",
        "paused",
        "principal",
        "reserved",
        "selectors",
        "subscriptions",
    )

    def __init__(self, hub: Hub, principal: Principal, encoder: Encoder, client: Client) -> None:
        self.hub = hub
        self.principal = principal
        self.selectors = principal.selectors()
        self.encoder = encoder
        self.client = client
        self.subscriptions: dict[Channel, Subscription] = {}
        # Channels whose rights are being asked for; they are no subscriptions yet.
        self.reserved: set[Channel] = set()
        self.paused = True
        self.closed = False
        self._outbox: Outbox | None = None
        self._pending: list[bytes] = []

    def attach(self, outbox: Outbox) -> None:
        """The socket is there: what waits goes out, and events may flow."""
        self._outbox = outbox
        if self._pending:
            self.hub.dirty.append(self)
        self.resume()

    def offer(self, data: bytes) -> None:
        """Give the client bytes, in order, in this turn's one write."""
        if not self._pending and self._outbox is not None:
            self.hub.dirty.append(self)
        self._pending.append(data)

    def reply(self, data: bytes) -> None:
        """As `offer`, from outside the hub's own turn."""
        self.offer(data)
        self.hub.flush_soon()

    def write_out(self) -> None:
        """Called by the hub at the end of its turn."""
        pending, outbox = self._pending, self._outbox
        if outbox is None or not pending:
            return
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        pending.clear()
        outbox.write(data)
        if outbox.full and not self.paused:
            self.pause()

    def pause(self) -> None:
        """The socket is full: live subscriptions go behind, and are served from the stream."""
        self.paused = True
        self.hub.for_each(list(self.subscriptions.values()), self._stall)

    def _stall(self, subscription: Subscription) -> None:
        if self.paused and subscription.live and not subscription.gone:
            subscription.feed.stall(subscription)

    def resume(self) -> None:
        """The socket has room again."""
        if self.closed or self._outbox is None:
            return
        self.paused = False
        self.hub.for_each(list(self.subscriptions.values()), _catch_up)
        self.hub.flush_soon()

    def cursor(self, channel: Channel, position: Position) -> Iterator[tuple[Channel, Position]]:
        """All positions of this client, with `channel` at `position`."""
        for name, subscription in self.subscriptions.items():
            yield name, position if name == channel else subscription.position

    def refuse(self, channel: Channel, error: RelayError) -> None:
        """Take the subscription away and say why."""
        self.subscriptions.pop(channel, None)
        self.client.refused(channel, error)

    def end(self) -> None:
        """The client is gone, or is to be forgotten. Idempotent."""
        self.hub.close(self)


def _catch_up(subscription: Subscription) -> None:
    subscription.feed.catch_up(subscription)
    # In slices, this is a turn later than `resume`.
    subscription.session.hub.flush_soon()
