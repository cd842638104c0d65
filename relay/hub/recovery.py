"""When a replay is complete, and which notice a client receives if it is not.

The rule is judged on one snapshot of the stream (XINFO, taken together with the entries). It may
raise a false alarm; it is never silent about a loss. Two kinds of loss leave no trace in Redis:

* Trimming: `max-deleted-entry-id` stays 0-0 after XTRIM, so the rule counts entries instead
  (`entries-added` against length).
* Acknowledged entries that a failover or a restart lost. The stream stores where this may have
  happened (`StreamState.failover`); a position up to there is safe only if it is of the stream's
  present history.
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
    """What a client may have missed on one channel: something after `from_id`, up to `to_id`.

    `position` is where a client that has received the notice resumes. None: where it was.
    """

    kind: NoticeKind
    reason: Reason
    from_id: EntryID | None = None
    to_id: EntryID | None = None
    position: Position | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Delivery goes on after `resume`; `notice` is None if nothing can be missing.

    `counted`: what is in the stream up to the position is what the client has seen, so that the
    position's `added` still counts.
    """

    resume: EntryID
    notice: Notice | None = None
    counted: bool = False


def judge(position: Position, state: StreamState, own_digest: int | None) -> Verdict:
    """Whether everything after `position` is still in the stream.

    `own_digest` is the content digest of the entry at the position's ID, None where there is no
    such entry.
    """
    at = position.id
    same_life = same_history = False
    if position.incarnation is not None:
        if state.incarnation is not None:
            same_life = position.incarnation >> 32 == state.incarnation >> 32
            same_history = position.incarnation == state.incarnation
    elif at == ZERO_ID and position.added is None:
        # "From the beginning": nothing has been seen, so nothing of another life either.
        same_life = same_history = True
    if not state.exists:
        return _reset(Reason.OTHER_INCARNATION, at, ZERO_ID)
    if at > state.last:
        new_life = is_replaced(position, state)
        return _reset(Reason.POSITION_AHEAD, at, ZERO_ID if new_life else state.last)

    own_there = own_digest is not None and position.digest in (None, own_digest)
    # An empty past cannot be checked by its own entry; the marker group survives a failover.
    nothing_seen = at == ZERO_ID and same_life
    # No deletion stands at 0-0: there the two are equal in every new life, and would hide that
    # what was appended in the old one is gone.
    own_deleted = at == state.max_deleted and at != ZERO_ID
    if not (same_history or own_there or nothing_seen or own_deleted):
        if position.incarnation is not None and not same_life:
            new_life = is_replaced(position, state)
            return _reset(Reason.OTHER_INCARNATION, at, ZERO_ID if new_life else at)
        if position.incarnation is not None:
            return _reset(Reason.FAILOVER, at, at)
        if (state.first is None or at < state.first) and state.added != state.length:
            return _gap(Reason.TRIMMED, at, state)
        if state.max_deleted > at:
            return _gap(Reason.DELETED, at, state)
        # Nothing was ever removed here, so the position is of another stream of this name.
        return _reset(Reason.UNKNOWN_POSITION, at, at)
    if position.incarnation is not None and not same_life:
        # Its own entry is there, but a failover may have lost the marker, and what followed it.
        return Verdict(at, Notice("reset", Reason.OTHER_INCARNATION, at, at), counted=own_there)
    if not same_history and may_have_lost(at, state):
        # What was appended after it before the failover may be gone, whatever is there now.
        return Verdict(at, Notice("reset", Reason.FAILOVER, at, at), counted=own_there)
    if state.max_deleted > at:
        return _gap(Reason.DELETED, at, state)
    if not untrimmed(position, state):
        return _gap(Reason.TRIMMED, at, state)
    return Verdict(at, counted=True)


def is_replaced(position: Position, state: StreamState) -> bool:
    """Return True if the stream was deleted and made anew, so that all its entries are new.

    A failover or restart may instead have lost the marker of the same stream, together with its
    newest entries. The client has already received the entries up to its position then, and they
    must not be sent again. Only a stream of the same replication history is known to be new.
    """
    if position.incarnation is None or state.incarnation is None:
        return False
    other_life = position.incarnation >> 32 != state.incarnation >> 32
    return other_life and (position.incarnation ^ state.incarnation) & _HISTORY == 0


def may_have_lost(at: EntryID, state: StreamState) -> bool:
    """Return True if a failover or restart may have lost what followed `at`, unless the position is
    known to be of the stream's present history."""
    return state.failover is not None and at <= state.failover


def untrimmed(position: Position, state: StreamState) -> bool:
    """Whether no entry after the position was removed from the old end."""
    added = 0 if position.id == ZERO_ID and position.added is None else position.added
    if state.first is None:
        return state.added == added if added is not None else position.id == state.last
    if position.id >= state.first:
        return True
    if position.id == state.last:
        return True
    return added is not None and state.added - added == state.length


def gap(reason: Reason, at: EntryID, state: StreamState, next_id: EntryID | None = None) -> Notice:
    """Return the notice that something after `at` was removed. `next_id` is the next entry that is
    known to be there, by default the stream's first one."""
    return Notice("gap", reason, at, max(next_id or state.first or state.last, state.max_deleted))


def _gap(reason: Reason, at: EntryID, state: StreamState) -> Verdict:
    return Verdict(at, gap(reason, at, state))


def _reset(reason: Reason, at: EntryID, resume: EntryID) -> Verdict:
    return Verdict(resume, Notice("reset", reason, at, resume))


def before(entry_id: EntryID) -> EntryID:
    """The greatest ID below."""
    if entry_id.seq:
        return EntryID(entry_id.ms, entry_id.seq - 1)
    return EntryID(entry_id.ms - 1, 2**64 - 1) if entry_id.ms else ZERO_ID


def added_before_first(state: StreamState) -> int:
    """How many entries had been added before the first one that is still there."""
    return state.added - state.length
