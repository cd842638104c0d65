"""When a replay is whole, and what a client is told when it is not.

The rule is judged on one snapshot of the stream (XINFO STREAM, taken together with the entries).
Redis tells nobody about trimming: `max-deleted-entry-id` stays 0-0 after XTRIM, so the rule
counts entries instead (`entries-added` against length). It may raise a false alarm; it is never
silent about a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from zlib import crc32

from relay.model import ZERO_ID, EntryID, Position, StreamState

NoticeKind = Literal["gap", "reset", "revoked", "closing"]


@dataclass(frozen=True, slots=True)
class Notice:
    """What a client may have missed on one channel, and from where it goes on."""

    kind: NoticeKind
    reason: str
    from_id: EntryID | None = None
    to_id: EntryID | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Delivery goes on after `resume`; `notice` is None if nothing can be missing."""

    resume: EntryID
    notice: Notice | None = None


def incarnation_of(marker: int | None, replid: bytes) -> int:
    """32 bits: the upper half names the stream's life (it dies with DEL and FLUSHALL), the lower
    half the replication history it is read from (it changes with a failover)."""
    return (crc32(str(marker).encode()) & 0xFFFF) << 16 | crc32(replid) & 0xFFFF


def judge(
    position: Position, state: StreamState, incarnation: int, own_digest: int | None
) -> Verdict:
    """Whether everything after `position` is still in the stream.

    `own_digest` is the content digest of the entry at the position's ID, None where there is no
    such entry.
    """
    at = position.id
    same_life = same_history = False
    if position.incarnation is not None:
        same_life = position.incarnation >> 16 == incarnation >> 16
        same_history = position.incarnation == incarnation
    elif at == ZERO_ID:
        # "From the beginning": nothing has been seen, so nothing of another life either.
        same_life = same_history = True
    if not state.exists:
        return _reset("other_incarnation", at, ZERO_ID)
    if at > state.last:
        new_life = position.incarnation is not None and not same_life
        return _reset("position_ahead", at, ZERO_ID if new_life else state.last)

    own_there = own_digest is not None and position.digest in (None, own_digest)
    # An empty past cannot be checked by its own entry; the marker group survives a failover.
    nothing_seen = at == ZERO_ID and same_life
    # No deletion stands at 0-0: there the two are equal in every new life, and would hide that
    # what was appended in the old one is gone.
    own_deleted = at == state.max_deleted and at != ZERO_ID
    if not (same_history or own_there or nothing_seen or own_deleted):
        if position.incarnation is not None and not same_life:
            return _reset("other_incarnation", at, ZERO_ID)
        if position.incarnation is not None:
            return _reset("failover", at, at)
        if state.first is None or at < state.first:
            return _gap("trimmed", at, state)
        if state.max_deleted >= at:
            return _gap("deleted", at, state)
        return _reset("unknown_position", at, at)
    if state.max_deleted > at:
        return _gap("deleted", at, state)
    if not untrimmed(position, state):
        return _gap("trimmed", at, state)
    return Verdict(at)


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


def _gap(reason: str, at: EntryID, state: StreamState) -> Verdict:
    return Verdict(at, Notice("gap", reason, at, state.first or state.last))


def _reset(reason: str, at: EntryID, resume: EntryID) -> Verdict:
    return Verdict(resume, Notice("reset", reason, at, resume))


def before(entry_id: EntryID) -> EntryID:
    """The greatest ID below."""
    if entry_id.seq:
        return EntryID(entry_id.ms, entry_id.seq - 1)
    return EntryID(entry_id.ms - 1, 2**64 - 1) if entry_id.ms else ZERO_ID


def added_before_first(state: StreamState) -> int:
    """How many entries had been added before the first one that is still there."""
    return state.added - state.length
