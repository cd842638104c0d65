"""The door's one format: an event is one text frame, the same for all clients."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from relay.hub.encoding import SharedEncoder
from relay.protocols.seafile import codec
from relay.transports.websocket import frame_text

if TYPE_CHECKING:
    from relay.hub.recovery import Notice
    from relay.model import Channel, Event

_log = logging.getLogger(__name__)


class SeafileEncoder(SharedEncoder):
    """Events as the notification server sends them, but never in several frames."""

    door = "seafile"

    def event(self, event: Event) -> bytes:
        """One frame; said in the log where no real client can read it."""
        if codec.is_for_some(event):
            # Whoever appended it left out for whom it is.
            _log.warning("event %s of %s has no recipients: to nobody", event.id, event.channel)
            return b""
        text = codec.event_message(event)
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
