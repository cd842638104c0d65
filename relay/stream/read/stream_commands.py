"""Build the commands of an examination, a read and a page, and parse their replies.

Each uses the keys of one channel only, so that all of them are in one Redis Cluster slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from relay.core.model import ZERO_ID, Channel, EntryID, Record, StreamState
from relay.core.stream_interface import Examined, ExamineRequest, Followed, Page, PageRequest
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import RedisCommand, ReplyError
from relay.stream.connection.primary import Primary
from relay.stream.connection.refusals import cause_of
from relay.stream.format.entry import digest
from relay.stream.format.keys import Keys
from relay.stream.read.groups import create_marker, new_marker, parse_state

Decode = Callable[[Channel, EntryID, Sequence[bytes]], Record]
RawEntry = tuple[bytes, list[bytes] | None]


def count_for(stream: Followed, page_bytes: int, most: int) -> int:
    """Return how many entries to read: about one page, and no more than `most`.

    Redis has no limit in bytes, and new entries may be larger than all earlier ones. The size of a
    reply is bounded by `most` and `[stream] max_entry_bytes`.
    """
    return max(1, min(most, int(page_bytes / stream.average_bytes)))


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
    key = keys.stream(stream.channel)
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
    request: ExamineRequest, primary: Primary, replies: Sequence[object], *, plain: bool = False
) -> Examined:
    """Parse the replies to `examine_commands`. CommandRefused if the key is no stream."""
    snapshot = _snapshot(replies, 2 if request.mark else 0, plain=plain)
    state = parse_state(snapshot[0], snapshot[1], primary)
    rest = snapshot[2:]
    rights: dict[str, bytes | None] = {}
    if request.users:
        values = _checked("HMGET", rest[0])
        rights = dict(zip(request.users, cast(list[bytes | None], values), strict=True))
        rest = rest[1:]
    own = {}
    for entry_id, found in zip(request.own, rest, strict=True):
        entries = cast(list[RawEntry], _checked("XRANGE", found))
        if entries:
            own[entry_id] = digest(entries[0][1] or [])
    return Examined(state=state, rights=rights, own=own)


def read_commands(
    keys: Keys, stream: Followed, group: str, consumer: str, count: int, *, plain: bool = False
) -> list[RedisCommand]:
    """Return the commands that read the stream's state and its new entries in one snapshot.

    Reading the state also arms the invalidation. A trim between state and entries would remove
    entries unnoticed. A group that is not at this worker's position is moved there first. The
    `plain` form writes nothing.
    """
    key = keys.stream(stream.channel)
    if plain:
        reads: list[RedisCommand] = [
            ("XINFO", "STREAM", key),
            ("XINFO", "GROUPS", key),
            ("XRANGE", key, f"({stream.position}", "+", "COUNT", count),
        ]
        return _snapshot_commands([], reads, plain=True)
    commands: list[RedisCommand] = [("MULTI",), ("XINFO", "STREAM", key)]
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
    replies: Sequence[object], primary: Primary, *, aligning: bool, plain: bool = False
) -> tuple[StreamState, list[RawEntry]]:
    """Return the stream's state and its new entries. CommandRefused if the group does not exist.

    `aligning`: the stream was misaligned when the commands were built.
    """
    snapshot = _snapshot(replies, 0, plain=plain)
    state = parse_state(snapshot[0], snapshot[1] if aligning or plain else None, primary)
    if plain:
        return state, cast(list[RawEntry], _checked("XRANGE", snapshot[2]))
    read = snapshot[-1]
    if isinstance(read, dict):
        ((_, entries),) = cast(dict[bytes, list[RawEntry]], read).items()
        return state, entries
    # None without new entries, or an error.
    _checked("XREADGROUP", read)
    return state, []


def has_unread_command(keys: Keys, stream: Followed) -> RedisCommand:
    """Return a command that arms the invalidation. Its reply is empty if there is no new entry."""
    return ("XRANGE", keys.stream(stream.channel), f"({stream.position}", "+", "COUNT", 1)


def size_of(entries: Sequence[RawEntry]) -> int:
    """Return the bytes in the fields of raw entries."""
    return sum(len(part) for _, fields in entries for part in fields or ())


def size_command(keys: Keys, stream: Followed) -> RedisCommand:
    """Return a command whose reply is the stream's size in bytes, or None if it does not exist."""
    return ("MEMORY", "USAGE", keys.stream(stream.channel), "SAMPLES", 0)


def page_commands(
    keys: Keys, stream: Followed, request: PageRequest, count: int, *, plain: bool = False
) -> list[RedisCommand]:
    """Return the commands that read the stream's state and the entries of a page."""
    key = keys.stream(stream.channel)
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
        record = decode(channel, EntryID.parse(raw), fields or ())
        size += record.size
        records.append(record)
    if records:
        mean = size / len(records)
        stream.average_bytes += 0.2 * (mean - stream.average_bytes)
        # After a burst of large entries, read fewer at once without delay.
        stream.average_bytes = max(stream.average_bytes, mean / 2)
    return records


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
