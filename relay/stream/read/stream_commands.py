"""Build the commands of an examination, a read and a page, and parse their replies.

Each uses the keys of one channel only, so that all of them are in one Redis Cluster slot.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import cast
from zlib import crc32

from relay.core.model import ZERO_ID, Channel, EntryID, Marker, Record, StreamState
from relay.core.stream_interface import Examined, ExamineRequest, Followed, Page, PageRequest
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import RedisCommand, ReplyError
from relay.stream.connection.primary import Primary
from relay.stream.connection.refusals import cause_of
from relay.stream.format.entry import digest
from relay.stream.format.keys import Keys
from relay.stream.read.groups import FAILOVER_GROUP, LOW, MARKER_GROUP, create_marker, new_marker

Decode = Callable[[Channel, EntryID, Sequence[bytes]], Record]
RawEntry = tuple[bytes, list[bytes] | None]


def count_for(stream: Followed, page_bytes: int, most: int) -> int:
    """Return how many entries to read: about one page, and no more than `most`.

    Redis has no limit in bytes, and new entries may be larger than all earlier ones. The size of a
    reply is bounded by `most` and `[stream] max_entry_bytes`.
    """
    return max(1, min(most, int(page_bytes / stream.average_bytes)))


class EntryMissing(Exception):  # not an error: the caller reads by group
    """The entry at this worker's position does not exist or is another one."""


class StreamChanged(Exception):  # not an error: the caller repeats the request
    """The stream changed between the commands of a snapshot that was not a transaction."""


def examine_commands(
    keys: Keys,
    stream: Followed,
    group: str,
    request: ExamineRequest,
    primary: Primary,
    *,
    plain: bool = False,
) -> list[RedisCommand]:
    """Return the commands that read a snapshot of the stream and its rights hash.

    They write nothing unless `request.mark` is set. Then they create the marker group, which stores
    the stream's incarnation, and this worker's `group`, which protects an unused stream from
    removal.
    """
    key = stream.key
    writes: list[RedisCommand] = []
    if request.mark:
        writes.append(create_marker(key, new_marker(), primary.certificate))
        writes.append(("XGROUP", "CREATE", key, group, str(ZERO_ID)))
    reads: list[RedisCommand] = [("XINFO", "STREAM", key), ("XINFO", "GROUPS", key)]
    if request.users:
        reads.append(("HMGET", keys.rights(stream.channel), *request.users))
    reads.extend(("XRANGE", key, str(own), str(own)) for own in request.own)
    return _snapshot_commands(writes, reads, plain=plain)


def parse_examined(
    request: ExamineRequest,
    primary: Primary,
    replies: Sequence[object],
    *,
    plain: bool = False,
    moved_from: Container[int] = (),
) -> Examined:
    """Parse the replies to `examine_commands`. CommandRefused if the key is no stream.

    `moved_from` are the certificates of the server that had the stream before.
    """
    snapshot = _snapshot(replies, 2 if request.mark else 0, plain=plain)
    state = parse_state(snapshot[0], snapshot[1], primary, moved_from)
    rest = snapshot[2:]
    rights: dict[str, bytes | None] = {}
    if request.users:
        values = _checked("HMGET", rest[0])
        rights = dict(zip(request.users, cast(list[bytes | None], values), strict=True))
        rest = rest[1:]
    own = {}
    for own_id, found in zip(request.own, rest, strict=True):
        entries = cast(list[RawEntry], _checked("XRANGE", found))
        if entries:
            own[own_id] = digest(entries[0][1] or [])
    return Examined(state=state, rights=rights, own=own)


def read_commands(
    stream: Followed,
    group: str,
    consumer: str,
    count: int,
    *,
    plain: bool = False,
    keeps_group: bool = False,
) -> list[RedisCommand]:
    """Return the commands that read the stream's state and its new entries in one snapshot.

    Reading the state also arms the invalidation. A trim between state and entries would remove
    entries unnoticed. A group that is not at this worker's position is moved there first. The
    `plain` form writes nothing.

    `keeps_group`: do not move the group, so that Redis has nothing to replicate. The entry at the
    position is read again, to detect that the stream was deleted and created again.
    """
    key = stream.key
    if plain:
        reads: list[RedisCommand] = [
            ("XINFO", "STREAM", key),
            ("XINFO", "GROUPS", key),
            ("XRANGE", key, f"({stream.position}", "+", "COUNT", count),
        ]
        return _snapshot_commands([], reads, plain=True)
    commands: list[RedisCommand] = [("MULTI",), ("XINFO", "STREAM", key)]
    if keeps_group:
        return [
            *commands,
            # Without a call of `EntryID.__str__`, for speed.
            ("XRANGE", key, b"%d-%d" % stream.position, "+", "COUNT", count + 1),
            ("EXEC",),
        ]
    if stream.misaligned:
        at = str(stream.position)
        commands.append(("XINFO", "GROUPS", key))
        commands.append(("XGROUP", "CREATE", key, group, at))
        commands.append(("XGROUP", "SETID", key, group, at))
    commands.append(
        ("XREADGROUP", "GROUP", group, consumer, "COUNT", count, "NOACK", "STREAMS", key, ">")
    )
    commands.append(("EXEC",))
    return commands


def parse_read(
    replies: Sequence[object],
    primary: Primary,
    *,
    aligning: bool,
    plain: bool = False,
    own: tuple[EntryID, int | None] | None = None,
) -> tuple[StreamState, list[RawEntry]]:
    """Return the stream's state and its new entries.

    `aligning`: the stream was misaligned when the commands were built. `own`: the read keeps the
    group; these are the position and the digest of the entry there.

    Raises:
        CommandRefused: The group does not exist, or Redis rejected a command.
        EntryMissing: The first entry of a read that keeps the group is not the `own` one.
    """
    snapshot = _snapshot(replies, 0, plain=plain)
    state = parse_state(snapshot[0], snapshot[1] if aligning or plain else None, primary)
    if plain:
        return state, cast(list[RawEntry], _checked("XRANGE", snapshot[2]))
    if own is not None:
        entries = cast(list[RawEntry], _checked("XRANGE", snapshot[1]))
        if not entries or entries[0][0] != b"%d-%d" % own[0]:
            raise EntryMissing
        # The same as `digest`, inlined for speed.
        if crc32(b"\0".join(entries[0][1] or ())) & 0xFFFF != own[1]:
            raise EntryMissing
        return state, entries[1:]
    read = snapshot[-1]
    if isinstance(read, dict):
        ((_, entries),) = cast(dict[bytes, list[RawEntry]], read).items()
        return state, entries
    # None without new entries, or an error.
    _checked("XREADGROUP", read)
    return state, []


def has_unread_command(stream: Followed) -> RedisCommand:
    """Return a command that arms the invalidation. Its reply is empty if there is no new entry."""
    return ("XRANGE", stream.key, f"({stream.position}", "+", "COUNT", 1)


def size_of(entries: Sequence[RawEntry]) -> int:
    """Return the bytes in the fields of raw entries."""
    return sum(len(part) for _, fields in entries for part in fields or ())


def size_command(stream: Followed) -> RedisCommand:
    """Return a command whose reply is the stream's size in bytes, or None if it does not exist."""
    return ("MEMORY", "USAGE", stream.key, "SAMPLES", 0)


def page_commands(
    stream: Followed, request: PageRequest, count: int, *, plain: bool = False
) -> list[RedisCommand]:
    """Return the commands that read the stream's state and the entries of a page."""
    key = stream.key
    reads: list[RedisCommand] = [
        ("XINFO", "STREAM", key),
        ("XINFO", "GROUPS", key),
        ("XRANGE", key, f"({request.start}", "+", "COUNT", count),
    ]
    return _snapshot_commands([], reads, plain=plain)


def parse_page(
    stream: Followed,
    primary: Primary,
    replies: Sequence[object],
    count: int,
    decode: Decode,
    *,
    plain: bool = False,
) -> Page:
    """Parse the replies to `page_commands`. CommandRefused if the stream does not exist."""
    snapshot = _snapshot(replies, 0, plain=plain)
    state = parse_state(snapshot[0], snapshot[1], primary)
    entries = cast(list[RawEntry], _checked("XRANGE", snapshot[2]))
    records = decode_all(stream, entries, decode)
    return Page(state=state, records=records, complete=len(entries) < count)


def decode_all(stream: Followed, entries: Sequence[RawEntry], decode: Decode) -> list[Record]:
    """Decode entries, and update the stream's average size, which sets the size of later reads."""
    channel, size, records = stream.channel, 0, []
    for raw, fields in entries:
        record = decode(channel, parse_id(raw), fields or ())
        size += record.size
        records.append(record)
    if records:
        mean = size / len(records)
        stream.average_bytes += 0.2 * (mean - stream.average_bytes)
        # After a burst of large entries, read fewer at once without delay.
        stream.average_bytes = max(stream.average_bytes, mean / 2)
    return records


def parse_id(raw: bytes) -> EntryID:
    """Parse an entry ID from Redis. Unlike `EntryID.parse`, do not check whether it is valid."""
    ms, _, seq = raw.partition(b"-")
    return EntryID(int(ms), int(seq))


def parse_groups(reply: object) -> dict[bytes, EntryID]:
    """Parse XINFO GROUPS: each group's last-delivered-id. Empty if the stream does not exist."""
    if isinstance(reply, Exception):
        if _no_such_key(reply):
            return {}
        raise CommandRefused("XINFO GROUPS", str(reply)) from reply
    groups = cast(list[dict[bytes, bytes]], reply)
    return {group[b"name"]: parse_id(group[b"last-delivered-id"]) for group in groups}


def parse_state(
    stream: object,
    groups: object = None,
    primary: Primary | None = None,
    moved_from: Container[int] = (),
) -> StreamState:
    """Parse XINFO STREAM, and XINFO GROUPS of the same transaction, into one moment of a stream.

    If entries may have been lost since the stream's certificate, the state contains the new
    failover position before it is stored. A missing stream is a valid state. Other errors raise
    CommandRefused.
    """
    if isinstance(stream, Exception):
        if not _no_such_key(stream):
            raise CommandRefused("XINFO STREAM", str(stream)) from stream
        return StreamState(
            exists=False, first=None, last=ZERO_ID, length=0, added=0, max_deleted=ZERO_ID
        )
    info = cast(dict[bytes, object], stream)
    first = cast(list[bytes] | None, info[b"first-entry"])
    last = parse_id(cast(bytes, info[b"last-generated-id"]))
    marker = failover = incarnation = None
    if groups is not None and primary is not None:
        found = parse_groups(groups)
        place = found.get(MARKER_GROUP)
        if place is None:
            failover = last
        else:
            marker = Marker(place, primary.is_without_loss_since(place.seq & LOW, moved_from))
            history = place.seq >> 32 if marker.is_current else primary.certificate
            failover = found.get(FAILOVER_GROUP) if marker.is_current else last
            incarnation = (place.ms & LOW) << 32 | history
    return StreamState(
        exists=True,
        first=parse_id(first[0]) if first else None,
        last=last,
        length=cast(int, info[b"length"]),
        added=cast(int, info[b"entries-added"]),
        max_deleted=parse_id(cast(bytes, info[b"max-deleted-entry-id"])),
        blocks=cast(int, info.get(b"radix-tree-keys", 0)),
        incarnation=incarnation,
        failover=failover,
        marker=marker,
    )


def _snapshot_commands(
    writes: list[RedisCommand], reads: list[RedisCommand], *, plain: bool
) -> list[RedisCommand]:
    """Return the commands in a form in which their replies are one snapshot.

    This is a transaction. If Redis rejects transactions (its memory is full, or the user may not
    run MULTI), the state is read again at the end: if it is the same, nothing has changed since.
    """
    if plain:
        return [*writes, *reads, reads[0]]
    return [("MULTI",), *writes, *reads, ("EXEC",)]


def _snapshot(replies: Sequence[object], writes: int, *, plain: bool) -> list[object]:
    """Return the replies to the reading commands of a snapshot, after those to its `writes`."""
    if plain:
        *reads, again = replies[writes:]
        if not _is_same(reads[0], again):
            raise StreamChanged
        return reads
    executed = replies[-1]
    if isinstance(executed, ReplyError):
        # EXECABORT does not contain the reason. The reply to the rejected command does.
        refused = (each for each in replies if isinstance(each, ReplyError))
        raise CommandRefused("transaction", cause_of(str(next(refused))))
    return cast(list[object], executed)[writes:]


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, ReplyError) and isinstance(other, ReplyError):
        return str(one) == str(other)
    return one == other


def _checked(command: str, reply: object) -> object:
    if isinstance(reply, ReplyError):
        raise CommandRefused(command, str(reply))
    return reply


def _no_such_key(error: Exception) -> bool:
    return isinstance(error, ReplyError) and str(error) == "ERR no such key"
