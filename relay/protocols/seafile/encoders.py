"""The door's one format: an event is one text frame, the same for all clients."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from relay.hub.encoding import SharedEncoder
from relay.protocols.seafile import codec
from relay.transports.socket.websocket import frame_text

if TYPE_CHECKING:
    from relay.core.model import Channel, Event
    from relay.hub.recovery import Notice

_log = logging.getLogger(__name__)


class SeafileEncoder(SharedEncoder):
    """Events as the notification server sends them, but never in several frames."""

    door = "seafile"

    def event(self, event: Event) -> bytes:
        """Return one frame, or b"" where clients of this protocol must not receive the event."""
        if codec.is_for_some(event):
            # The program that appended it left out its recipients.
            _log.warning(
                "Event %s on %s not delivered to Seafile clients: a permission for a user or group"
                " needs the field to",
                event.id,
                event.channel,
            )
            return b""
        text = codec.event_message(event)
        if not text:
            _log.debug(
                "Event %s on %s not delivered to Seafile clients: type %r with this content is not"
                " part of their protocol",
                event.id,
                event.channel,
                event.type,
            )
            return b""
        if len(text) > codec.READABLE_BYTES:
            _log.warning(
                "event %s of %s has %d bytes: sync clients read at most %d in one message",
                event.id,
                event.channel,
                len(text),
                codec.READABLE_BYTES,
            )
        return frame_text(text)

    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        """The protocol has no words for what may be missing, nor for a right that was lost."""
        del channel, notice
        return None


SEAFILE = SeafileEncoder()
