"""A listener that takes over continues exactly after its predecessor's mark."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from producers.socketio_log import PubSubLog, split_count, with_count


def log_of(payloads: list[bytes]) -> PubSubLog:
    log = PubSubLog()
    for number, payload in enumerate(payloads):
        log.add(b"n", payload, number)
    return log


@given(
    st.lists(st.binary(max_size=2), min_size=1, max_size=60),
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(-3, 3),
)
def test_a_listener_that_takes_over_continues_after_the_mark(
    payloads: list[bytes], appended: int, late: int, skew_ms: int
) -> None:
    """The messages are 1 s apart, so that equal ones differ in their time of arrival."""
    appended = max(1, min(appended, len(payloads)))
    holder, other = PubSubLog(), PubSubLog()
    for number, payload in enumerate(payloads):
        holder.add(b"n", payload, number * 1000)
        if number >= late:
            other.add(b"n", payload, number * 1000 + skew_ms)
    mark = holder.mark(appended)
    other.resume_after(mark)
    rest = [message.payload for message in other.pending(100)]
    if late < appended or late >= len(payloads):
        assert rest == payloads[max(appended, late) :]
    elif payloads[appended - 1] not in payloads[late:]:
        # It began to listen after the mark, so that none of its messages was appended.
        assert rest == payloads[late:]


def test_without_a_mark_all_messages_are_pending() -> None:
    log = log_of([b"a", b"b"])
    log.resume_after(b"")
    assert [each.payload for each in log.pending(9)] == [b"a", b"b"]
    log.resume_after(b"nonsense")
    assert len(log.pending(9)) == 2


def test_the_log_is_bounded_and_counts_dropped_messages() -> None:
    log = PubSubLog(messages=3, limit_bytes=100)
    for _ in range(5):
        log.add(b"n", b"x", 0)
    assert (log.dropped, len(log.pending(9))) == (2, 3)
    log.add(b"n", b"y" * 100, 0)
    assert [each.payload for each in log.pending(9)] == [b"y" * 100]
    assert log.dropped == 5


def test_a_batch_begins_after_the_previous_one() -> None:
    log = log_of([b"a", b"b", b"c"])
    assert [each.payload for each in log.pending(2)] == [b"a", b"b"]
    log.next += 2
    assert [each.payload for each in log.pending(2)] == [b"c"]


def test_appended_messages_are_forgotten_after_a_time() -> None:
    appending, listening = PubSubLog(), PubSubLog()
    for number in range(1000):
        for log in (appending, listening):
            log.add(b"room", b"%d" % number, number)
    mark = appending.mark(900)
    appending.next = 900
    for log in (appending, listening):
        # The newest 400 are not old enough, and the others were appended.
        log.forget(mark, 600)
        assert log.pending(1)[0].payload == (b"900" if log is appending else b"600")
        log.forget(mark, 2000)
        assert log.dropped == 0
        log.resume_after(mark)
        assert [each.payload for each in log.pending(1000)] == [b"%d" % n for n in range(900, 1000)]
    empty = PubSubLog()
    empty.forget(mark, 2000)
    empty.add(b"room", b"new", 1)
    empty.forget(mark, 2000)
    assert [each.payload for each in empty.pending(10)] == [b"new"]


@given(st.lists(st.binary(min_size=8, max_size=8), max_size=16), st.integers(0, 2**63))
def test_a_mark_with_or_without_a_count_is_read(digests: list[bytes], count: int) -> None:
    for mark in (b"", b"1700000000000:" + b"".join(digests)):
        assert split_count(mark) == (mark, None)
        assert split_count(with_count(mark, count)) == (mark, count)


def test_a_digest_may_look_like_a_count() -> None:
    for end in (b";1234567", b"abcdef;1", b"1;234567" + b"1" * 16):
        mark = b"1700000000000:" + end
        assert split_count(mark) == (mark, None)
