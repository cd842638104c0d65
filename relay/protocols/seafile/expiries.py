"""Expiry of library tokens: one timer for all clients of the protocol."""

from __future__ import annotations

import heapq
import itertools
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

    from relay.core.model import Channel


# Tokens that are processed in one turn of the loop. A client receives the tokens of all its
# libraries at about the same time, so that they expire together.
_PER_TURN = 100


class TokenHolder(Protocol):
    """A client with library tokens.

    `watched` belongs to `Expiries`: the time of the next check of each library.
    """

    __slots__ = ()

    watched: dict[Channel, int]

    def expires_at(self, channel: Channel) -> int | None:
        """Return the current expiry time of the library's token, None if it is not followed."""

    def expire(self, channel: Channel) -> None:
        """Handle the expiry of the library's token."""


class Expiries:
    """Calls `TokenHolder.expire` within a second after a token has expired.

    Each library of a holder has one queue entry, however often its token is renewed. It is checked
    when the first token would have expired, and queued again if the token was renewed meanwhile.
    """

    def __init__(
        self,
        loop: Callable[[], asyncio.AbstractEventLoop],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._loop = loop
        self._now = now
        self._due: list[tuple[int, int, weakref.ref[TokenHolder], Channel]] = []
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0

    def __len__(self) -> int:
        return len(self._due)

    def watch(self, holder: TokenHolder, channel: Channel, expires_at: int) -> None:
        """Watch a token of the library until `expires_at`."""
        if holder.watched.get(channel, expires_at + 1) <= expires_at:
            return
        holder.watched[channel] = expires_at
        entry = (expires_at, next(self._numbers), weakref.ref(holder), channel)
        heapq.heappush(self._due, entry)
        if self._timer is None or expires_at < self._timer_at:
            self._schedule()

    def expire_due(self) -> None:
        """Expire tokens that are due. Handles a limited number per call."""
        now = self._now()
        for _ in range(_PER_TURN):
            if not self._due or self._due[0][0] > now:
                break
            due, _, reference, channel = heapq.heappop(self._due)
            holder = reference()
            if holder is None or holder.watched.get(channel) != due:
                continue
            del holder.watched[channel]
            expires_at = holder.expires_at(channel)
            if expires_at is None:
                continue
            if expires_at <= now:
                holder.expire(channel)
            else:
                self.watch(holder, channel, expires_at)

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self._due[0][0]
        # Wait at most a minute, because the clock may be changed meanwhile.
        delay = min(60.0, max(0.0, self._timer_at - self._now()))
        self._timer = self._loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.expire_due()
        if self._due and self._timer is None:
            self._schedule()
