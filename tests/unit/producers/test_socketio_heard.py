"""A tap that takes over goes on exactly behind the mark of the one before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from producers.socketio_heard import Heard


def hear(payloads: list[bytes], first_ms: int = 0) -> Heard:
    heard = Heard()
    for number, payload in enumerate(payloads):
        heard.add(b"n", payload, first_ms + number)
    return heard


@given(
    st.lists(st.binary(max_size=2), min_size=1, max_size=60),
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(-3, 3),
)
def test_whoever_takes_over_begins_behind_the_mark(
    payloads: list[bytes], appended: int, late: int, skew_ms: int
) -> None:
    """Messages 1 s apart, so that even equal ones are told apart by when they came."""
    appended = max(1, min(appended, len(payloads)))
    holder, other = Heard(), Heard()
    for number, payload in enumerate(payloads):
        holder.add(b"n", payload, number * 1000)
        if number >= late:
            other.add(b"n", payload, number * 1000 + skew_ms)
    mark = holder.mark(appended)
    other.after(mark)
    rest = [message.payload for message in other.waiting(100)]
    if late < appended or late >= len(payloads):
        assert rest == payloads[max(appended, late) :]
    elif payloads[appended - 1] not in payloads[late:]:
        # It has listened only since: nothing of what it heard was appended.
        assert rest == payloads[late:]


def test_without_a_mark_all_that_was_heard_is_new() -> None:
    heard = hear([b"a", b"b"])
    heard.after(b"")
    assert [each.payload for each in heard.waiting(9)] == [b"a", b"b"]
    heard.after(b"nonsense")
    assert len(heard.waiting(9)) == 2


def test_what_waits_is_bounded_and_what_is_dropped_is_counted() -> None:
    heard = Heard(messages=3, limit_bytes=100)
    for _ in range(5):
        heard.add(b"n", b"x", 0)
    assert (heard.dropped, len(heard.waiting(9))) == (2, 3)
    heard.add(b"n", b"y" * 100, 0)
    assert [each.payload for each in heard.waiting(9)] == [b"y" * 100]
    assert heard.dropped == 5


def test_batches_go_on_where_the_last_one_ended() -> None:
    heard = hear([b"a", b"b", b"c"])
    assert [each.payload for each in heard.waiting(2)] == [b"a", b"b"]
    heard.next += 2
    assert [each.payload for each in heard.waiting(2)] == [b"c"]
