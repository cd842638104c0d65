"""Encoder of the Seafile protocol: an event is one text frame, the same for all clients."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from typing_extensions import override

from relay.hub.encoding import SharedEncoder
from relay.protocols.seafile import codec
from relay.transports.socket.websocket import frame_text

if TYPE_CHECKING:
    from relay.core.model import Channel, Event
    from relay.hub.recovery import Notice

_log = logging.getLogger(__name__)


class SeafileEncoder(SharedEncoder):
    """Encodes events as Seafile's server does, but never in several frames."""

    door = "seafile"

    @override
    def event(self, event: Event) -> bytes:
        # b"" means that clients of this protocol do not receive the event.
        if codec.is_for_some(event):
            # The program that appended the event has omitted its recipients.
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
                "Event %s on %s has %d bytes: sync clients read at most %d and ignore it",
                event.id,
                event.channel,
                len(text),
                codec.READABLE_BYTES,
            )
        return frame_text(text)

    @override
    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        # The protocol has no messages for missed events and lost rights.
        del channel, notice
        return None


SEAFILE = SeafileEncoder()
