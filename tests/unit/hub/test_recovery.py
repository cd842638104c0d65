import pytest

from relay.hub.recovery import incarnation_of, judge
from relay.model import ZERO_ID, EntryID, Position, StreamState

LIFE = incarnation_of(1, b"primary")
OTHER_LIFE = incarnation_of(2, b"primary")
FAILED_OVER = incarnation_of(1, b"replica")


def at(number: int) -> EntryID:
    return EntryID(number, 0)


def state(
    first: int | None, last: int, *, added: int, length: int, deleted: int = 0
) -> StreamState:
    return StreamState(
        exists=True,
        first=None if first is None else at(first),
        last=at(last),
        length=length,
        added=added,
        max_deleted=at(deleted),
    )


WHOLE = state(1, 9, added=9, length=9)
TRIMMED = state(5, 9, added=9, length=5)
EMPTY = state(None, 9, added=9, length=0)


@pytest.mark.parametrize(
    ("position", "stream", "own", "reason"),
    [
        # Rule 1: the stream holds the position, and nothing after it was deleted.
        (Position(at(4)), WHOLE, 7, None),
        (Position(at(12)), WHOLE, None, "position_ahead"),
        (Position(at(4)), state(1, 9, added=9, length=8, deleted=6), 7, "deleted"),
        (Position(at(6)), state(1, 9, added=9, length=8, deleted=6), None, None),
        # Rule 2: nothing after it was trimmed.
        (Position(at(2), 2, LIFE), TRIMMED, None, "trimmed"),
        (Position(at(4), 4, LIFE), TRIMMED, None, None),
        (Position(at(4)), TRIMMED, None, "trimmed"),
        (Position(at(9), 9, LIFE), EMPTY, None, None),
        (Position(at(8), 8, LIFE), EMPTY, None, "trimmed"),
        (Position(ZERO_ID), WHOLE, None, None),
        (Position(ZERO_ID), TRIMMED, None, "trimmed"),
        # Rule 3: the same life, or the position's own entry.
        (Position(at(4), 4, OTHER_LIFE, 7), WHOLE, None, "other_incarnation"),
        (Position(at(4), 4, OTHER_LIFE, 7), WHOLE, 8, "other_incarnation"),
        (Position(at(4), 4, FAILED_OVER, 7), WHOLE, 7, None),
        (Position(at(4), 4, FAILED_OVER, 7), WHOLE, 8, "failover"),
        (Position(at(4), 4, FAILED_OVER, 7), WHOLE, None, "failover"),
        (Position(ZERO_ID, 0, FAILED_OVER), WHOLE, None, None),
        (Position(ZERO_ID, 0, OTHER_LIFE), WHOLE, None, "other_incarnation"),
        (Position(at(12), 12, OTHER_LIFE), WHOLE, None, "position_ahead"),
        (Position(EntryID(4, 3)), WHOLE, None, "unknown_position"),
    ],
)
def test_a_position_is_whole_or_the_reason_is_told(
    position: Position, stream: StreamState, own: int | None, reason: str | None
) -> None:
    verdict = judge(position, stream, LIFE, own)
    assert (verdict.notice and verdict.notice.reason) == reason


def test_after_another_life_a_client_begins_with_all_of_this_one() -> None:
    assert judge(Position(at(4), 4, OTHER_LIFE), WHOLE, LIFE, None).resume == ZERO_ID
    assert judge(Position(at(12), 12, OTHER_LIFE), WHOLE, LIFE, None).resume == ZERO_ID


def test_a_bare_position_ahead_goes_on_at_the_end() -> None:
    assert judge(Position(at(12)), WHOLE, LIFE, None).resume == at(9)


def test_a_stream_that_is_gone_is_another_life() -> None:
    gone = StreamState(
        exists=False, first=None, last=ZERO_ID, length=0, added=0, max_deleted=ZERO_ID
    )
    verdict = judge(Position(at(4), 4, LIFE), gone, LIFE, None)
    assert verdict.notice
    assert (verdict.notice.kind, verdict.resume) == ("reset", ZERO_ID)
