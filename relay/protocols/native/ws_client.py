"""A WebSocket client of the hub: parses its commands and sends replies and errors. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from typing_extensions import override

from relay.core.errors import (
    ClientError,
    LimitExceeded,
    RelayError,
    Unauthorized,
    Unavailable,
)
from relay.core.reasons import Reason
from relay.doorkit.rate_limit import RateLimit
from relay.hub import cursor
from relay.hub.recovery import Notice
from relay.hub.session import Client
from relay.protocols.native import commands, encoders
from relay.transports.socket.websocket import frame_close, frame_text

if TYPE_CHECKING:
    from relay.core.model import Channel, Position
    from relay.doorkit.contract import DoorContext
    from relay.hub.session import Outbox, Session, Subscription
    from relay.protocols.native.settings import NativeSettings

# Codes of close frames.
CLOSES = {
    Reason.STOPPING: 1001,
    Reason.BAD_MESSAGE: 4400,
    Reason.UNAUTHORIZED: 4401,
    Reason.DISCONNECTED: 4403,
    Reason.NO_PONG: 4408,
    Reason.LIMIT_EXCEEDED: 4429,
}
_BAD_COMMANDS_ALLOWED = 3


class WsClient(Client):
    """Executes a client's commands in the hub and replies to them."""

    __slots__ = (
        "_bad",
        "_context",
        "_outbox",
        "_rate",
        "_refs",
        "_settings",
        "session",
    )

    def __init__(
        self, context: DoorContext, settings: NativeSettings, clock: Callable[[], float]
    ) -> None:
        self.session: Session | None = None
        self._context = context
        self._settings = settings
        self._outbox: Outbox | None = None
        self._refs: dict[Channel, commands.Ref] = {}
        self._bad = 0
        self._rate = RateLimit(settings.commands_per_s, settings.burst, clock)

    def attached(self, outbox: Outbox) -> None:
        """Set the socket to close, once the handshake is complete."""
        self._outbox = outbox

    # ---- from the client --------------------------------------------------------------------

    def on_text(self, text: bytes) -> None:
        """Execute one command. Reply to a malformed one; close after several."""
        session = self.session
        if session is None or session.closed:
            return
        if not self._rate.accept():
            self.close(Reason.LIMIT_EXCEEDED, LimitExceeded("too many commands"))
            return
        try:
            command = commands.parse_command(text)
        except commands.BadCommand as exc:
            self._send(encoders.error_object(exc, exc.ref, exc.channel))
            self._bad += 1
            if self._bad >= _BAD_COMMANDS_ALLOWED:
                self.close(Reason.BAD_MESSAGE)
            return
        channel = getattr(command, "channel", None)
        try:
            self._execute(session, command)
        except (ClientError, Unavailable) as exc:
            self._send(encoders.error_object(exc, command.ref, channel))

    def _execute(self, session: Session, command: commands.Command) -> None:
        hub = self._context.hub
        match command:
            case commands.SubscribeCommand():
                last = command.last_event_id
                positions = {} if last is None else cursor.decode(last, [command.channel])
                self.subscribe(command.channel, positions.get(command.channel), command.ref)
            case commands.UnsubscribeCommand():
                hub.unsubscribe(session, command.channel)
                self._refs.pop(command.channel, None)
                self._send(
                    encoders.reply_object("unsubscribe", command.ref, channel=command.channel)
                )
            case commands.RefreshCommand():
                principal = self._context.read_token(command.token)
                # With --insecure, access does not depend on the token.
                principal = replace(principal, unrestricted=session.principal.unrestricted)
                hub.change_principal(session, principal)
                self._send(encoders.reply_object("refresh", command.ref))
            case commands.PingCommand():
                self._send(encoders.reply_object("ping", command.ref))

    def subscribe(
        self, channel: Channel, position: Position | None, ref: commands.Ref = None
    ) -> None:
        """Start a subscription. The reply is sent by `subscribed` or `refused`."""
        session = self.session
        if session is None:
            return
        most = self._settings.channels_per_connection
        if len(session.subscriptions) + len(session.reserved) >= most:
            raise LimitExceeded(f"more than {most} channels on one connection")
        if problem := self._context.not_reading([channel]):
            raise Unavailable(problem)
        self._context.subscribe(session, channel, position)
        if ref is not None:
            self._refs[channel] = ref

    # ---- from the hub (relay.hub.session.Client) --------------------------------------------

    @override
    def subscribed(self, subscription: Subscription) -> None:
        channel = subscription.feed.channel
        at = cursor.encode([(channel, subscription.position)]).decode()
        ref = self._refs.pop(channel, None)
        self._send(encoders.reply_object("subscribe", ref, channel=channel, position=at))

    @override
    def refused(self, channel: Channel, error: RelayError) -> None:
        if isinstance(error, ClientError | Unavailable):
            self._context.metrics.rejected("native", error.code)
            self._send(encoders.error_object(error, self._refs.pop(channel, None), channel))

    @override
    def dropped(self, channel: Channel, notice: Notice) -> None:
        pass  # the notice was sent, and the connection may have other channels

    @override
    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        pass  # not called: the encoder encodes every notice

    @override
    def expired(self) -> None:
        self.close(Reason.UNAUTHORIZED, Unauthorized("the token has expired"))

    @override
    def disconnect(self, reason: Reason) -> None:
        if self.session is not None:
            self.session.offer(frame_text(encoders.notice_object("closing", reason=reason)))
        self.close(reason)

    def send_error(self, error: ClientError | Unavailable, channel: str | None) -> None:
        """Send an error about the query string, which has no `ref`."""
        self._send(encoders.error_object(error, None, channel))

    # ---- internals --------------------------------------------------------------------------

    def _send(self, payload: bytes) -> None:
        if self.session is not None:
            self.session.reply(frame_text(payload))

    def close(self, reason: Reason, error: ClientError | None = None) -> None:
        """Send the error, if any, end the session and close the connection."""
        session = self.session
        if session is None or session.closed:
            return
        if error is not None:
            session.offer(frame_text(encoders.error_object(error)))
        session.write_out()
        session.end(reason)
        if self._outbox is not None:
            text = str(error) if error else ""
            if reason == Reason.STOPPING:
                text = f"retry_ms={self._settings.next_retry_ms()}"
            self._outbox.close(frame_close(CLOSES[reason], text))
