"""The formats of this door: one encoder per generation, and two with the cursor for 4.x clients.

The packet's text is made once per event and generation. What differs from client to client is
whether it gets the event at all (several rooms in one emit, `except`), and for clients that can
recover the cursor, upstream's offset: the client gives back the last one it has seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from relay.core.model import Channel, Event, Position
from relay.hub import cursor
from relay.hub.recovery import Notice
from relay.protocols.socketio import entry_format
from relay.protocols.socketio.entry_format import EVERYONE, Audience, room_of
from relay.transports.engineio.packets import MESSAGE, Packet, frame
from relay.transports.socketio import codec

if TYPE_CHECKING:
    from relay.hub.session import Subscription
    from relay.protocols.socketio.rooms import RoomMember

# Keys of `Event.frames`: what all encoders of this door share.
_AUDIENCE, _ATTACHMENTS = "socketio audience", "socketio attachments"
_FILTERS = (b"rooms", b"except")
_HEADS = 10_000
OFFSET_EVENT = "relay:offset"


class SocketEncoder:
    """Whole frames, the same for every client of one generation; some clients may get none."""

    door = "socketio"
    personal = True

    def __init__(self, version: int, namespace: str) -> None:
        self._version = version
        self._namespace = namespace

    def event(self, event: Event) -> bytes:
        """The packet's frames; nothing for a name that clients fire themselves."""
        text, attachments = self._packet(event)
        return codec.frames(text, attachments, self._version) if text else b""

    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        """`shared`, or nothing."""
        del position
        return shared if shared and wanted(event, subscription) else b""

    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        """There are no words for it: see `SocketClient.noticed`."""
        del channel, notice
        return None

    def _packet(self, event: Event) -> tuple[bytes, list[bytes]]:
        name, (packet, attachments) = entry_format.said(event)
        if name in codec.RESERVED_EVENTS:
            return b"", []
        kind = codec.BINARY_EVENT if attachments else codec.EVENT
        text = codec.packet(kind, self._namespace, packet, attachments=len(attachments))
        return text, attachments


class OffsetEncoder(SocketEncoder):
    """Whole frames, and after each the client's cursor as an event of its own name.

    For clients of Engine.IO 4 that may be older than 4.6: those would hand a further argument to
    the application. Nobody listens to this event, and a client of 4.6 and later takes its last
    argument for its offset as that of any other.
    """

    def __init__(self, version: int, namespace: str) -> None:
        super().__init__(version, namespace)
        # The part of the event's own channel is the same for every client that is where it is, and
        # so is all that stands before it.
        self._position: Position | None = None
        self._part = b""
        self._shared = b""
        self._before = b""
        self._heads: dict[int, bytes] = {}
        self._head = b"4" + codec.packet(codec.EVENT, namespace, b'["%b' % OFFSET_EVENT.encode())

    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        """The event's frames and the cursor's."""
        quick = self._quick(event, position, subscription, shared)
        if quick is not None:
            return shared + quick
        if not shared or not wanted(event, subscription):
            return b""
        if position is None and not shared.endswith(b'"]'):
            # The client takes every last argument that is a text for its offset, the event's name
            # too; after what has no place in a stream it needs a cursor only then.
            return shared
        return shared + _framed(self._head, b'","%b"]' % self.cursor(position, subscription))

    def _begin(self, shared: bytes) -> bytes:
        """The packet up to its cursor."""
        del shared
        return self._head + b'","'

    def _quick(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes | None:
        """The frame with the cursor for nearly every client and event: one for everybody in the
        room, to a client of two streams of which only this one has moved. None for all others."""
        if position is None or event.extra or not shared:
            return None
        rooms = cast("RoomMember", subscription.session.client).rooms
        after = rooms.after(subscription)
        if after is None:
            return None
        if self._position is not position or self._shared is not shared:
            self._position, self._shared = position, shared
            self._part = cursor.part(event.channel, position)
            self._before = self._begin(shared) + cursor.PREFIX + self._part + cursor.SEPARATOR
        size = len(self._before) + len(after)
        head = self._heads.get(size)
        if head is None:
            if len(self._heads) > _HEADS:
                self._heads.clear()
            head = self._heads[size] = _frame_head(size)
        return head + self._before + after

    def cursor(self, position: Position | None, subscription: Subscription) -> bytes:
        """Where the client is in all its streams, with `subscription` at `position`."""
        client = cast("RoomMember", subscription.session.client)
        parts = []
        for channel, each in subscription.session.subscriptions.items():
            if each is not subscription or position is None:
                parts.append(client.rooms.part(channel, each))
                continue
            if self._position is not position:
                self._position, self._part = position, cursor.part(channel, position)
            parts.append(self._part)
        return cursor.join(parts)


class RecoverableEncoder(OffsetEncoder):
    """Frames with the client's cursor as the last argument: upstream's own way, in which no cut
    can come between an event and its offset."""

    def event(self, event: Event) -> bytes:
        """The packet's text without its last bracket."""
        text, attachments = self._packet(event)
        if attachments:
            event.frames[_ATTACHMENTS] = b"".join(
                frame(Packet(MESSAGE, each, True), self._version) for each in attachments
            )
        return b"4" + text[:-1] if text else b""

    def _begin(self, shared: bytes) -> bytes:
        return shared + b',"'

    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        """The whole packet for one client."""
        quick = self._quick(event, position, subscription, shared)
        if quick is not None:
            return quick
        if not shared or not wanted(event, subscription):
            return b""
        if position is None and not shared.endswith(b'"'):
            data = _framed(shared, b"]")
        else:
            data = _framed(shared, b',"%b"]' % self.cursor(position, subscription))
        attachments = event.frames.get(_ATTACHMENTS)
        return data if attachments is None else data + attachments


def _framed(head: bytes, tail: bytes) -> bytes:
    return _frame_head(len(head) + len(tail)) + head + tail


def _frame_head(size: int) -> bytes:
    """Of a text frame: the rest of it is not the same bytes for everybody."""
    if size < 126:
        return bytes((0x81, size))
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big")
    return b"\x81\x7f" + size.to_bytes(8, "big")


def wanted(event: Event, subscription: Subscription) -> bool:
    """Return whether this client gets the event from this stream."""
    client = cast("RoomMember", subscription.session.client)
    extra = event.extra
    if not client.rooms.partial and not (extra and any(name in extra for name in _FILTERS)):
        return True
    # Emits to a socket's ID are stored in the stream of `allusers`, because a socket has no stream.
    # They are for that socket whether or not it is in this room.
    is_addressed = event.to is not None and f"client:{client.sid}" in event.to
    room = None if is_addressed else room_of(event.channel)
    return _audience(event).wants(room, client.rooms.joined, (client.sid,))


def _audience(event: Event) -> Audience:
    found = cast("dict[object, Audience]", event.frames).get(_AUDIENCE)
    if found is None:
        found = entry_format.audience(event.extra) if event.extra else EVERYONE
        cast("dict[object, Audience]", event.frames)[_AUDIENCE] = found
    return found
