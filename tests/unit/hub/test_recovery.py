import pytest

from relay.core.model import ZERO_ID, EntryID, Position, StreamState
from relay.hub.recovery import judge

LIFE = 1 << 32 | 1
OTHER_LIFE = 2 << 32 | 1
# Markers are random: one in 65,536 pairs would be equal in its lower 16 bits.
SIMILAR_LIFE = 1 << 48 | LIFE
BEFORE_THE_FAILOVER = 1 << 32 | 2


def at(number: int) -> EntryID:
    return EntryID(number, 0)


def state(
    first: int | None,
    last: int,
    *,
    added: int,
    length: int,
    deleted: int = 0,
    failover: int | None = None,
) -> StreamState:
    return StreamState(
        exists=True,
        first=None if first is None else at(first),
        last=at(last),
        length=length,
        added=added,
        max_deleted=at(deleted),
        incarnation=LIFE,
        failover=None if failover is None else at(failover),
    )


WHOLE = state(1, 9, added=9, length=9)
TRIMMED = state(5, 9, added=9, length=5)
EMPTY = state(None, 9, added=9, length=0)
FAILED_OVER = state(1, 9, added=9, length=9, failover=6)
EMPTY_AGAIN = state(None, 0, added=0, length=0, failover=0)
NEW = state(5, 9, added=5, length=5)


@pytest.mark.parametrize(
    ("position", "stream", "own", "reason"),
    [
        # Rule 1: the stream contains the position, and no entry after it was deleted.
        (Position(at(4)), WHOLE, 7, None),
        (Position(at(12)), WHOLE, None, "position_ahead"),
        (Position(at(4)), state(1, 9, added=9, length=8, deleted=6), 7, "deleted"),
        (Position(at(6)), state(1, 9, added=9, length=8, deleted=6), None, None),
        # Rule 2: no entry after it was trimmed.
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
        (Position(at(4), 4, OTHER_LIFE, 7), WHOLE, 7, "other_incarnation"),
        (Position(at(4), 4, SIMILAR_LIFE, 7), WHOLE, None, "other_incarnation"),
        (Position(ZERO_ID, 0, OTHER_LIFE), WHOLE, None, "other_incarnation"),
        (Position(at(4)), NEW, None, "unknown_position"),
        # Rule 4: after a failover or restart, entries after the position may have been lost.
        (Position(at(4), 4, BEFORE_THE_FAILOVER, 7), FAILED_OVER, 7, "failover"),
        (Position(at(6), 6, BEFORE_THE_FAILOVER, 7), FAILED_OVER, 7, "failover"),
        (Position(at(4), 4, BEFORE_THE_FAILOVER, 7), FAILED_OVER, 8, "failover"),
        (Position(at(4), 4, BEFORE_THE_FAILOVER, 7), FAILED_OVER, None, "failover"),
        (Position(at(7), 7, BEFORE_THE_FAILOVER, 7), FAILED_OVER, None, "failover"),
        (Position(at(12), 12, BEFORE_THE_FAILOVER), FAILED_OVER, None, "position_ahead"),
        (Position(ZERO_ID, 0, BEFORE_THE_FAILOVER), FAILED_OVER, None, "failover"),
        (Position(ZERO_ID, 0, BEFORE_THE_FAILOVER), EMPTY_AGAIN, None, "failover"),
        (Position(at(4), 4, LIFE, 7), FAILED_OVER, 7, None),
        (Position(at(6)), FAILED_OVER, 7, "failover"),
        (Position(at(7)), FAILED_OVER, 7, None),
        (Position(ZERO_ID), FAILED_OVER, None, None),
        # A cursor of an earlier version, of a client that received an empty stream.
        (Position(ZERO_ID, 0), FAILED_OVER, None, "unknown_position"),
        (Position(at(12), 12, OTHER_LIFE), WHOLE, None, "position_ahead"),
        (Position(EntryID(4, 3)), WHOLE, None, "unknown_position"),
    ],
)
def test_a_position_is_whole_or_the_reason_is_told(
    position: Position, stream: StreamState, own: int | None, reason: str | None
) -> None:
    verdict = judge(position, stream, own)
    assert (verdict.notice and verdict.notice.reason) == reason


def test_after_another_life_a_client_begins_with_all_of_this_one() -> None:
    assert judge(Position(at(4), 4, OTHER_LIFE), WHOLE, None).resume == ZERO_ID
    assert judge(Position(at(12), 12, OTHER_LIFE), WHOLE, None).resume == ZERO_ID


def test_a_stream_that_lost_its_marker_in_a_failover_is_not_sent_again() -> None:
    other = OTHER_LIFE ^ LIFE ^ BEFORE_THE_FAILOVER
    for position, resume in ((4, 4), (12, 9)):
        verdict = judge(Position(at(position), position, other), WHOLE, None)
        assert verdict.notice
        assert (verdict.notice.kind, verdict.resume) == ("reset", at(resume))


def test_a_bare_position_ahead_goes_on_at_the_end() -> None:
    assert judge(Position(at(12)), WHOLE, None).resume == at(9)


def test_a_stream_that_is_gone_is_another_life() -> None:
    gone = StreamState(
        exists=False, first=None, last=ZERO_ID, length=0, added=0, max_deleted=ZERO_ID
    )
    verdict = judge(Position(at(4), 4, LIFE), gone, None)
    assert verdict.notice
    assert (verdict.notice.kind, verdict.resume) == ("reset", ZERO_ID)


@pytest.mark.parametrize(
    ("position", "stream", "to"),
    [
        # XADD 1 to 5, XDEL 4, resume after 2.
        (Position(at(2), 2, LIFE), state(1, 5, added=5, length=4, deleted=4), 4),
        (Position(at(2), 2, LIFE), state(5, 9, added=9, length=5), 5),
        (Position(at(2), 2, LIFE), state(7, 9, added=9, length=3, deleted=4), 7),
        (Position(at(2), 2, LIFE), state(None, 9, added=9, length=0, deleted=4), 9),
    ],
)
def test_a_gap_ends_after_all_that_is_missing(
    position: Position, stream: StreamState, to: int
) -> None:
    notice = judge(position, stream, 7).notice
    assert notice
    assert (notice.kind, notice.from_id, notice.to_id) == ("gap", at(2), at(to))


def test_a_place_before_a_failover_is_still_counted() -> None:
    """Later trims then cause no more false alarms than before."""
    assert judge(Position(at(4), 4, BEFORE_THE_FAILOVER, 7), FAILED_OVER, 7).counted
    assert not judge(Position(at(4), 4, BEFORE_THE_FAILOVER, 7), FAILED_OVER, 8).counted
