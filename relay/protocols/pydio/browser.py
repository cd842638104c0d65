"""A browser of the phpws kind: a plain websocket without replies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from relay.core.reasons import Reason
from relay.protocols.pydio import codec
from relay.protocols.pydio.registration import BrowserServices, Registration
from relay.transports.socket.websocket import frame_close, frame_text

if TYPE_CHECKING:
    from relay.hub.session import Encoder, Outbox
    from relay.protocols.pydio.accounts import Account

GOING_AWAY = 1001
POLICY = 1008
# Code and text of the close frame.
CLOSES = {
    Reason.STOPPING: (GOING_AWAY, "stopping"),
    Reason.DISCONNECTED: (POLICY, "disconnected"),
    Reason.NO_PONG: (GOING_AWAY, "no response to pings"),
    Reason.LIMIT_EXCEEDED: (POLICY, "too many messages"),
    Reason.EXPIRED: (POLICY, "Pydio session expired"),
    Reason.OTHER_USER: (POLICY, "another user has logged in"),
    Reason.UNAVAILABLE: (POLICY, "Pydio is unavailable"),
}


class Browser(Registration):
    """The plain websocket's side of a registration."""

    __slots__ = ("_outbox",)

    def __init__(self, account: Account, services: BrowserServices) -> None:
        super().__init__(account, services)
        self._outbox: Outbox | None = None

    def attached(self, outbox: Outbox) -> None:
        """Subscribe to broadcasts, because the handshake is complete."""
        self._outbox = outbox
        self.join_broadcast()

    def on_text(self, text: bytes) -> None:
        """Handle one message. Ignore it if it is malformed."""
        if not self.is_open:
            return
        if not self.within_rate():
            self.disconnect(Reason.LIMIT_EXCEEDED)
            return
        match codec.parse(text):
            case codec.Register(requested):
                # phpws compares IDs loosely: it ignores white space around an ID, unless it is part
                # of the ID.
                known = self.account.may_read(requested)
                self.register(requested if known else requested.strip())
            case codec.Unregister():
                self.unregister()
            case None:
                pass

    @override
    def encoder(self, masked: frozenset[str]) -> Encoder:
        return codec.encoder_for(masked)

    @override
    def send_content(self, content: bytes) -> None:
        if self.session is not None:
            self.session.reply(frame_text(content))

    @override
    def disconnect(self, reason: Reason) -> None:
        session = self.session
        if session is None or session.closed:
            return
        session.write_out()
        session.end(reason)
        if self._outbox is not None:
            self._outbox.close(frame_close(*CLOSES[reason]))
