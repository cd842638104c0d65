"""The cache of the application's answers."""

from __future__ import annotations

import pytest

from relay.core.model import Channel
from relay.rights.cache import Answers, Question


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def answers(clock: Clock) -> Answers:
    return Answers(limit=3, clock=clock)


def q(user: str, channel: str, *groups: str) -> Question:
    return Question(user, frozenset(groups), Channel(channel))


def test_both_answers_are_cached_until_they_expire(answers: Answers, clock: Clock) -> None:
    answers.put(q("a", "c"), True, 10)
    answers.put(q("b", "c"), False, 5)
    clock.now = 4.0
    assert answers.get(q("a", "c")) is True
    assert answers.get(q("b", "c")) is False
    assert answers.expires_in(q("a", "c")) == 6
    clock.now = 5.0
    assert answers.get(q("a", "c")) is True
    assert answers.get(q("b", "c")) is None
    assert answers.expires_in(q("b", "c")) is None
    assert len(answers) == 1


def test_other_groups_need_another_answer(answers: Answers) -> None:
    answers.put(q("a", "c", "staff"), True, 10)
    assert answers.get(q("a", "c")) is None


def test_a_time_of_zero_caches_nothing(answers: Answers) -> None:
    answers.put(q("a", "c"), True, 0)
    assert len(answers) == 0


def test_evicts_the_least_recently_used_answer(answers: Answers) -> None:
    for user in "abc":
        answers.put(q(user, "c"), True, 10)
    answers.get(q("a", "c"))
    answers.put(q("d", "c"), True, 10)
    assert [answers.get(q(user, "c")) for user in "abcd"] == [True, None, True, True]


def test_a_new_answer_replaces_the_old_one(answers: Answers) -> None:
    answers.put(q("a", "c"), True, 10)
    answers.put(q("a", "c"), False, 20)
    assert answers.get(q("a", "c")) is False
    assert answers.expires_in(q("a", "c")) == 20


@pytest.mark.parametrize(
    ("channel", "user", "left"),
    [
        ("c", None, [("a", "d")]),
        (None, "a", [("b", "c")]),
        ("c", "a", [("a", "d"), ("b", "c")]),
        ("x", None, [("a", "c"), ("a", "d"), ("b", "c")]),
        (None, "x", [("a", "c"), ("a", "d"), ("b", "c")]),
        (None, "", [("a", "c"), ("a", "d"), ("b", "c")]),
        (None, None, []),
    ],
)
def test_a_drop_removes_only_the_named_answers(
    answers: Answers, channel: str | None, user: str | None, left: list[tuple[str, str]]
) -> None:
    every = [("a", "c"), ("a", "d"), ("b", "c")]
    for pair in every:
        answers.put(q(*pair), True, 10)
    answers.drop(None if channel is None else Channel(channel), user)
    assert [pair for pair in every if answers.get(q(*pair))] == left


def test_the_indexes_are_empty_without_answers(answers: Answers, clock: Clock) -> None:
    for number in range(50):
        answers.put(q(f"u{number}", f"c{number % 7}"), True, 10)
    clock.now = 11.0
    for number in range(50):
        answers.get(q(f"u{number}", f"c{number % 7}"))
    assert len(answers) == len(answers._by_channel) == len(answers._by_user) == 0
