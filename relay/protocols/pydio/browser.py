"""One browser on the public channel: at most one workspace at a time, and what is for everybody.

Nothing that a browser asks for is answered: a workspace that may not be read leaves everything as
it was (ws-server.php, `onMessage`). What it could not be told in time becomes an instruction to
read its folder again, since its protocol has no other words for that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from producers.private_channel import EVERYBODY, workspace
from relay.errors import ClientError, RelayError, Unavailable
from relay.protocols.pydio import codec
from relay.transports.websocket import frame_close, frame_text

if TYPE_CHECKING:
    import asyncio

    from relay.hub.recovery import Notice
    from relay.hub.session import Outbox, Session, Subscription
    from relay.model import Channel, Position
    from relay.protocols.pydio.accounts import Account

_log = logging.getLogger(__name__)

GOING_AWAY = 1001
POLICY = 1008
_CLOSES = {"stopping": GOING_AWAY}
# A page sends one message for each workspace that its user opens.
_MESSAGES_PER_S = 5.0
_MESSAGES_BURST = 50.0
_TRY_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a browser needs of the door; one object for all."""

    subscribe: Callable[[Session, Channel, Position | None], None]
    refused: Callable[[str], None]
    ask_again: Callable[[Account, Callable[[], None]], None]
    loop: asyncio.AbstractEventLoop


class Browser:
    """The registration's state machine; see `relay.hub.session.Client`."""

    __slots__ = (
        "_account",
        "_allowance",
        "_around",
        "_late",
        "_outbox",
        "_repository",
        "_seen_at",
        "_wish",
        "session",
    )

    def __init__(self, account: Account, around: Surroundings) -> None:
        self.session: Session | None = None
        self._account = account
        self._around = around
        self._outbox: Outbox | None = None
        # Where it is registered, or shall be as soon as streams can be read.
        self._repository: str | None = None
        # What it has asked for last and may not read; it may be granted yet.
        self._wish: str | None = None
        # Channels of which something may have been missed before the subscription stood.
        self._late: set[Channel] = set()
        self._allowance = _MESSAGES_BURST
        self._seen_at = around.loop.time()

    def attached(self, outbox: Outbox) -> None:
        """The handshake is done: what is for everybody is for it, registered or not."""
        self._outbox = outbox
        self._join(EVERYBODY)

    # ---- from the browser -------------------------------------------------------------------

    def on_text(self, text: bytes) -> None:
        """One message; what is none is ignored."""
        if self.session is None or self.session.closed:
            return
        if not self._within_rate():
            self.close(POLICY, "too many messages")
            return
        match codec.parse(text):
            case codec.Register(repository):
                self._register(repository)
            case codec.Unregister():
                self._wish = None
                self._move_to(None)
            case None:
                pass

    def _register(self, repository: str) -> None:
        self._wish = None
        if self._account.may_read(repository):
            self._move_to(repository)
            return
        # It may have been granted a moment ago: a page asks for what its own Pydio shows it.
        self._wish = repository
        self._around.ask_again(self._account, self._wish_decided)

    def _wish_decided(self) -> None:
        if self._wish is not None and not self._grant_wish():
            self._around.refused("forbidden")

    def _grant_wish(self) -> bool:
        wish, session = self._wish, self.session
        if wish is None or session is None or session.closed or not self._account.may_read(wish):
            return False
        self._wish = None
        self._move_to(wish)
        return True

    def _move_to(self, repository: str | None) -> None:
        if repository == self._repository:
            return
        if self._repository is not None:
            self._leave(workspace(self._repository))
        self._repository = repository
        if repository is not None:
            self._join(workspace(repository))

    # ---- subscriptions ----------------------------------------------------------------------

    def _join(self, channel: Channel, position: Position | None = None) -> None:
        session = self.session
        if session is None or session.closed or not self._wants(channel):
            return
        if channel in session.subscriptions or channel in session.reserved:
            return
        try:
            self._around.subscribe(session, channel, position)
        except Unavailable:
            self._join_later(channel)
        except ClientError as exc:
            self._around.refused(exc.code)

    def _join_later(self, channel: Channel) -> None:
        self._late.add(channel)
        self._around.loop.call_later(_TRY_AGAIN_S, self._join, channel)

    def _leave(self, channel: Channel) -> None:
        session = self.session
        self._late.discard(channel)
        if session is not None and (
            channel in session.subscriptions or channel in session.reserved
        ):
            session.hub.unsubscribe(session, channel)

    def _wants(self, channel: Channel) -> bool:
        if channel == EVERYBODY:
            return True
        return self._repository is not None and channel == workspace(self._repository)

    # ---- from the hub (relay.hub.session.Client) --------------------------------------------

    def subscribed(self, subscription: Subscription) -> None:
        """See `relay.hub.session.Client`."""
        channel = subscription.feed.channel
        if channel in self._late:
            self._late.discard(channel)
            subscription.session.reply(frame_text(codec.RELOAD_FOLDER))

    def refused(self, channel: Channel, error: RelayError) -> None:
        """Told by silence; where streams cannot be read now, it is tried again."""
        if isinstance(error, Unavailable):
            if self._wants(channel):
                self._join_later(channel)
            return
        if isinstance(error, ClientError):
            self._around.refused(error.code)
        self.dropped(channel, None)

    def dropped(self, channel: Channel, notice: Notice | None) -> None:
        """The registration is over; the notice has made the page read its workspaces again."""
        del notice
        self._late.discard(channel)
        if channel != EVERYBODY and self._wants(channel):
            self._repository = None

    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        """Never called: the format has words for every notice."""

    def expired(self) -> None:
        """Never called: an account has its own clock."""

    def disconnect(self, reason: str) -> None:
        """See `relay.hub.session.Client`."""
        self.close(_CLOSES.get(reason, POLICY), reason)

    # ---- from the account (relay.protocols.pydio.accounts.Member) ---------------------------

    def identity_changed(self, account: Account) -> None:
        """See `Member`."""
        session = self.session
        if session is None or session.closed:
            return
        if session.principal.groups != account.principal.groups:
            session.hub.change_principal(session, account.principal)
        encoder = codec.encoder_for(account.identity.masked)
        if encoder is not session.encoder:
            # Its place in each stream stays, so that nothing is missed or said twice.
            places = [
                (channel, subscription.position)
                for channel, subscription in session.subscriptions.items()
            ]
            for channel, _ in places:
                session.hub.unsubscribe(session, channel)
            session.encoder = encoder
            for channel, position in places:
                self._join(channel, position)
        self._grant_wish()

    def shut_out(self, reason: str) -> None:
        """See `Member`."""
        self.close(POLICY, reason)

    # ---- inner workings ---------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Say why, and leave the hub."""
        session = self.session
        if session is None or session.closed:
            return
        session.write_out()
        session.end()
        if self._outbox is not None:
            self._outbox.close(frame_close(code, reason))

    def _within_rate(self) -> bool:
        now = self._around.loop.time()
        earned = (now - self._seen_at) * _MESSAGES_PER_S
        self._seen_at = now
        self._allowance = min(_MESSAGES_BURST, self._allowance + earned) - 1
        return self._allowance >= 0
