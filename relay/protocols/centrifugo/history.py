"""What a channel's history holds, and what of it a client that comes back has missed. Pure.

v1 keeps a list of the newest `history_size` publications, which is gone `history_lifetime` seconds
after the last of them. Here the list is the end of the channel's stream.
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
    """Newest first. `recovered` only if nothing else can be missing."""

    events: Sequence[Event]
    recovered: bool


def wanted(rules: CentrifugoNamespace) -> int:
    """How many events a snapshot must have: one more than are kept, which may be the client's."""
    return rules.history_size + 1 if rules.has_history else 0


def kept(snapshot: Snapshot, rules: CentrifugoNamespace, now: float) -> Sequence[Event]:
    """The history at `now` (seconds since the epoch), newest first."""
    newest = snapshot.events[: rules.history_size] if rules.has_history else ()
    if not newest or newest[0].id is None:
        return ()
    return newest if newest[0].id.ms / 1000 + rules.history_lifetime > now else ()


def missed(snapshot: Snapshot, rules: CentrifugoNamespace, last: str, now: float) -> MissedEvents:
    """What a client whose newest known ID is `last` has missed, as far as it is kept."""
    history = kept(snapshot, rules, now)
    try:
        at = EntryID.parse(last)
    except ValueError:
        # Nothing, or an ID of the Centrifugo that was here before.
        return MissedEvents(history, recovered=False)
    if not rules.has_history or not _is_whole(snapshot, at):
        return MissedEvents(history, recovered=False)
    since = [event for event in snapshot.events if event.id is not None and event.id > at]
    if len(since) > len(history):
        return MissedEvents(history, recovered=False)
    return MissedEvents(since, recovered=True)


def position(snapshot: Snapshot) -> Position:
    """Return the position from which delivery goes on after the snapshot."""
    state = snapshot.state
    if not state.exists:
        # From the beginning of the stream that the subscription creates.
        return Position(ZERO_ID)
    newest = snapshot.records[0] if snapshot.records else None
    digest = newest.digest if newest is not None and newest.id == state.last else None
    return Position(state.last, state.added, state.incarnation, digest)


def _is_whole(snapshot: Snapshot, at: EntryID) -> bool:
    state = snapshot.state
    if may_have_lost(at, state):
        return False
    if state.exists and at == state.last:
        # Nothing was appended since, whether or not its own entry is still kept. Another life of
        # the stream would have to have come to this very ID, to the millisecond.
        return True
    own = next((record.digest for record in snapshot.records if record.id == at), None)
    return judge(Position(at), state, own).notice is None
