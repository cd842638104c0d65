"""Tokens of single libraries that run out: one timer for all clients of the door."""

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


# Tokens that are dealt with in one turn of the loop: a client gets those of all its libraries at
# about the same time.
_TURN = 100


class Holder(Protocol):
    """Who holds tokens. `watched` is for `Expiries` alone: when each library is looked at next."""

    watched: dict[Channel, int]

    def expires_at(self, channel: Channel) -> int | None:
        """When the library's token runs out, as it is now; None if it is not followed any more."""

    def expire(self, channel: Channel) -> None:
        """Its time is over."""


class Expiries:
    """Tells each holder within the second in which a token of its has run out.

    However often a token is renewed, or a library left and followed again, it has one place here:
    it is looked at when the first token would have run out, and again at the time that holds then.
    """

    def __init__(
        self,
        loop: Callable[[], asyncio.AbstractEventLoop],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._loop = loop
        self._now = now
        self._due: list[tuple[int, int, weakref.ref[Holder], Channel]] = []
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0

    def __len__(self) -> int:
        return len(self._due)

    def watch(self, holder: Holder, channel: Channel, expires_at: int) -> None:
        """The holder follows the library until then, unless it renews."""
        if holder.watched.get(channel, expires_at + 1) <= expires_at:
            return
        holder.watched[channel] = expires_at
        entry = (expires_at, next(self._numbers), weakref.ref(holder), channel)
        heapq.heappush(self._due, entry)
        if self._timer is None or expires_at < self._timer_at:
            self._schedule()

    def turn(self) -> None:
        """Tell those whose tokens have run out by now. If there are many, call it again."""
        now = self._now()
        for _ in range(_TURN):
            if not self._due or self._due[0][0] > now:
                break
            looked_at, _, reference, channel = heapq.heappop(self._due)
            holder = reference()
            if holder is None or holder.watched.get(channel) != looked_at:
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
        # The clock may be set meanwhile: never more than a minute is trusted.
        delay = min(60.0, max(0.0, self._timer_at - self._now()))
        self._timer = self._loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.turn()
        if self._due and self._timer is None:
            self._schedule()
