"""A channel's history, and the events that a reconnecting client has missed. Pure functions.

v1 keeps a list of the newest `history_size` publications, which expires `history_lifetime` seconds
after the newest one. Here the list is the end of the channel's stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from relay.core.model import ZERO_ID, EntryID, Event, Position
from relay.hub.recovery import judge, may_have_lost

if TYPE_CHECKING:
    from relay.core.stream_interface import Snapshot
    from relay.protocols.centrifugo.settings import CentrifugoNamespace


class MissedEvents(NamedTuple):
    """Missed events, newest first. `recovered` is True only if no other event can be missing."""

    events: Sequence[Event]
    recovered: bool


def snapshot_size(rules: CentrifugoNamespace) -> int:
    """Return how many events to read for recovery.

    It is one more than the history has, because the oldest may be the client's last event.
    """
    return rules.history_size + 1 if rules.has_history else 0


def retained(snapshot: Snapshot, rules: CentrifugoNamespace, now: float) -> Sequence[Event]:
    """Return the history at `now` (seconds since the epoch, by Redis), newest first."""
    newest = snapshot.events[: rules.history_size] if rules.has_history else ()
    if not newest or newest[0].id is None:
        return ()
    return newest if newest[0].id.ms / 1000 + rules.history_lifetime > now else ()


def missed(snapshot: Snapshot, rules: CentrifugoNamespace, last: str, now: float) -> MissedEvents:
    """Return the retained events after `last`, the newest ID that the client has."""
    history = retained(snapshot, rules, now)
    try:
        at = EntryID.parse(last)
    except ValueError:
        # Empty, or an ID of the Centrifugo server that relay has replaced.
        return MissedEvents(history, recovered=False)
    if not rules.has_history or not _reaches(snapshot, at) or not _is_whole(snapshot, at):
        return MissedEvents(history, recovered=False)
    since = [event for event in snapshot.events if event.id is not None and event.id > at]
    if len(since) > len(history):
        return MissedEvents(history, recovered=False)
    return MissedEvents(since, recovered=True)


def position(snapshot: Snapshot) -> Position:
    """Return the position at which delivery continues after the snapshot."""
    state = snapshot.state
    if not state.exists:
        # The subscription starts at the beginning of a stream that does not exist yet.
        return Position(ZERO_ID)
    newest = snapshot.records[0] if snapshot.records else None
    digest = newest.digest if newest is not None and newest.id == state.last else None
    return Position(state.last, state.added, state.incarnation, digest)


def _reaches(snapshot: Snapshot, at: EntryID) -> bool:
    """Return False if there may be older events after `at` that were too large to be read."""
    return snapshot.whole or not snapshot.records or snapshot.records[-1].id <= at


def _is_whole(snapshot: Snapshot, at: EntryID) -> bool:
    state = snapshot.state
    if may_have_lost(at, state):
        return False
    if state.exists and at == state.last:
        # No event has been appended since, even if the entry itself has been trimmed. A recreated
        # stream would need to have exactly the same last ID, to the millisecond.
        return True
    own = next((record.digest for record in snapshot.records if record.id == at), None)
    return judge(Position(at), state, own).notice is None
