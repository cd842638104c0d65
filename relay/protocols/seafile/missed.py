"""What a client missed while it was away: where it was, and which of the newest events it needs.

A sync client comes back 60 seconds after a disconnect and begins anew; upstream nothing is kept for
it. Here the last event that each connection has received from a library is remembered. All
connections of one user with one program share a memory, since a new connection does not say which
machine it comes from. The token that it subscribes with does: a client keeps the token of a library
for three days, until it is restarted.
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
# Machines of one user with the same program of which the places are kept, for each library.
_LIMIT_PLACES = 4
# Libraries that are stored in one line.
_PART = 500


class Place(NamedTuple):
    """What one connection has seen of a library: everything up to `at`. `token` is the digest of
    the token that it subscribed with. `ended`: the connection is closed."""

    at: EntryID
    connection: str
    token: int
    ended: bool


# What is stored: library -> the places of its connections, the newest last. Each is decoded when
# it is needed, because one client may follow 10,000 libraries.
Stored = dict[str, list[Any]]


class Seen(NamedTuple):
    """A place, and the event up to which the client has certainly received everything."""

    place: Place
    floor: EntryID


def is_browser(agent: str) -> bool:
    """A page loads its state itself when it connects. All browsers call themselves so; sync clients
    say `Seafile/...`, or nothing before October 2025."""
    return agent.startswith("Mozilla/")


def name(user: str, agent: str) -> str:
    """Of the remembered places in the store."""
    digest = hashlib.sha256(f"{user}\n{agent}".encode(errors="replace")).hexdigest()
    return f"seafile:seen:{digest[:40]}"


def digest(token: str) -> int:
    """Return the short form of a token that is remembered. Only one user's tokens are compared."""
    return crc32(token.encode(errors="replace"))


def read(value: bytes | None) -> Iterator[Stored]:
    """Read what is stored, in parts that are short work. Unreadable parts are skipped."""
    for line in (value or b"").split(b"\n"):
        try:
            found = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(found, dict):
            yield found


def write(stored: Stored) -> Iterator[bytes]:
    """Return the parts of what is to be stored: lines of JSON."""
    libraries = iter(stored.items())
    while part := dict(islice(libraries, _PART)):
        yield orjson.dumps(part) + b"\n"


def places_of(stored: Stored, repo_id: str) -> list[Place]:
    """Return the stored places of one library; none if they cannot be read."""
    try:
        return [
            Place(EntryID.parse(at), str(connection), int(token), bool(ended))
            for at, connection, token, ended in stored.get(repo_id, ())
        ]
    except (ValueError, AttributeError, TypeError):
        return []


def put(stored: Stored, repo_id: str, place: Place) -> None:
    """Replace the place of this connection. A place with the same token is of the same client, so
    only the later one of the two is kept."""
    kept = [each for each in places_of(stored, repo_id) if each.connection != place.connection]
    if all(each.at < place.at for each in kept if each.token == place.token):
        kept = [*(each for each in kept if each.token != place.token), place]
    stored[repo_id] = [
        (str(at), connection, token, ended)
        for at, connection, token, ended in kept[-_LIMIT_PLACES:]
    ]


def resumed(places: Sequence[Place], token: int) -> EntryID | None:
    """Return what a client has seen that subscribes with `token`, None if it is new.

    1. The place of the same token: the client has reconnected.
    2. The latest place of a closed connection: the client was restarted, and got a new token.
       Where two machines were restarted it may be the other one's. That loses nothing, because a
       restarted client fetches locks and permissions itself. An earlier place would repeat events
       that this client has had, and an old lock makes its file read-only again.
    3. The earliest of the others: the worker was killed and could not say that they are closed.
    """
    for chosen in (
        [place for place in places if place.token == token],
        [place for place in places if place.ended],
    ):
        if chosen:
            return max(place.at for place in chosen)
    return min((place.at for place in places), default=None)


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
