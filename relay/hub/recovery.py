"""Decide whether a replay is complete, and which notice a client receives if it is not.

The decision uses one snapshot of the stream (XINFO, read together with the entries). It may be a
false alarm, but a loss is always reported. Redis does not report two kinds of loss:

* Trimming: `max-deleted-entry-id` stays 0-0 after XTRIM, so the rule counts entries instead
  (`entries-added` against length).
* Loss of acknowledged entries by a failover or restart. The stream stores the position where this
  may have happened (`StreamState.failover`). An earlier position is valid only if it is of the
  stream's present history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from relay.core.model import ZERO_ID, EntryID, Position, StreamState
from relay.core.reasons import Reason

# The part of an incarnation that names the replication history, see `relay.stream.read.groups`.
_HISTORY = (1 << 32) - 1
NoticeKind = Literal["gap", "reset", "revoked", "closing"]


@dataclass(frozen=True, slots=True)
class Notice:
    """Notice to a client that events after `from_id` up to `to_id` are missing or not readable.

    `position` is the position from which a client resumes that has received the notice. None if the
    notice does not change it.
    """

    kind: NoticeKind
    reason: Reason
    from_id: EntryID | None = None
    to_id: EntryID | None = None
    position: Position | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of `judge`: delivery continues after `resume`. `notice` is None if nothing is missing.

    `counted` is True if the stream up to the position contains what the client has received, so
    that the position's `added` is still valid.
    """

    resume: EntryID
    notice: Notice | None = None
    counted: bool = False


def judge(position: Position, state: StreamState, own_digest: int | None) -> Verdict:
    """Decide whether all entries after `position` are still in the stream.

    `own_digest` is the digest of the entry with the position's ID, or None if it does not exist.
    """
    at = position.id
    same_life = same_history = False
    if position.incarnation is not None:
        if state.incarnation is not None:
            same_life = position.incarnation >> 32 == state.incarnation >> 32
            same_history = position.incarnation == state.incarnation
    elif at == ZERO_ID and position.added is None:
        # From the beginning: the client has not received entries of another life.
        same_life = same_history = True
    if not state.exists:
        return _reset(Reason.OTHER_INCARNATION, at, ZERO_ID)
    if at > state.last:
        new_life = is_replaced(position, state)
        return _reset(Reason.POSITION_AHEAD, at, ZERO_ID if new_life else state.last)

    own_exists = own_digest is not None and position.digest in (None, own_digest)
    # A position at the beginning has no own entry to check. The marker group survives a failover.
    nothing_seen = at == ZERO_ID and same_life
    # 0-0 means no deletion. It is equal to a position at the beginning in every new life, so it
    # proves nothing.
    own_deleted = at == state.max_deleted and at != ZERO_ID
    if not (same_history or own_exists or nothing_seen or own_deleted):
        if position.incarnation is not None and not same_life:
            new_life = is_replaced(position, state)
            return _reset(Reason.OTHER_INCARNATION, at, ZERO_ID if new_life else at)
        if position.incarnation is not None:
            return _reset(Reason.FAILOVER, at, at)
        if (state.first is None or at < state.first) and state.added != state.length:
            return _gap(Reason.TRIMMED, at, state)
        if state.max_deleted > at:
            return _gap(Reason.DELETED, at, state)
        # No entry was ever removed, so the position is of another stream with this name.
        return _reset(Reason.UNKNOWN_POSITION, at, at)
    if position.incarnation is not None and not same_life:
        # Its own entry exists, but a failover may have lost the marker and later entries.
        return Verdict(at, Notice("reset", Reason.OTHER_INCARNATION, at, at), counted=own_exists)
    if not same_history and may_have_lost(at, state):
        # Entries that were appended after it before the failover may be lost.
        return Verdict(at, Notice("reset", Reason.FAILOVER, at, at), counted=own_exists)
    if state.max_deleted > at:
        return _gap(Reason.DELETED, at, state)
    if not untrimmed(position, state):
        return _gap(Reason.TRIMMED, at, state)
    return Verdict(at, counted=True)


def is_replaced(position: Position, state: StreamState) -> bool:
    """Return True if the stream was deleted and created again, so that all its entries are new.

    A failover or restart may instead have lost the marker of the same stream, together with its
    newest entries. The client has already received the entries up to its position then, and they
    must not be sent again. Only a stream of the same replication history is known to be new.
    """
    if position.incarnation is None or state.incarnation is None:
        return False
    other_life = position.incarnation >> 32 != state.incarnation >> 32
    return other_life and (position.incarnation ^ state.incarnation) & _HISTORY == 0


def may_have_lost(at: EntryID, state: StreamState) -> bool:
    """Return True if a failover or restart may have lost entries after `at`.

    Does not apply to positions of the stream's present history.
    """
    return state.failover is not None and at <= state.failover


def untrimmed(position: Position, state: StreamState) -> bool:
    """Return True if no entry after the position was trimmed."""
    added = 0 if position.id == ZERO_ID and position.added is None else position.added
    if state.first is None:
        return state.added == added if added is not None else position.id == state.last
    if position.id >= state.first:
        return True
    if position.id == state.last:
        return True
    return added is not None and state.added - added == state.length


def gap(reason: Reason, at: EntryID, state: StreamState, next_id: EntryID | None = None) -> Notice:
    """Return the notice that entries after `at` were removed.

    `next_id` is the next entry that is known to exist, by default the stream's first one.
    """
    return Notice("gap", reason, at, max(next_id or state.first or state.last, state.max_deleted))


def _gap(reason: Reason, at: EntryID, state: StreamState) -> Verdict:
    return Verdict(at, gap(reason, at, state))


def _reset(reason: Reason, at: EntryID, resume: EntryID) -> Verdict:
    return Verdict(resume, Notice("reset", reason, at, resume))


def before(entry_id: EntryID) -> EntryID:
    """Return the greatest ID below `entry_id`."""
    if entry_id.seq:
        return EntryID(entry_id.ms, entry_id.seq - 1)
    return EntryID(entry_id.ms - 1, 2**64 - 1) if entry_id.ms else ZERO_ID


def added_before_first(state: StreamState) -> int:
    """Return how many entries were added before the first one that still exists."""
    return state.added - state.length
