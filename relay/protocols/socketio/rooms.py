"""The rooms of one client, and where it is in their streams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from relay.core.model import ZERO_ID, Channel, EntryID
from relay.hub import cursor
from relay.protocols.socketio.entry_format import EVERYBODY, channel_of, room_of

if TYPE_CHECKING:
    from relay.hub.session import Session, Subscription


class RoomMember(Protocol):
    """A client of this protocol, as encoders see it (`relay.hub.session.Session.client`)."""

    sid: str
    rooms: Rooms


class Rooms:
    """`joined` has the rooms, and where in its stream the client joined each. `partial`: it follows
    a stream whose room it is not in, that of `allusers`, which has what goes to everybody."""

    __slots__ = ("_after", "_parts", "_start", "joined", "partial")

    def __init__(self, joined: Mapping[str, EntryID]) -> None:
        self.joined = dict(joined)
        self.partial = EVERYBODY not in joined
        self._start: dict[Channel, bytes] = {}
        self._parts: dict[Channel, tuple[EntryID, bytes]] = {}
        self._after: tuple[Subscription, Subscription, EntryID, bytes] | None = None

    @classmethod
    def new(cls, names: Iterable[str]) -> Rooms:
        """Joined from where their streams are now."""
        return cls(dict.fromkeys(names, ZERO_ID))

    def channels(self) -> list[Channel]:
        """What to follow; everybody's first, which is followed in any case."""
        return list(dict.fromkeys(map(channel_of, (EVERYBODY, *self.joined))))

    def grants(self, channel: Channel) -> bool:
        """Whether these rooms open a stream."""
        room = room_of(channel)
        return room in self.joined or (self.partial and room == EVERYBODY)

    def began(self, session: Session) -> None:
        """Everything that the session gets lies after where its subscriptions are now."""
        for channel, subscription in session.subscriptions.items():
            self._start[channel] = cursor.part(channel, subscription.position)

    def placed(self, subscription: Subscription) -> None:
        """One subscription stands."""
        self._after = None
        channel = subscription.feed.channel
        room = room_of(channel)
        if subscription.start is None and room in self.joined:
            self.joined[room] = subscription.position.id
        self._start[channel] = cursor.part(channel, subscription.position)

    def add(self, room: str, place: EntryID | None, session: Session) -> Channel | None:
        """Join; the stream that is to be followed now, None where it is already, or may not be."""
        self._after = None
        channel = channel_of(room)
        subscription = session.subscriptions.get(channel)
        self.joined[room] = place or (subscription.position.id if subscription else ZERO_ID)
        self.partial = self.partial and room != EVERYBODY
        return channel if subscription is None else None

    def remove(self, room: str) -> Channel | None:
        """Leave; the stream that need not be followed any more."""
        self._after = None
        self.joined.pop(room, None)
        if room == EVERYBODY:
            self.partial = True
            return None
        channel = channel_of(room)
        self._start.pop(channel, None)
        self._parts.pop(channel, None)
        return channel

    def lost(self, channel: Channel) -> None:
        """The client may not read this stream any more."""
        self._after = None
        self.joined.pop(room_of(channel), None)
        self._start.pop(channel, None)
        self._parts.pop(channel, None)

    def reset_cache(self) -> None:
        """Drop the references to subscriptions."""
        self._after = None

    def start(self) -> str:
        """A cursor of where the session began."""
        return cursor.join(self._start.values()).decode()

    def after(self, subscription: Subscription) -> bytes | None:
        """How a cursor of two streams ends, whose first is `subscription`; None for any other.

        Most clients are in two rooms, and most events go to the first of them: then this is all
        that differs between clients, and it changes only with the other room.
        """
        known = self._after
        if known is not None:
            first, other, at, end = known
            if first is subscription and other.live and other.feed.position is at:
                return end
            self._after = None
        subscriptions = subscription.session.subscriptions
        if len(subscriptions) != 2 or self.partial:
            return None
        first, other = subscriptions.values()
        if first is not subscription or not other.live:
            return None
        end = self.part(other.feed.channel, other) + b'"]'
        self._after = first, other, other.feed.position, end
        return end

    def part(self, channel: Channel, subscription: Subscription) -> bytes:
        """Where the client is in a stream, as a part of its cursor."""
        known = self._parts.get(channel)
        if known is not None and subscription.live and known[0] is subscription.feed.position:
            return known[1]
        position = subscription.position
        part = cursor.part(channel, position)
        self._parts[channel] = position.id, part
        return part


def read_rooms(state: Any) -> dict[str, EntryID]:
    """Decode the rooms of a saved session. Raises ValueError or AttributeError."""
    return {str(room): EntryID.parse(at) for room, at in state.items()}
