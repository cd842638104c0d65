"""Interfaces between a client's connection, its commands and its transport."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Protocol

from relay.hub.session import Outbox

if TYPE_CHECKING:
    from relay.core.connection import ConnectionInfo
    from relay.core.reasons import Reason
    from relay.hub.session import Session
    from relay.protocols.centrifugo.clients.reply_queue import ReplySlot


class FatalError(Exception):
    """Closes the connection. `codec.CLOSES` has v1's text for the reason."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class ClientTransport(Outbox, Protocol):
    """A WebSocket or a SockJS session."""

    def close_with(self, code: int, reason: str = "") -> None:
        """Close with a code and a reason after all pending data has been sent."""

    def abort(self) -> None:
        """Close immediately and drop pending data."""


class ReadControl(Protocol):
    """Flow control for data from the client."""

    def pause_reading(self) -> None:
        """Stop reading from the client."""

    def resume_reading(self) -> None:
        """Continue reading from the client."""


class CommandContext(Protocol):
    """The connection as its commands and subscriptions use it."""

    __slots__ = ("client", "pending", "session")

    # The connection's ID, a UUID.
    client: str
    session: Session | None
    # Number of commands that have started and have no reply yet.
    pending: int

    @property
    def closed(self) -> bool:
        """Whether the connection has been closed."""

    @property
    def transport_info(self) -> ConnectionInfo | None:
        """The network connection."""

    @property
    def user(self) -> str:
        """The user's ID, '' for anonymous and unauthenticated clients."""

    def is_subscribed(self, name: str) -> bool:
        """Return True if the client is subscribed to the channel."""

    def close(self, reason: Reason) -> None:
        """Close with v1's text for the reason."""

    def info(self, name: str) -> bytes:
        """Return the client's info for a channel, as pushes and presence contain it."""

    def run(self, command: Coroutine[object, object, None]) -> None:
        """Run a command that has to wait. It must call `answer` or raise FatalError."""

    def reply(self, slot: ReplySlot, body: bytes | None, error: str = "", advice: str = "") -> None:
        """Reply to a command that was not pending."""

    def answer(
        self,
        slot: ReplySlot,
        body: bytes,
        error: str = "",
        advice: str = "",
        *,
        holds: bool = False,
    ) -> None:
        """Reply to a pending command.

        With `holds`, no event is sent to the client before this reply.
        """
