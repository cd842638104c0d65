"""What a client missed while it was away: where it was, and which of the newest events it needs.

A sync client comes back 60 seconds after a disconnect and begins anew; upstream nothing is kept for
it. Here the place where it left each library is remembered for its user and program.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import orjson

from producers.seaf_events import FILE_LOCK_CHANGED, FOLDER_PERM_CHANGED, REPO_UPDATE
from relay.model import EntryID, Event

_LATEST_ONLY = REPO_UPDATE
_ALL_OF = frozenset({FILE_LOCK_CHANGED, FOLDER_PERM_CHANGED})

# Library -> the last event that was sent, and which connection says so.
Places = dict[str, tuple[EntryID, str]]


def is_browser(agent: str) -> bool:
    """A page loads its state itself when it connects. All browsers call themselves so; sync clients
    say `Seafile/...`, or nothing before October 2025."""
    return agent.startswith("Mozilla/")


def name(user: str, agent: str) -> str:
    """Of the remembered places in the store."""
    # Two machines of one user with the same program share it; addresses change too often to tell
    # them apart.
    digest = hashlib.sha256(f"{user}\n{agent}".encode(errors="replace")).hexdigest()
    return f"seafile:seen:{digest[:40]}"


def read(value: bytes | None) -> Places:
    """From the store; what cannot be read is as good as nothing."""
    try:
        found = orjson.loads(value or b"{}")
        return {repo: (EntryID.parse(at), str(by)) for repo, (at, by) in found.items()}
    except (ValueError, AttributeError, TypeError):
        return {}


def write(places: Places) -> bytes:
    """For the store."""
    return orjson.dumps({repo: (str(at), by) for repo, (at, by) in places.items()})


def merged(stored: Places, mine: Mapping[str, EntryID], connection: str) -> Places:
    """What is remembered once this connection says where it is. Of two connections with one memory
    the rearmost place of a library counts: what comes twice does no harm to a sync client."""
    places = dict(stored)
    for repo, at in mine.items():
        there = places.get(repo)
        if there is None or there[1] == connection or at < there[0]:
            places[repo] = (at, connection)
    return places


def needed(events: Sequence[Event], after: EntryID, selectors: frozenset[str]) -> list[Event]:
    """Of the newest events of a library, in their order, what a client needs that has seen
    everything up to `after`: the last repo-update, and all of locks and permissions for it."""
    later = [
        event
        for event in sorted(events, key=lambda event: event.id or after)
        if event.id is not None
        and event.id > after
        and (event.to is None or not event.to.isdisjoint(selectors))
    ]
    last = next((event for event in reversed(later) if event.type == _LATEST_ONLY), None)
    return [event for event in later if event.type in _ALL_OF or event is last]
