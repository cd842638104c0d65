"""A client's session, its subscriptions, and the interfaces through which the hub reaches it.

Everything that is offered to a session within one turn of the loop is sent in one write. A session
without a socket, or whose socket is full, is *paused*: it receives no events. Its subscriptions
fall behind, and catch up from the stream when the socket has room.

This module imports no other part of the hub that uses sessions. `SessionHub` and
`SubscriptionFeed` are what a session needs of them.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol, TypeVar

from relay.core.errors import RelayError
from relay.core.model import Channel, EntryID, Event, Position, Principal
from relay.core.reasons import Reason
from relay.hub.recovery import Notice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from relay.core.connection import ConnectionInfo
    from relay.core.metrics import Metrics

_T = TypeVar("_T")


class SessionObserver:
    """Is notified of what happens to clients, but not of each event. This one ignores it."""

    def connected(self, session: Session) -> None:
        """A session has its socket."""

    def disconnected(self, session: Session, subscriptions: Sequence[Subscription]) -> None:
        """A session has ended, with these subscriptions."""

    def subscribed(self, subscription: Subscription) -> None:
        """A subscription was accepted. Events after `began` follow."""

    def rejected(self, session: Session, channel: Channel, error: RelayError, rule: str) -> None:
        """A subscription was rejected. `rule`: the right is `revoked`, or `not granted`, or ''."""

    def unsubscribed(self, subscription: Subscription, notice: Notice | None) -> None:
        """A subscription has ended: by the client, or for the reason in the notice."""

    def notified(self, channel: Channel, notice: Notice, session: Session | None) -> None:
        """A gap or reset was sent to one client, or to all live clients of the channel (None)."""


class SessionHub(Protocol):
    """The hub as its sessions see it."""

    # Sessions with data to write at the end of this turn.
    dirty: list[Session]
    observer: SessionObserver

    @property
    def metrics(self) -> Metrics:
        """The worker's metrics."""

    def flush_soon(self) -> None:
        """Write all offered data at the end of this turn of the loop."""

    def for_each(self, items: Sequence[_T], act: Callable[[_T], object]) -> None:
        """Call `act` for each of the items: for a few at once, for many in slices."""

    def close(self, session: Session) -> None:
        """Remove a session and its subscriptions."""

    def unsubscribe(self, session: Session, channel: Channel) -> None:
        """End a subscription. BadRequest if there is none."""

    def change_principal(self, session: Session, principal: Principal) -> None:
        """Use a refreshed credential of the same user, and check its rights."""


class SubscriptionFeed(Protocol):
    """A followed stream as its subscriptions see it."""

    channel: Channel
    position: EntryID
    added: int | None
    digest: int | None
    incarnation: int | None

    @property
    def known(self) -> Position | None:
        """The position, or None if the stream was never examined."""

    def stall(self, subscription: Subscription) -> None:
        """Stop live delivery to a subscription whose socket is full."""

    def catch_up(self, subscription: Subscription) -> None:
        """Continue delivery to a subscription whose socket has room."""

    def hold(self, subscription: Subscription, stop: EntryID, reached: Callable[[], None]) -> None:
        """Deliver no entry after `stop` to the subscription until `release` is called."""

    def release(self, subscription: Subscription) -> None:
        """Continue delivery after `hold`."""

    def leave(self, subscription: Subscription) -> None:
        """Remove a subscription."""

    def drop(self, subscription: Subscription, notice: Notice) -> None:
        """End a subscription and send its client the reason."""

    def on_rights_changed(self) -> None:
        """Check the rights of all subscriptions again."""


class Encoder(Protocol):
    """Encodes events and notices as complete frames of one protocol. Protocols implement it.

    All sessions of one format share one encoder object. The object is the cache key: an event is
    encoded once for all of them.
    """

    __slots__ = ()

    # The protocol whose clients use this format: `Event.door`.
    door: str
    # True if frames differ from client to client, for example because they contain a cursor.
    personal: bool

    def event(self, event: Event) -> bytes:
        """Encode an event: the frame, or for a personal encoder the part that all clients share."""

    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        """Return one client's frame, or b"" to send nothing.

        `shared` is the result of `event`. `position` is the client's position in the channel after
        the event, or None for an ephemeral event.
        """

    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        """Encode a gap, reset or revocation.

        Return None if the protocol has no such message. Then `Client.noticed` is called.
        """


class Outbox(Protocol):
    """A client's socket as the hub sees it."""

    full: bool
    # Describes the client's connection. None if it is unknown.
    info: ConnectionInfo | None = None
    # The code of the client's close frame, if it has sent one, and why the socket was closed here.
    close_code: int | None = None
    ending: Reason | None = None

    @property
    def transport_name(self) -> str:
        """The way in which the client is connected, for operators."""
        return ""

    def waiting_bytes(self) -> int:
        """Return the number of bytes that have not been sent."""
        return 0

    def write(self, data: bytes) -> None:
        """Queue bytes without blocking. Ignored if the client has disconnected."""

    def close(self, last: bytes = b"") -> None:
        """Write `last`, then close once all bytes are sent."""


class Client(Protocol):
    """The protocol's side of a session: callbacks of the hub besides events and notices."""

    __slots__ = ()

    def subscribed(self, subscription: Subscription) -> None:
        """The subscription was accepted. Events after its position follow."""

    def refused(self, channel: Channel, error: RelayError) -> None:
        """The subscription was refused."""

    def dropped(self, channel: Channel, notice: Notice) -> None:
        """The subscription ended. The notice has already been offered to the client."""

    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        """A notice that the format cannot express. The callback may close the subscription."""

    def expired(self) -> None:
        """The credential has expired. Its subscriptions have been dropped."""

    def disconnect(self, reason: Reason) -> None:
        """Close the connection, at an operator's request or because the relay stops."""


class SubscriptionMode(enum.Enum):
    """How a subscription receives events (`relay.hub.feed`)."""

    # It waits for an examination that starts after it joined.
    NEW = enum.auto()
    # It receives pages from its own cursor.
    BEHIND = enum.auto()
    # Its position is that of its feed.
    LIVE = enum.auto()


class Subscription:
    """One channel of one session.

    `start` is the position that the client requested, or None for new events only. `cursor` is the
    last entry that was offered to the client or that it need not receive. It is only set while the
    subscription is not live. The position of a live one is that of its feed.
    """

    __slots__ = (
        "added",
        "before_notice",
        "began",
        "cursor",
        "digest",
        "feed",
        "is_deferred",
        "known_deleted",
        "known_trimmed",
        "mode",
        "pending_notice",
        "rights_as_of",
        "session",
        "start",
    )

    def __init__(self, session: Session, feed: SubscriptionFeed, start: Position | None) -> None:
        self.session = session
        self.feed = feed
        self.start = start
        self.mode = SubscriptionMode.NEW
        self.cursor: EntryID | None = None
        # Events after this entry are delivered. None until the subscription is accepted.
        self.began: EntryID | None = None
        self.added: int | None = None
        self.digest: int | None = None
        # State of the stream at the last gap notice. While it is unchanged, nothing new is missing.
        self.known_deleted: EntryID | None = None
        self.known_trimmed: int | None = None
        # A notice that is sent once the subscription catches up, and the position before it.
        self.pending_notice: Notice | None = None
        self.before_notice: Position | None = None
        self.rights_as_of: EntryID | None = None
        # The client is connected, although the stream cannot be read yet, see `defer`.
        self.is_deferred = False

    def defer(self, now: EntryID) -> None:
        """Let the client's subscription begin now, although the stream cannot be read.

        It is accepted as soon as the stream can be read. The client then receives all later events
        of the feed. If the feed was never examined, nothing proves which events were appended since
        now: the client receives those with a later ID than `now`, and a notice.
        """
        if self.mode is SubscriptionMode.NEW and not self.is_deferred:
            self.is_deferred = True
            self.start = self.start or self.feed.known or Position(now)

    @property
    def has_ended(self) -> bool:
        """Return True if the subscription has ended, for example while the stream was examined."""
        return self.session.subscriptions.get(self.feed.channel) is not self

    @property
    def has_position(self) -> bool:
        """Return False if the client receives new events only, and was not accepted yet."""
        return self.start is not None or self.mode is not SubscriptionMode.NEW

    @property
    def position(self) -> Position:
        """The client's position, from which it can resume, see `has_position`."""
        feed = self.feed
        if self.before_notice is not None:
            # The client has not received its gap notice yet. Resuming from here repeats the check.
            return self.before_notice
        if self.mode is SubscriptionMode.LIVE:
            return Position(feed.position, feed.added, feed.incarnation, feed.digest)
        if self.cursor is None:
            return self.start or Position(feed.position, feed.added, feed.incarnation, feed.digest)
        return Position(self.cursor, self.added, feed.incarnation, self.digest)

    @property
    def at(self) -> EntryID:
        """The ID of `position`, without the cost of creating a Position."""
        if self.before_notice is not None:
            return self.before_notice.id
        if self.mode is SubscriptionMode.LIVE:
            return self.feed.position
        if self.cursor is not None:
            return self.cursor
        return self.start.id if self.start else self.feed.position

    def behind_at(self, cursor: EntryID, added: int | None, digest: int | None) -> None:
        """Leave live delivery: events after `cursor` must still be delivered."""
        self.mode = SubscriptionMode.BEHIND
        self.cursor, self.added, self.digest = cursor, added, digest

    def notify(self, notice: Notice) -> None:
        """Send a notice to the client, in order with its events."""
        session = self.session
        session.hub.metrics.notified(notice, 1)
        if notice.kind != "revoked":
            session.hub.observer.notified(self.feed.channel, notice, session)
        data = session.encoder.notice(self.feed.channel, notice)
        if data is None:
            session.client.noticed(self, notice)
        else:
            session.offer(data)

    def notify_later(self, notice: Notice, old: int | None) -> None:
        """Send a notice to a client that is behind, once it catches up. `old` is the incarnation
        of its position.

        A gap before this worker's position shows in the client's pages, so it needs no notice.
        """
        cursor = self.cursor
        if cursor is None or (notice.kind == "gap" and cursor < self.feed.position):
            return
        if self.before_notice is None:
            self.before_notice = Position(cursor, self.added, old, self.digest)
        if notice.kind == "reset":
            self.known_deleted = self.known_trimmed = None
            if self.feed.position < cursor:
                self.behind_at(self.feed.position, None, None)
        to_id = notice.to_id if notice.kind == "gap" else self.cursor
        self.pending_notice = Notice(notice.kind, notice.reason, cursor, to_id)


class Session:
    """A client in the hub. `Hub.open` creates it."""

    __slots__ = (
        "__weakref__",
        "_outbox",
        "_pending",
        "client",
        "closed",
        "encoder",
        "ending",
        "hub",
        "info",
        "paused",
        "principal",
        "reserved",
        "selectors",
        "subscriptions",
    )

    def __init__(
        self,
        hub: SessionHub,
        principal: Principal,
        encoder: Encoder,
        client: Client,
        info: ConnectionInfo | None = None,
    ) -> None:
        self.hub = hub
        self.principal = principal
        self.selectors = principal.selectors()
        self.encoder = encoder
        self.client = client
        self.subscriptions: dict[Channel, Subscription] = {}
        # Channels whose rights are being requested, and the argument of `defer`. They are not
        # subscriptions yet.
        self.reserved: dict[Channel, EntryID | None] = {}
        self.paused = True
        self.closed = False
        # Describes the client's connection.
        self.info = info
        # Why relay ends the session. None if the client has disconnected.
        self.ending: Reason | None = None
        self._outbox: Outbox | None = None
        self._pending: list[bytes] = []

    @property
    def outbox(self) -> Outbox | None:
        """The socket, or None before `attach`."""
        return self._outbox

    def attach(self, outbox: Outbox) -> None:
        """Set the socket: write what is waiting, and begin to deliver events."""
        self._outbox = outbox
        self.info = self.info or outbox.info
        self.hub.observer.connected(self)
        if self._pending:
            self.hub.dirty.append(self)
        self.resume()

    def offer(self, data: bytes) -> None:
        """Queue bytes for the client. They are sent in order, in one write per turn of the loop."""
        if not self._pending and self._outbox is not None:
            self.hub.dirty.append(self)
        self._pending.append(data)

    def reply(self, data: bytes) -> None:
        """Queue bytes as `offer` does, outside of a turn of the hub."""
        self.offer(data)
        self.hub.flush_soon()

    def write_out(self) -> None:
        """Write the queued bytes. The hub calls this at the end of its turn."""
        pending, outbox = self._pending, self._outbox
        if outbox is None or not pending:
            return
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        pending.clear()
        outbox.write(data)
        if outbox.full and not self.paused:
            self.pause()

    def pause(self) -> None:
        """Stop live delivery, because the socket is full."""
        self.paused = True
        self.hub.for_each(list(self.subscriptions.values()), self._stall)

    def _stall(self, subscription: Subscription) -> None:
        is_live = subscription.mode is SubscriptionMode.LIVE
        if self.paused and is_live and not subscription.has_ended:
            subscription.feed.stall(subscription)

    def resume(self) -> None:
        """Continue delivery, because the socket has room again."""
        if self.closed or self._outbox is None:
            return
        self.paused = False
        self.hub.for_each(list(self.subscriptions.values()), _catch_up)
        self.hub.flush_soon()

    def cursor(self, channel: Channel, position: Position) -> Iterator[tuple[Channel, Position]]:
        """Yield the position of each subscription, with `channel` at `position`."""
        for name, subscription in self.subscriptions.items():
            yield name, position if name == channel else subscription.position

    def defer(self, channel: Channel, now: EntryID) -> None:
        """Let a subscription begin now, even if it waits for the rights, see `Subscription.defer`.

        Do nothing if there is none.
        """
        if (subscription := self.subscriptions.get(channel)) is not None:
            subscription.defer(now)
        elif channel in self.reserved:
            self.reserved[channel] = now

    def refuse(self, channel: Channel, error: RelayError, rule: str = "") -> None:
        """Remove a subscription that was rejected, and report the reason."""
        self.subscriptions.pop(channel, None)
        self.hub.observer.rejected(self, channel, error, rule)
        self.client.refused(channel, error)

    def disconnect(self, reason: Reason) -> None:
        """Let the protocol close the connection."""
        self.ending = reason
        self.client.disconnect(reason)

    def end(self, reason: Reason | None = None) -> None:
        """Remove the session from the hub. Can be called repeatedly.

        `reason` is why relay closes the connection, or None if the client has disconnected.
        """
        self.ending = self.ending or reason
        self.hub.close(self)


def _catch_up(subscription: Subscription) -> None:
    subscription.feed.catch_up(subscription)
    # If there are many subscriptions, this runs in a later turn than `resume`.
    subscription.session.hub.flush_soon()
