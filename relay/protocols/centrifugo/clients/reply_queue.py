"""Replies in the order of their frames. All commands of one frame are answered together.

A subscription may become active before its reply can be sent. Events must not overtake that reply,
so the client receives no events in the meantime; `held` counts such replies.
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
    __slots__ = ("began", "held", "missing", "replies")

    def __init__(self, count: int) -> None:
        self.replies = [b""] * count
        self.missing = count
        self.held = 0
        self.began = time.perf_counter()


# Shared by all connections without pending frames, which are nearly all of them: a separate deque
# would be the largest part of an idle client. Nothing is ever appended to it.
_EMPTY: deque[_FrameReplies] = deque(maxlen=0)


@dataclass(frozen=True, slots=True, eq=False)
class ReplySlot:
    """A command and the position of its reply within the reply to the frame."""

    command: CentrifugoCommand
    frame: _FrameReplies
    index: int


class ReplyQueue:
    """Pending replies of one connection. `send` receives the JSON text for one frame."""

    __slots__ = ("_frames", "_send", "_stats", "held")

    def __init__(self, send: Callable[[bytes], None], stats: Stats) -> None:
        self._send = send
        self._stats = stats
        self._frames = _EMPTY
        self.held = 0

    def add_frame(self, commands: Sequence[CentrifugoCommand], size_bytes: int) -> list[ReplySlot]:
        """Return one slot for each command of the next frame, which has `size_bytes`."""
        self._stats.frame_received(size_bytes)
        frame = _FrameReplies(len(commands))
        if not self._frames:
            self._frames = deque()
        self._frames.append(frame)
        return [ReplySlot(command, frame, index) for index, command in enumerate(commands)]

    def fill(self, slot: ReplySlot, reply: bytes, *, holds: bool = False) -> None:
        """Store one reply and send all complete frames.

        With `holds`, the caller must not send events until `held` is 0 again.
        """
        frame = slot.frame
        frame.replies[slot.index] = reply
        frame.missing -= 1
        frame.held += holds
        self.held += holds
        while self._frames and not self._frames[0].missing:
            done = self._frames.popleft()
            self.held -= done.held
            text = codec.batch(done.replies)
            self._send(text)
            self._stats.reply_sent(len(text), time.perf_counter() - done.began)
        if not self._frames:
            self._frames = _EMPTY
