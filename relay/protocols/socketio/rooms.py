"""The rooms of one client, and its positions in their streams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from relay.core.model import ZERO_ID, Channel, EntryID
from relay.hub import cursor
from relay.hub.session import SubscriptionMode
from relay.protocols.socketio.entry_format import EVERYBODY, channel_of, room_of

if TYPE_CHECKING:
    from relay.hub.session import Session, Subscription


_LIVE = SubscriptionMode.LIVE


class RoomMember(Protocol):
    """A client of this protocol, as encoders see it (`relay.hub.session.Session.client`)."""

    sid: str
    rooms: Rooms


class Rooms:
    """The rooms that a client has joined.

    `joined` maps each room to the position in its stream at which the client joined. `partial` is
    True if the client is not in `allusers`. It follows that stream in any case, because it has the
    events for the whole namespace.
    """

    __slots__ = ("_after", "_parts", "_start", "joined", "partial")

    def __init__(self, joined: Mapping[str, EntryID]) -> None:
        self.joined = dict(joined)
        self.partial = EVERYBODY not in joined
        self._start: dict[Channel, bytes] = {}
        self._parts: dict[Channel, tuple[EntryID, bytes]] = {}
        self._after: tuple[Subscription, Subscription, EntryID, bytes] | None = None

    @classmethod
    def new(cls, names: Iterable[str]) -> Rooms:
        """Return rooms that are joined at the present end of their streams."""
        return cls(dict.fromkeys(names, ZERO_ID))

    def channels(self) -> list[Channel]:
        """Return the channels to follow. The first is that of `allusers`, in any case."""
        return list(dict.fromkeys(map(channel_of, (EVERYBODY, *self.joined))))

    def grants(self, channel: Channel) -> bool:
        """Return True if one of the rooms gives access to this channel."""
        room = room_of(channel)
        return room in self.joined or (self.partial and room == EVERYBODY)

    def began(self, session: Session) -> None:
        """Store the positions after which the session receives events."""
        for channel, subscription in session.subscriptions.items():
            self._start[channel] = cursor.part(channel, subscription.position)

    def placed(self, subscription: Subscription) -> None:
        """Store the position of a subscription that was accepted."""
        self._after = None
        channel = subscription.feed.channel
        room = room_of(channel)
        if subscription.start is None and room in self.joined:
            self.joined[room] = subscription.position.id
        self._start[channel] = cursor.part(channel, subscription.position)

    def add(self, room: str, place: EntryID | None, session: Session) -> Channel | None:
        """Join a room. Return the channel to subscribe to, or None if it is subscribed already."""
        self._after = None
        channel = channel_of(room)
        subscription = session.subscriptions.get(channel)
        self.joined[room] = place or (subscription.position.id if subscription else ZERO_ID)
        self.partial = self.partial and room != EVERYBODY
        return channel if subscription is None else None

    def remove(self, room: str) -> Channel | None:
        """Leave a room. Return the channel to unsubscribe from, if any."""
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
        """Remove the room of a channel that the client may no longer read."""
        self._after = None
        self.joined.pop(room_of(channel), None)
        self._start.pop(channel, None)
        self._parts.pop(channel, None)

    def reset_cache(self) -> None:
        """Drop the references to subscriptions."""
        self._after = None

    def start(self) -> str:
        """Return a cursor of the positions where the session began."""
        return cursor.join(self._start.values()).decode()

    def after(self, subscription: Subscription) -> bytes | None:
        """Return the end of a cursor over two streams of which `subscription` is the first.

        Return None in other cases. Most clients are in two rooms, and most events go to the first
        one. Then only this part differs between clients, and it changes only with the other room.
        """
        known = self._after
        if known is not None:
            first, other, at, end = known
            if first is subscription and other.mode is _LIVE and other.feed.position is at:
                return end
            self._after = None
        subscriptions = subscription.session.subscriptions
        if len(subscriptions) != 2 or self.partial:
            return None
        first, other = subscriptions.values()
        if first is not subscription or other.mode is not _LIVE:
            return None
        end = self.part(other.feed.channel, other) + b'"]'
        self._after = first, other, other.feed.position, end
        return end

    def part(self, channel: Channel, subscription: Subscription) -> bytes:
        """Return the client's position in a stream as a part of its cursor."""
        known = self._parts.get(channel)
        if (
            known is not None
            and subscription.mode is _LIVE
            and known[0] is subscription.feed.position
        ):
            return known[1]
        position = subscription.position
        part = cursor.part(channel, position)
        self._parts[channel] = position.id, part
        return part


def read_rooms(state: Any) -> dict[str, EntryID]:
    """Decode the rooms of a saved session. Raises ValueError or AttributeError."""
    return {str(room): EntryID.parse(at) for room, at in state.items()}
