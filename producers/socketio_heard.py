"""What a tap has heard on pub/sub, and where another one that died had come to.

Messages on pub/sub have no ID, but all who listen hear the same ones in the same order. Whoever
appends them writes down, in that same step, a mark: the digests of the last few and when they
came. Whoever takes over finds that mark among what it has heard itself and begins behind it, so
that a hand-over loses and repeats nothing that a listener has heard.
"""

from __future__ import annotations

from collections import deque
from hashlib import blake2b
from typing import NamedTuple

_DIGEST_BYTES = 8
_DIGESTS = 16
_MESSAGES = 10_000
_BYTES = 32 << 20


class Message(NamedTuple):
    """One message, when it came (ms since the epoch) and its digest."""

    name: bytes
    payload: bytes
    at_ms: int
    digest: bytes


class Heard:
    """The last messages, in order. `next` is the number of the next one to append; `dropped` says
    how many were let go before anybody appended them."""

    def __init__(self, messages: int = _MESSAGES, limit_bytes: int = _BYTES) -> None:
        self._messages: deque[Message] = deque()
        self._first = 0
        self._bytes = 0
        self._most = messages
        self._limit_bytes = limit_bytes
        self.next = 0
        self.dropped = 0

    def add(self, name: bytes, payload: bytes, at_ms: int) -> None:
        """One more."""
        digest = blake2b(name + b"\0" + payload, digest_size=_DIGEST_BYTES).digest()
        self._messages.append(Message(name, payload, at_ms, digest))
        self._bytes += len(payload)
        while len(self._messages) > self._most or self._bytes > self._limit_bytes:
            self._bytes -= len(self._messages.popleft().payload)
            self._first += 1
        if self.next < self._first:
            self.dropped += self._first - self.next
            self.next = self._first

    def waiting(self, most: int) -> list[Message]:
        """The next ones."""
        start = self.next - self._first
        end = min(start + most, len(self._messages))
        return [self._messages[index] for index in range(start, end)]

    def mark(self, count: int) -> bytes:
        """The mark after `count` more."""
        end = self.next + count - self._first
        last = [self._messages[index] for index in range(max(0, end - _DIGESTS), end)]
        return b"%d:" % (last[-1].at_ms if last else 0) + b"".join(each.digest for each in last)

    def after(self, mark: bytes) -> None:
        """Go on behind `mark`. Where it is not found, nothing of what has been heard was appended:
        this tap has listened only since."""
        at, _, raw = mark.partition(b":")
        digests = [raw[i : i + _DIGEST_BYTES] for i in range(0, len(raw), _DIGEST_BYTES)]
        self.next = self._first
        if not digests or not at.isdigit():
            return
        messages = list(self._messages)
        found: tuple[int, int] | None = None
        for index, message in enumerate(messages):
            if message.digest != digests[-1]:
                continue
            mine = [each.digest for each in messages[max(0, index + 1 - len(digests)) : index + 1]]
            if mine == digests[-len(mine) :]:
                # The same message again and again: the one that came when the mark says.
                distance = abs(message.at_ms - int(at))
                if found is None or distance <= found[0]:
                    found = distance, index
        if found is not None:
            self.next = self._first + found[1] + 1
