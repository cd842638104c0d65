"""The npm kind's formats: `message` events with the content.

A client of Engine.IO 4 gets its cursor as a second argument, which is where those from 4.6 on look
for what upstream calls the offset; it comes back with them when they reconnect. All who are in the
same workspace and have seen the same share one frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakValueDictionary

import orjson

from relay.hub import cursor
from relay.hub.encoding import frame
from relay.protocols.pydio.codec import RELOAD_FOLDER, content_of, hides
from relay.transports.socket.websocket import frame_text
from relay.transports.socketio import codec

if TYPE_CHECKING:
    from relay.core.model import Channel, EntryID, Event, Position
    from relay.hub.recovery import Notice
    from relay.hub.session import Subscription, SubscriptionFeed

MESSAGE = "message"


class NpmEncoder:
    """One generation: Engine.IO 3 or 4."""

    door = "pydio"

    def __init__(
        self, version: int, namespace: str, masked: frozenset[str], plain: NpmEncoder | None
    ) -> None:
        """`plain` is the same without masks."""
        self.personal = version == 4
        self._version = version
        self._namespace = namespace
        self._masked = masked
        self._plain = plain
        # Where live clients are in a stream is the same for all of them.
        self._live: WeakKeyDictionary[SubscriptionFeed, tuple[EntryID, bytes]] = WeakKeyDictionary()
        self._last: tuple[bytes, bytes, bytes] = (b"", b"", b"")

    def event(self, event: Event) -> bytes:
        """The frames; for Engine.IO 4 the packet without its end."""
        if self._plain is not None and not hides(event, self._masked):
            return frame(self._plain, event)
        return self._begin(event.data if self._plain is None else RELOAD_FOLDER)

    def _begin(self, content: bytes) -> bytes:
        said = b'["%b",%b' % (MESSAGE.encode(), orjson.dumps(content.decode()))
        if self._version == 3:
            return codec.frames(codec.packet(codec.EVENT, self._namespace, said + b"]"), (), 3)
        return b"4" + codec.packet(codec.EVENT, self._namespace, said)

    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        """The packet's end with the client's cursor."""
        del event
        at = self._cursor(subscription, position)
        last = self._last
        if last[0] is not shared or last[1] != at:
            last = self._last = (shared, at, frame_text(b'%b,"%b"]' % (shared, at)))
        return last[2]

    def content(self, content: bytes, subscriptions: dict[Channel, Subscription]) -> bytes:
        """A content of the relay's own for one client."""
        begun = self._begin(content)
        if self._version == 3:
            return begun
        at = cursor.join(self._part(each) for each in subscriptions.values() if has_begun(each))
        return frame_text(b'%b,"%b"]' % (begun, at))

    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        """The same instructions as for the other kind; with a cursor they are each client's own."""
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
        if not subscription.live:
            return cursor.part(feed.channel, subscription.position)
        known = self._live.get(feed)
        if known is None or known[0] is not feed.position:
            part = cursor.part(feed.channel, subscription.position)
            known = self._live[feed] = (feed.position, part)
        return known[1]


def has_begun(subscription: Subscription) -> bool:
    """Whether its place in the stream is known."""
    return subscription.live or subscription.cursor is not None


class Encoders:
    """One object for all clients of a generation whose masks are the same."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        nobody: frozenset[str] = frozenset()
        self._plain = {version: NpmEncoder(version, namespace, nobody, None) for version in (3, 4)}
        self._masked: WeakValueDictionary[tuple[int, frozenset[str]], NpmEncoder] = (
            WeakValueDictionary()
        )

    def get(self, version: int, masked: frozenset[str]) -> NpmEncoder:
        """For somebody with masks on these workspaces."""
        plain = self._plain[version]
        if not masked:
            return plain
        encoder = self._masked.get((version, masked))
        if encoder is None:
            encoder = NpmEncoder(version, self._namespace, masked, plain)
            self._masked[version, masked] = encoder
        return encoder
