"""Group names, the incarnation marker, and what XINFO says about a stream.

Each worker is its own group on the streams that its clients follow. One more group, which nobody
ever reads, marks which life of the stream this is: its last-delivered-id is random, is replicated
and persisted with the stream, and dies with DEL and FLUSHALL (tried on Redis 7.0 and Valkey 9.1).
"""

from __future__ import annotations

import secrets
from typing import cast

import hiredis

from relay.model import ZERO_ID, EntryID, StreamState
from relay.stream.connect import CommandRefused

MARKER_GROUP = b"relay:epoch"
_WORKER = b"relay:"


def group_of(instance: str) -> bytes:
    """The fan-out group of one worker."""
    return _WORKER + instance.encode()


def instance_of(group: bytes) -> str | None:
    """The worker whose fan-out group this is; None for the marker and for others' groups."""
    if group == MARKER_GROUP or not group.startswith(_WORKER):
        return None
    return group[len(_WORKER) :].decode(errors="replace")


def new_marker() -> int:
    """A random incarnation: 63 bits, since Redis reads IDs as signed numbers first; never 0."""
    return secrets.randbits(63) or 1


def create_marker(key: bytes, marker: int) -> tuple[bytes | str, ...]:
    """The command that gives a stream its marker, making the stream where there is none.

    BUSYGROUP as the answer means that somebody else did so first: read theirs.
    """
    return ("XGROUP", "CREATE", key, MARKER_GROUP, f"{marker}-0", "MKSTREAM")


def parse_groups(reply: object) -> dict[bytes, EntryID]:
    """XINFO GROUPS: each group's last-delivered-id; nothing where the stream does not exist."""
    if isinstance(reply, Exception):
        if _no_such_key(reply):
            return {}
        raise CommandRefused("XINFO GROUPS", str(reply)) from reply
    groups = cast(list[dict[bytes, bytes]], reply)
    return {group[b"name"]: EntryID.parse(group[b"last-delivered-id"]) for group in groups}


def parse_marker(reply: object) -> int | None:
    """XINFO GROUPS: the incarnation, None where the stream or its marker is missing."""
    marker = parse_groups(reply).get(MARKER_GROUP)
    return None if marker is None else marker.ms


def parse_state(stream: object, groups: object = None) -> StreamState:
    """XINFO STREAM, and XINFO GROUPS if asked in the same transaction, as one moment.

    A stream that does not exist is a state; CommandRefused for every other error reply.
    """
    if isinstance(stream, Exception):
        if not _no_such_key(stream):
            raise CommandRefused("XINFO STREAM", str(stream)) from stream
        return StreamState(
            exists=False, first=None, last=ZERO_ID, length=0, added=0, max_deleted=ZERO_ID
        )
    info = cast(dict[bytes, object], stream)
    first = cast(list[bytes] | None, info[b"first-entry"])
    return StreamState(
        exists=True,
        first=EntryID.parse(first[0]) if first else None,
        last=EntryID.parse(cast(bytes, info[b"last-generated-id"])),
        length=cast(int, info[b"length"]),
        added=cast(int, info[b"entries-added"]),
        max_deleted=EntryID.parse(cast(bytes, info[b"max-deleted-entry-id"])),
        incarnation=None if groups is None else parse_marker(groups),
    )


def _no_such_key(error: Exception) -> bool:
    return isinstance(error, hiredis.ReplyError) and str(error) == "ERR no such key"
