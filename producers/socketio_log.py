"""Recent pub/sub messages, and the position up to which they were appended.

Pub/sub messages have no ID, but all listeners receive the same messages in the same order. The
listener that appends them stores a mark in the same step: the digests of the last messages and the
time of the last one. A listener that takes over finds that mark in its own log and continues after
it. So a change of the appending listener neither loses nor repeats a message that was received.
"""

from __future__ import annotations

import secrets
from collections import deque
from hashlib import blake2b
from typing import NamedTuple

_DIGEST_BYTES = 8
_DIGESTS = 16
# Together with the character before them these are no multiple of the size of a digest.
_COUNT_DIGITS = 19
_MESSAGES = 10_000
_BYTES = 32 << 20


class Message(NamedTuple):
    """One message with its time of arrival (ms since the epoch) and its digest."""

    name: bytes
    payload: bytes
    at_ms: int
    digest: bytes


def with_count(mark: bytes, count: int) -> bytes:
    """Return the mark with the number of all messages up to it, which gives each an identity."""
    return b"%s;%0*d" % (mark, _COUNT_DIGITS, count)


def split_count(mark: bytes) -> tuple[bytes, int | None]:
    """Return a mark of `with_count` without its number, and the number. None if it has none.

    The digests of a mark may contain any bytes. Its length says whether there is a number.
    """
    head, colon, digests = mark.partition(b":")
    after_head = digests if colon else head
    own, digits = mark[: -_COUNT_DIGITS - 1], mark[-_COUNT_DIGITS:]
    if len(after_head) % _DIGEST_BYTES != (_COUNT_DIGITS + 1) % _DIGEST_BYTES:
        return mark, None
    return (own, int(digits)) if digits.isdigit() else (mark, None)


def first_count() -> int:
    """Return the number to begin with if the mark has none.

    The numbers that were in use before the mark was lost, if there were any, are not used again.
    """
    return secrets.randbits(62)


class PubSubLog:
    """The latest messages, in order. `next` is the number of the next one to append, and `dropped`
    counts the messages that were removed before they were appended."""

    def __init__(self, messages: int = _MESSAGES, limit_bytes: int = _BYTES) -> None:
        self._messages: deque[Message] = deque()
        self._first = 0
        self._bytes = 0
        self._limit_messages = messages
        self._limit_bytes = limit_bytes
        self.next = 0
        self.dropped = 0

    def add(self, name: bytes, payload: bytes, at_ms: int) -> None:
        """Append a message, and drop the oldest ones if the log exceeds its limits."""
        digest = blake2b(name + b"\0" + payload, digest_size=_DIGEST_BYTES).digest()
        self._messages.append(Message(name, payload, at_ms, digest))
        self._bytes += len(payload)
        while len(self._messages) > self._limit_messages or self._bytes > self._limit_bytes:
            self._bytes -= len(self._messages.popleft().payload)
            self._first += 1
        if self.next < self._first:
            self.dropped += self._first - self.next
            self.next = self._first

    def pending(self, most: int) -> list[Message]:
        """Return up to `most` messages from `next` on."""
        start = self.next - self._first
        end = min(start + most, len(self._messages))
        return [self._messages[index] for index in range(start, end)]

    def mark(self, count: int) -> bytes:
        """Return the mark of the position after the next `count` messages."""
        end = self.next + count - self._first
        last = [self._messages[index] for index in range(max(0, end - _DIGESTS), end)]
        return b"%d:" % (last[-1].at_ms if last else 0) + b"".join(each.digest for each in last)

    def resume_after(self, mark: bytes) -> None:
        """Set `next` to the position of `mark`. If the mark is not in the log, this listener began
        to listen after it, so that none of its messages was appended."""
        self.next = self._first
        if (following := self._after(mark)) is not None:
            self.next = following

    def forget(self, mark: bytes, before_ms: int) -> None:
        """Remove the messages from before `before_ms` that were appended up to `mark`.

        The mark can still be found afterwards, and so can later ones.
        """
        if not self._messages or self._messages[0].at_ms >= before_ms:
            return
        following = self._after(mark) or 0
        while self._first < following - _DIGESTS and self._messages[0].at_ms < before_ms:
            self._bytes -= len(self._messages.popleft().payload)
            self._first += 1
        self.next = max(self.next, self._first)

    def _after(self, mark: bytes) -> int | None:
        """Return the number of the message after the mark, or None if it is not in the log."""
        at, _, raw = mark.partition(b":")
        digests = [raw[i : i + _DIGEST_BYTES] for i in range(0, len(raw), _DIGEST_BYTES)]
        if not digests or not at.isdigit():
            return None
        messages = list(self._messages)
        found: tuple[int, int] | None = None
        for index, message in enumerate(messages):
            if message.digest != digests[-1]:
                continue
            own = [each.digest for each in messages[max(0, index + 1 - len(digests)) : index + 1]]
            if own == digests[-len(own) :]:
                # Equal messages: take the one whose time of arrival is nearest to the mark's.
                distance = abs(message.at_ms - int(at))
                if found is None or distance <= found[0]:
                    found = distance, index
        return None if found is None else self._first + found[1] + 1
