"""Formats of the npm clients: `message` events with the content.

Clients of Engine.IO 4 receive their cursor as a second argument. Socket.IO clients from 4.6 on
store the last argument as the session's offset, and send it when they reconnect. Clients that are
in the same workspace and have received the same events share one frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakValueDictionary

import orjson
from typing_extensions import override

from relay.hub import cursor
from relay.hub.encoding import frame
from relay.hub.session import Encoder, SubscriptionMode
from relay.protocols.pydio.codec import RELOAD_FOLDER, content_of, needs_masking
from relay.transports.socket.websocket import frame_text
from relay.transports.socketio import codec

if TYPE_CHECKING:
    from relay.core.model import Channel, EntryID, Event, Position
    from relay.hub.recovery import Notice
    from relay.hub.session import Subscription, SubscriptionFeed

MESSAGE = "message"


class NpmEncoder(Encoder):
    """Format of Engine.IO 3 or 4."""

    door = "pydio"

    def __init__(
        self, version: int, namespace: str, masked: frozenset[str], plain: NpmEncoder | None
    ) -> None:
        """`plain` is the encoder of this version without masks, if this one has masks."""
        self.personal = version == 4
        self._version = version
        self._namespace = namespace
        self._masked = masked
        self._plain = plain
        # The cursor part of a stream is the same for all live clients.
        self._live: WeakKeyDictionary[SubscriptionFeed, tuple[EntryID, bytes]] = WeakKeyDictionary()
        self._last: tuple[bytes, bytes, bytes] = (b"", b"", b"")

    @override
    def event(self, event: Event) -> bytes:
        # For Engine.IO 4: the beginning of the packet. `personal_event` appends the cursor.
        if self._plain is not None and not needs_masking(event, self._masked):
            return frame(self._plain, event)
        return self._begin(event.data if self._plain is None else RELOAD_FOLDER)

    def _begin(self, content: bytes) -> bytes:
        arguments = b'["%b",%b' % (MESSAGE.encode(), orjson.dumps(content.decode()))
        if self._version == 3:
            return codec.frames(codec.packet(codec.EVENT, self._namespace, arguments + b"]"), (), 3)
        return b"4" + codec.packet(codec.EVENT, self._namespace, arguments)

    @override
    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        del event
        at = self._cursor(subscription, position)
        last = self._last
        if last[0] is not shared or last[1] != at:
            last = self._last = (shared, at, frame_text(b'%b,"%b"]' % (shared, at)))
        return last[2]

    def content(self, content: bytes, subscriptions: dict[Channel, Subscription]) -> bytes:
        """Encode an instruction of relay for one client."""
        begun = self._begin(content)
        if self._version == 3:
            return begun
        at = cursor.join(self._part(each) for each in subscriptions.values() if has_begun(each))
        return frame_text(b'%b,"%b"]' % (begun, at))

    @override
    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        # In Engine.IO 4 the frame contains the client's cursor: `NpmBrowser.noticed` sends it.
        del channel
        return None if self._version == 4 else self._begin(content_of(notice))

    def _cursor(self, subscription: Subscription, position: Position | None) -> bytes:
        parts = []
        for channel, each in subscription.session.subscriptions.items():
            if each is subscription and position is not None:
                parts.append(cursor.part(channel, position))
            elif has_begun(each):
                parts.append(self._part(each))
        return cursor.join(parts)

    def _part(self, subscription: Subscription) -> bytes:
        feed = subscription.feed
        if subscription.mode is not SubscriptionMode.LIVE:
            return cursor.part(feed.channel, subscription.position)
        known = self._live.get(feed)
        if known is None or known[0] is not feed.position:
            part = cursor.part(feed.channel, subscription.position)
            known = self._live[feed] = (feed.position, part)
        return known[1]


def has_begun(subscription: Subscription) -> bool:
    """Return True if the subscription's position in the stream is known."""
    return subscription.mode is not SubscriptionMode.NEW


class Encoders:
    """The encoders. Clients with the same version and masks share one."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        no_masks: frozenset[str] = frozenset()
        self._plain = {
            version: NpmEncoder(version, namespace, no_masks, None) for version in (3, 4)
        }
        self._masked: WeakValueDictionary[tuple[int, frozenset[str]], NpmEncoder] = (
            WeakValueDictionary()
        )

    def get(self, version: int, masked: frozenset[str]) -> NpmEncoder:
        """Return the encoder for a user with masks on these workspaces."""
        plain = self._plain[version]
        if not masked:
            return plain
        encoder = self._masked.get((version, masked))
        if encoder is None:
            encoder = NpmEncoder(version, self._namespace, masked, plain)
            self._masked[version, masked] = encoder
        return encoder
