"""Wait until the hub has decided about a new session's first subscriptions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from relay.core.errors import Unavailable

if TYPE_CHECKING:
    from relay.core.model import Channel

_DECISION_S = 10.0
NOT_READING = "streams cannot be read now"


class FirstSubscriptions:
    """The channels that a new session subscribes to, until the hub has decided about all."""

    __slots__ = ("_decided", "_undecided")

    def __init__(self) -> None:
        self._undecided: set[Channel] = set()
        self._decided: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def expect(self, channels: Iterable[Channel]) -> None:
        """Wait for decisions about these channels. Call this before subscribing."""
        self._undecided.update(channels)

    @property
    def is_waiting(self) -> bool:
        """True until all decisions are there, or `fail` was called."""
        return not self._decided.done()

    def decide(self, channel: Channel) -> None:
        """Note that the hub has decided about this subscription."""
        self._undecided.discard(channel)
        if not self._undecided and not self._decided.done():
            self._decided.set_result(None)

    def fail(self, error: Exception) -> None:
        """Let `wait` raise this error. Do nothing if it is over."""
        if not self._decided.done():
            self._decided.set_exception(error)
            # Mark the error as retrieved, because `wait` may not be called any more.
            self._decided.exception()

    async def wait(self) -> None:
        """Wait for the decisions. Raise the error of `fail`, or Unavailable after 10 s."""
        try:
            async with asyncio.timeout(_DECISION_S):
                await self._decided
        except TimeoutError:
            raise Unavailable(NOT_READING) from None
