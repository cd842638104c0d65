"""Encoders of this protocol: one per protocol version, and two with a cursor for 4.x clients.

A packet is encoded once per event and version. Two things differ between clients: whether a client
receives the event (emits to several rooms, `except`), and the cursor for clients that can recover.
The cursor is Socket.IO's offset: the client sends the last one when it reconnects.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from typing_extensions import override

from relay.core.client_libraries import SOCKETIO_RESERVED
from relay.core.model import Channel, Event, Position
from relay.hub import cursor
from relay.hub.recovery import Notice
from relay.hub.session import Encoder
from relay.protocols.socketio import entry_format
from relay.protocols.socketio.entry_format import EVERYONE, Audience, room_of
from relay.transports.engineio.packets import MESSAGE, Packet, frame
from relay.transports.socketio import codec

if TYPE_CHECKING:
    from relay.hub.session import Subscription
    from relay.protocols.socketio.rooms import RoomMember

_log = logging.getLogger(__name__)

# Keys of `Event.frames` that all encoders of this protocol share.
_AUDIENCE, _ATTACHMENTS = "socketio audience", "socketio attachments"
_FILTERS = (b"rooms", b"except")
_HEADS = 10_000
OFFSET_EVENT = "relay:offset"


class SocketEncoder(Encoder):
    """Encodes frames that all clients of one version share. Some clients may not receive them."""

    door = "socketio"
    personal = True

    def __init__(self, version: int, namespace: str) -> None:
        self._version = version
        self._namespace = namespace

    @override
    def event(self, event: Event) -> bytes:
        # The result is b"" for names of events that clients emit themselves.
        text, attachments = self._packet(event)
        return codec.frames(text, attachments, self._version) if text else b""

    @override
    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        del position
        return shared if shared and wanted(event, subscription) else b""

    @override
    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        # The protocol has no notices, see `SocketClient.noticed`.
        del channel, notice
        return None

    def _packet(self, event: Event) -> tuple[bytes, list[bytes]]:
        name, (packet, attachments) = entry_format.encode_event(event)
        if name in SOCKETIO_RESERVED[self._version]:
            _log.warning(
                "Event %s of %s not sent to Socket.IO %s clients: their library emits events %r"
                " itself; use another type",
                event.id or "(ephemeral)",
                event.channel,
                "2.x" if self._version == 3 else "3.x and 4.x",
                name,
            )
            return b"", []
        kind = codec.BINARY_EVENT if attachments else codec.EVENT
        text = codec.packet(kind, self._namespace, packet, attachments=len(attachments))
        return text, attachments


class OffsetEncoder(SocketEncoder):
    """Appends the client's cursor to each event as a separate event.

    This is for clients that may be older than 4.6, which would pass an additional argument to the
    application. Applications don't listen to this event, and clients from 4.6 on use its last
    argument as their offset, as for any other event.
    """

    def __init__(self, version: int, namespace: str) -> None:
        super().__init__(version, namespace)
        # The cursor's part for the event's channel, and the bytes before it, are the same for all
        # clients at this position.
        self._position: Position | None = None
        self._part = b""
        self._shared = b""
        self._before = b""
        self._heads: dict[int, bytes] = {}
        self._head = b"4" + codec.packet(codec.EVENT, namespace, b'["%b' % OFFSET_EVENT.encode())

    @override
    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        quick = self._quick(event, position, subscription, shared)
        if quick is not None:
            return shared + quick
        if not shared or not wanted(event, subscription):
            return b""
        if position is None and not shared.endswith(b'"]'):
            # The client uses the last element of a packet as its offset if that is a string. An
            # ephemeral event needs a cursor only in this case.
            return shared
        return shared + _framed(self._head, b'","%b"]' % self.cursor(position, subscription))

    def _begin(self, shared: bytes) -> bytes:
        """Return the packet up to its cursor."""
        del shared
        return self._head + b'","'

    def _quick(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes | None:
        """Return the frame with the cursor in the most frequent case, else None.

        In this case the event is for all members of the room, and the client has two streams of
        which only this one has advanced.
        """
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
        """Return the client's cursor over all its streams, with `subscription` at `position`."""
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
    """Adds the client's cursor as the last argument, as Socket.IO 4.6 and later do.

    A lost connection cannot separate an event from its offset.
    """

    @override
    def event(self, event: Event) -> bytes:
        # The packet's last bracket follows the cursor.
        text, attachments = self._packet(event)
        if attachments:
            event.frames[_ATTACHMENTS] = b"".join(
                frame(Packet(MESSAGE, each, True), self._version) for each in attachments
            )
        return b"4" + text[:-1] if text else b""

    @override
    def _begin(self, shared: bytes) -> bytes:
        return shared + b',"'

    @override
    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
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
    """Return the head of a text frame whose payload differs between clients."""
    if size < 126:
        return bytes((0x81, size))
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big")
    return b"\x81\x7f" + size.to_bytes(8, "big")


def wanted(event: Event, subscription: Subscription) -> bool:
    """Return True if this client receives the event from this stream."""
    client = cast("RoomMember", subscription.session.client)
    extra = event.extra
    if not client.rooms.partial and not (extra and any(name in extra for name in _FILTERS)):
        return True
    # Emits to a socket's ID are stored in the stream of `allusers`, because a socket has no stream.
    # The socket receives them whether or not it is in this room.
    is_addressed = event.to is not None and f"client:{client.sid}" in event.to
    room = None if is_addressed else room_of(event.channel)
    return _audience(event).wants(room, client.rooms.joined, (client.sid,))


def _audience(event: Event) -> Audience:
    found = cast("dict[object, Audience]", event.frames).get(_AUDIENCE)
    if found is None:
        found = entry_format.audience(event.extra) if event.extra else EVERYONE
        cast("dict[object, Audience]", event.frames)[_AUDIENCE] = found
    return found
