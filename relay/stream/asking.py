"""The commands of one examination, one read and one page, and the parsing of their replies.

Each works on the keys of one workspace only, so that they fit one Redis Cluster slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import hiredis

from relay.model import ZERO_ID, Channel, EntryID, Record, StreamState
from relay.reads import Examined, ExamineRequest, Followed, Page, PageRequest, Server
from relay.stream.connect import CommandRefused
from relay.stream.entry import digest
from relay.stream.groups import create_marker, new_marker, parse_state
from relay.stream.keys import Keys
from relay.stream.link import Command

Decode = Callable[[Channel, EntryID, Sequence[bytes]], Record]
RawEntry = tuple[bytes, list[bytes] | None]

MAX_COUNT = 1000


def count_for(stream: Followed, page_bytes: int) -> int:
    """How many entries make about one page."""
    return max(1, min(MAX_COUNT, int(page_bytes / stream.average_bytes)))


def examine_commands(
    keys: Keys, stream: Followed, group: str, request: ExamineRequest
) -> list[Command]:
    """Return one transaction over the stream and its rights hash.

    It writes nothing unless `request.mark` is set. Then it creates the marker group that names the
    stream's incarnation and this worker's `group`, which protects an unused stream from removal.
    """
    key = keys.stream(stream.channel)
    commands: list[Command] = [("MULTI",)]
    if request.mark:
        commands.append(create_marker(key, new_marker()))
        commands.append(("XGROUP", "CREATE", key, group, str(ZERO_ID)))
    commands += [
        ("XINFO", "STREAM", key),
        ("XINFO", "GROUPS", key),
    ]
    if request.users:
        commands.append(("HMGET", keys.rights(stream.channel), *request.users))
    commands.extend(("XRANGE", key, str(own), str(own)) for own in request.own)
    commands.append(("EXEC",))
    return commands


def parse_examined(request: ExamineRequest, server: Server, reply: object) -> Examined:
    """From EXEC's reply; CommandRefused where the key is no stream."""
    answers = _transaction(reply)[2 if request.mark else 0 :]
    state = parse_state(*answers[:2])
    rest = answers[2:]
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
    return Examined(server=server, state=state, rights=rights, own=own)


def read_commands(
    keys: Keys, stream: Followed, group: str, consumer: str, count: int
) -> list[Command]:
    """Look, which also arms, and read; in one transaction, or a trim between the two would hide
    what it took. A group that does not stand at this worker's position is put there first."""
    key = keys.stream(stream.channel)
    commands: list[Command] = [("MULTI",), ("XINFO", "STREAM", key)]
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


def parse_read(reply: object, *, aligning: bool) -> tuple[StreamState, list[RawEntry]]:
    """The moment of the stream and what was read then; CommandRefused where the group is gone.

    `aligning`: the stream was misaligned when this was asked.
    """
    answers = _transaction(reply)
    state = parse_state(*answers[: 2 if aligning else 1])
    read = _checked("XREADGROUP", answers[-1])
    if not read:
        return state, []
    ((_, entries),) = cast(dict[bytes, list[RawEntry]], read).items()
    return state, entries


def page_commands(keys: Keys, stream: Followed, request: PageRequest, count: int) -> list[Command]:
    """One transaction: the entries and the moment of the stream they belong to."""
    key = keys.stream(stream.channel)
    return [
        ("MULTI",),
        ("XINFO", "STREAM", key),
        ("XINFO", "GROUPS", key),
        ("XRANGE", key, f"({request.start}", "+", "COUNT", count),
        ("EXEC",),
    ]


def parse_page(stream: Followed, server: Server, reply: object, count: int, decode: Decode) -> Page:
    """From EXEC's reply; CommandRefused where the stream is gone."""
    answers = _transaction(reply)
    state = parse_state(*answers[:2])
    entries = cast(list[RawEntry], _checked("XRANGE", answers[2]))
    records = decode_all(stream, entries, decode)
    return Page(server=server, state=state, records=records, complete=len(entries) < count)


def decode_all(stream: Followed, entries: Sequence[RawEntry], decode: Decode) -> list[Record]:
    """Records of raw entries; keeps the stream's average size, by which pages are measured."""
    channel = stream.channel
    records = [decode(channel, EntryID.parse(raw), fields or ()) for raw, fields in entries]
    if records:
        mean = sum(record.size for record in records) / len(records)
        stream.average_bytes += 0.2 * (mean - stream.average_bytes)
        # One burst of large entries must not be read by the count that suited small ones.
        stream.average_bytes = max(stream.average_bytes, mean / 2)
    return records


def _transaction(reply: object) -> list[object]:
    return cast(list[object], _checked("EXEC", reply))


def _checked(command: str, reply: object) -> object:
    if isinstance(reply, hiredis.ReplyError):
        raise CommandRefused(command, str(reply))
    return reply
