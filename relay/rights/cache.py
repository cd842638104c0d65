"""A cache of the application's answers, limited in time and number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from relay.core.model import Channel


class Question(NamedTuple):
    """The values that an answer depends on."""

    user: str
    groups: frozenset[str]
    channel: Channel


class Answers:
    """Stores at most `limit` answers, and evicts the least recently used one."""

    __slots__ = ("_by_channel", "_by_user", "_clock", "_held", "_limit")

    def __init__(self, *, limit: int, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._held: OrderedDict[Question, tuple[bool, float]] = OrderedDict()
        # Indexes, so that `drop` need not search 100,000 answers.
        self._by_channel: dict[str, set[Question]] = {}
        self._by_user: dict[str, set[Question]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def get(self, question: Question) -> bool | None:
        """Return the answer, or None if there is none or it has expired."""
        held = self._held.get(question)
        if held is None:
            return None
        if held[1] <= self._clock():
            self._remove(question)
            return None
        self._held.move_to_end(question)
        return held[0]

    def expires_in(self, question: Question) -> float | None:
        """Return the seconds until the answer expires, or None if there is none."""
        held = self._held.get(question)
        left = held[1] - self._clock() if held else 0.0
        return left if left > 0 else None

    def put(self, question: Question, answer: bool, hold_s: float) -> None:
        """Store the answer for `hold_s` seconds. 0 stores nothing."""
        if hold_s <= 0:
            return
        self._held[question] = answer, self._clock() + hold_s
        self._held.move_to_end(question)
        self._by_channel.setdefault(question.channel, set()).add(question)
        self._by_user.setdefault(question.user, set()).add(question)
        if len(self._held) > self._limit:
            self._remove(next(iter(self._held)))

    def drop(self, channel: Channel | None, user: str | None) -> None:
        """Remove the answers of this channel and user. None means every channel or user."""
        if channel is None and user is None:
            self._held.clear()
            self._by_channel.clear()
            self._by_user.clear()
            return
        found: set[Question]
        if channel is None:
            found = self._by_user.get(user or "", set())
        else:
            found = self._by_channel.get(channel, set())
        for question in list(found):
            if concerns(question, channel, user):
                self._remove(question)

    def _remove(self, question: Question) -> None:
        del self._held[question]
        for index, name in (
            (self._by_channel, question.channel),
            (self._by_user, question.user),
        ):
            questions = index[name]
            questions.discard(question)
            if not questions:
                del index[name]


def concerns(question: Question, channel: Channel | None, user: str | None) -> bool:
    """Return True if dropping this channel and user (None: all) removes this question."""
    return channel in (None, question.channel) and user in (None, question.user)
