"""Replies in the order of their frames: what one frame asked is answered together.

A subscription may stand before its reply can leave. Then the client must not be given anything
until it does, for what follows the reply may not come before it: `held` counts those.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relay.protocols.centrifugo import codec
from relay.protocols.centrifugo.commands import CentrifugoCommand
from relay.protocols.centrifugo.stats import Stats


class _FrameReplies:
    __slots__ = ("began", "held", "left", "replies")

    def __init__(self, count: int) -> None:
        self.replies = [b""] * count
        self.left = count
        self.held = 0
        self.began = time.perf_counter()


# Of who waits for nothing, as nearly everybody does: a deque of its own would be the largest part
# of an idle client. Nothing is ever put into it.
_NOTHING: deque[_FrameReplies] = deque(maxlen=0)


@dataclass(frozen=True, slots=True, eq=False)
class ReplySlot:
    """The place of one command's reply."""

    command: CentrifugoCommand
    batch: _FrameReplies
    index: int


class ReplyQueue:
    """What is still to be answered; `send` takes the JSON text of one frame's reply."""

    __slots__ = ("_batches", "_send", "_stats", "held")

    def __init__(self, send: Callable[[bytes], None], stats: Stats) -> None:
        self._send = send
        self._stats = stats
        self._batches = _NOTHING
        self.held = 0

    def expect(self, commands: Sequence[CentrifugoCommand], size_bytes: int) -> list[ReplySlot]:
        """The commands of the next frame, which is so large."""
        self._stats.asked(size_bytes)
        batch = _FrameReplies(len(commands))
        if not self._batches:
            self._batches = deque()
        self._batches.append(batch)
        return [ReplySlot(command, batch, index) for index, command in enumerate(commands)]

    def fill(self, slot: ReplySlot, reply: bytes, *, holds: bool = False) -> None:
        """One reply; sends what is complete. `holds`: nothing may come before it."""
        batch = slot.batch
        batch.replies[slot.index] = reply
        batch.left -= 1
        batch.held += holds
        self.held += holds
        while self._batches and not self._batches[0].left:
            done = self._batches.popleft()
            self.held -= done.held
            text = codec.batch(done.replies)
            self._send(text)
            self._stats.answered(len(text), time.perf_counter() - done.began)
        if not self._batches:
            self._batches = _NOTHING
