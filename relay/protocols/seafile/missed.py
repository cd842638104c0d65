"""Positions of disconnected clients, and the events that they have missed.

A sync client reconnects 60 seconds after a disconnect. Seafile's server keeps nothing for it; relay
stores the last event that each connection has received from each library. All connections of one
user with the same program share one record, because a new connection does not identify its machine.
The token of its subscription does: a client keeps a library's token for three days, or until it is
restarted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple
from zlib import crc32

import orjson

from relay.core.model import EntryID, Event
from relay.protocols.seafile.event_format import FILE_LOCK_CHANGED, FOLDER_PERM_CHANGED, REPO_UPDATE

_LATEST_ONLY = REPO_UPDATE
_ALL_OF = frozenset({FILE_LOCK_CHANGED, FOLDER_PERM_CHANGED})
# Positions that are stored per library: machines of one user with the same program.
_LIMIT_POSITIONS = 4
# Libraries in one line of the record.
_PART = 500


class ClientPosition(NamedTuple):
    """The position of one connection in a library: it has received all events up to `at`.

    `token` is the digest of the token that it subscribed with. `ended`: the connection is closed.
    """

    at: EntryID
    connection: str
    token: int
    ended: bool


# The record: library -> positions of its connections, the newest last. Each library is decoded on
# demand, because one client may follow 10,000.
Stored = dict[str, list[Any]]


class UncertainPosition(NamedTuple):
    """The last sent event, and the event up to which the client has certainly received all."""

    position: ClientPosition
    floor: EntryID


def is_browser(agent: str) -> bool:
    """Return True if this User-Agent is a browser's. A page loads its state when it connects.

    Sync clients send `Seafile/...`, and before October 2025 no User-Agent.
    """
    return agent.startswith("Mozilla/")


def name(user: str, agent: str) -> str:
    """Return the name of the record in the store."""
    digest = hashlib.sha256(f"{user}\n{agent}".encode(errors="replace")).hexdigest()
    return f"seafile:seen:{digest[:40]}"


def digest(token: str) -> int:
    """Return a short digest of a token. Only tokens of one user are compared."""
    return crc32(token.encode(errors="replace"))


def read(value: bytes | None) -> Iterator[Stored]:
    """Yield the parts of a record, each of limited size. Skip unreadable parts."""
    for line in (value or b"").split(b"\n"):
        try:
            found = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(found, dict):
            yield found


def write(stored: Stored) -> Iterator[bytes]:
    """Yield the parts of a record: lines of JSON."""
    libraries = iter(stored.items())
    while part := dict(islice(libraries, _PART)):
        yield orjson.dumps(part) + b"\n"


def positions_of(stored: Stored, repo_id: str) -> list[ClientPosition]:
    """Return the stored positions of one library. Empty if they are unreadable."""
    try:
        return [
            ClientPosition(EntryID.parse(at), str(connection), int(token), bool(ended))
            for at, connection, token, ended in stored.get(repo_id, ())
        ]
    except (ValueError, AttributeError, TypeError):
        return []


def put(stored: Stored, repo_id: str, position: ClientPosition) -> None:
    """Store a connection's position instead of its earlier one.

    Positions with the same token are from the same client, so that only the later one is kept.
    """
    kept = [
        each for each in positions_of(stored, repo_id) if each.connection != position.connection
    ]
    if all(each.at < position.at for each in kept if each.token == position.token):
        kept = [*(each for each in kept if each.token != position.token), position]
    stored[repo_id] = [
        (str(at), connection, token, ended)
        for at, connection, token, ended in kept[-_LIMIT_POSITIONS:]
    ]


def resumed(positions: Sequence[ClientPosition], token: int) -> EntryID | None:
    """Return the last event of a client that subscribes with `token`, or None for a new client.

    1. The position with the same token: the client has reconnected.
    2. The latest position of a closed connection: the client was restarted and has a new token.
       If two machines were restarted, it may be that of the other one. Nothing is lost then: a
       restarted client fetches locks and permissions itself. An earlier position would repeat
       events: an old lock would make its file read-only again.
    3. The earliest of the others: the worker was killed before it could mark them as closed.
    """
    for chosen in (
        [each for each in positions if each.token == token],
        [each for each in positions if each.ended],
    ):
        if chosen:
            return max(each.at for each in chosen)
    return min((each.at for each in positions), default=None)


def needed(events: Sequence[Event], after: EntryID, selectors: frozenset[str]) -> list[Event]:
    """Return the events that a client at position `after` has missed, in order.

    These are the last repo-update, and all locks and permissions that are addressed to it.

    Args:
        events: The newest events of the library.
        after: The last event that the client has received.
        selectors: The client's selectors, to which events may be addressed.
    """
    later = [
        event
        for event in sorted(events, key=lambda event: event.id or after)
        if event.id is not None
        and event.id > after
        and (event.to is None or not event.to.isdisjoint(selectors))
    ]
    last = next((event for event in reversed(later) if event.type == _LATEST_ONLY), None)
    return [event for event in later if event.type in _ALL_OF or event is last]
