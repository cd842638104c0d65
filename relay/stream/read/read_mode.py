"""Choose how streams are read: by consumer groups in transactions, or without them if rejected.

A Redis whose memory or disk is full rejects XREADGROUP and every command in a transaction. It also
rejects them if the user lacks these rights. XINFO and XRANGE still work. The worker then reads with
these two commands from its own position, so that delivery does not depend on relay's own writes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from relay.stream.connection.refusals import WRITES, Effect, Refusals, rule_of

if TYPE_CHECKING:
    from relay.core.stream_interface import Followed
    from relay.stream.connection.connect import CommandRefused

# Names of areas in `Refusals`.
GROUPS = "reads by consumer group"
READS = "reads of streams"

# Interval between attempts to read one stream by consumer group again.
_RETRY_S = {Effect.NO_WRITES: 2.0, Effect.NO_RIGHT: 30.0}
# Replies to XREADGROUP after the stream or the group was deleted.
_GONE = ("NOGROUP", "ERR no such key")


class ReadMode:
    """The mode of one worker, shared by all its reads, and the streams whose reads are paused."""

    def __init__(self, refusals: Refusals | None = None) -> None:
        self.plain = False
        # Redis refuses even plain reads.
        self.blocked = False
        self.refusals = refusals or Refusals()
        self.paused: dict[Followed, None] = {}
        # The last stream whose read was refused for a reason that concerns all streams.
        self.refused: Followed | None = None
        self._probe: Followed | None = None
        self._retry_s = 0.0
        self._retry_at = 0.0

    def is_plain_for(self, stream: Followed) -> bool:
        """Return True if the stream must be read without groups and transactions."""
        return self.plain and stream is not self._probe

    def is_gone(self, refusal: CommandRefused) -> bool:
        """Return True if the stream or the worker's group was deleted."""
        return refusal.reply.startswith(_GONE)

    def try_plain(self, refusal: CommandRefused, *, plain: bool) -> bool:
        """Switch to plain reads if that helps against this refusal of a read of the `plain` form.

        Return True if the read should be sent again at once.
        """
        effect = rule_of(refusal.reply).effect
        if plain or effect not in _RETRY_S:
            return False
        self._probe = None
        self._retry_s = _RETRY_S[effect]
        self._retry_at = time.monotonic() + self._retry_s
        self.plain = True
        self.refusals.refused(GROUPS, refusal.reply, "streams are read without consumer groups")
        return True

    def on_checked(self) -> None:
        """Read without transactions if the last check of rights found that they do not work."""
        if self._has_no_transactions() and not self.plain:
            self.plain = True
            self._probe = None
            self._retry_s = _RETRY_S[Effect.NO_RIGHT]
        elif self.plain and self._retry_s == _RETRY_S[Effect.NO_RIGHT]:
            # A right may have been granted.
            self._retry_at = 0.0

    def _has_no_transactions(self) -> bool:
        return self.refusals.lacks("multi") or self.refusals.lacks("exec")

    def pause(self, stream: Followed, refusal: CommandRefused) -> None:
        """Read this stream again later. An error of one key does not affect the others."""
        self.paused[stream] = None
        if rule_of(refusal.reply).effect is not Effect.ONE:
            self.refused = stream
            self.refusals.refused(READS, refusal.reply, "their events are not delivered")
            self.blocked = self.refusals.has(READS)

    def pop_paused(self) -> list[Followed]:
        """Return the paused streams and continue them. The caller reads them again."""
        paused, self.paused = list(self.paused), {}
        return paused

    def choose_probe(self, streams: Sequence[Followed]) -> Followed | None:
        """Return a stream to read by consumer group, if the interval has passed, else None."""
        if not self.plain or time.monotonic() < self._retry_at or self._has_no_transactions():
            return None
        self._retry_at = time.monotonic() + self._retry_s
        self._probe = random.choice(streams) if streams else None  # noqa: S311  # no secret
        return self._probe

    def on_read(self, *, plain: bool) -> bool:
        """Record a successful read of the `plain` form. Return True if plain reading ends."""
        if self.blocked:
            self.blocked = False
            self.refusals.accepted(READS)
        if plain or not self.plain:
            return False
        self.plain = False
        self._probe = None
        self.refusals.accepted(GROUPS)
        self.refusals.accepted(WRITES)
        return True
