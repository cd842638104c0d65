"""A browser of the phpws kind: texts in, contents out, and never an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.core.reasons import Reason
from relay.protocols.pydio import codec
from relay.protocols.pydio.registration import Registration, Surroundings
from relay.transports.socket.websocket import frame_close, frame_text

if TYPE_CHECKING:
    from relay.hub.session import Encoder, Outbox
    from relay.protocols.pydio.accounts import Account

GOING_AWAY = 1001
POLICY = 1008
_CLOSES = {Reason.STOPPING: GOING_AWAY}


class Browser(Registration):
    """The plain websocket's side of a registration."""

    __slots__ = ("_outbox",)

    def __init__(self, account: Account, around: Surroundings) -> None:
        super().__init__(account, around)
        self._outbox: Outbox | None = None

    def attached(self, outbox: Outbox) -> None:
        """The handshake is done."""
        self._outbox = outbox
        self.begin()

    def on_text(self, text: bytes) -> None:
        """One message; what is none is ignored."""
        if not self.alive:
            return
        if not self.within_rate():
            self._close(POLICY, "too many messages")
            return
        match codec.parse(text):
            case codec.Register(asked):
                # phpws compares loosely, so white space around an ID counts only if it is part of
                # the ID.
                self.register(asked if self.account.may_read(asked) else asked.strip())
            case codec.Unregister():
                self.unregister()
            case None:
                pass

    def encoder(self, masked: frozenset[str]) -> Encoder:
        """See `Registration`."""
        return codec.encoder_for(masked)

    def say(self, content: bytes) -> None:
        """See `Registration`."""
        if self.session is not None:
            self.session.reply(frame_text(content))

    def shut_out(self, reason: str) -> None:
        """See `Registration`."""
        self._close(POLICY, reason)

    def disconnect(self, reason: Reason) -> None:
        """See `Registration`."""
        self._close(_CLOSES.get(reason, POLICY), reason)

    def _close(self, code: int, reason: str) -> None:
        session = self.session
        if session is None or session.closed:
            return
        session.write_out()
        session.end()
        if self._outbox is not None:
            self._outbox.close(frame_close(code, reason))
