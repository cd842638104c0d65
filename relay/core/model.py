"""Values that every layer shares: channels, entry IDs, positions, events, principals.

Nothing here does I/O. All values are immutable, except that an `Event` caches its encoded frames,
so that each protocol encodes it once however many clients receive it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, NewType, TypedDict

Channel = NewType("Channel", str)

# Protocols prefix their channels with these. Other protocols must not use them as namespaces.
RESERVED_NAMESPACES = frozenset({"seafile", "pydio", "axr"})
# Every character is allowed except lone surrogates, which have no UTF-8. Keys escape what would
# break them, see relay/stream/format/keys.py.
_CHANNEL = re.compile(r"[^\ud800-\udfff]{1,255}", re.DOTALL)


def parse_channel(text: str) -> Channel:
    """Return `text` as a channel. Raise ValueError if it is empty, too long or not valid UTF-8."""
    if not _CHANNEL.fullmatch(text):
        raise ValueError(f"channel must have 1 to 255 characters of valid UTF-8; {_problem(text)}")
    return Channel(text)


def _problem(text: str) -> str:
    if not text:
        return "this one is empty"
    return f"this one has {len(text)}" if len(text) > 255 else "this one has half a surrogate pair"


def namespace_of(channel: Channel) -> str:
    """Return the text before the first ':', or '' if there is none."""
    head, colon, _ = channel.partition(":")
    return head if colon else ""


class EntryID(NamedTuple):
    """A stream entry's ID: ordered as two numbers, never as text."""

    ms: int
    seq: int

    def __str__(self) -> str:
        return f"{self.ms}-{self.seq}"

    @classmethod
    def parse(cls, text: str | bytes) -> EntryID:
        """Parse `ms-seq` or `ms`. Raise ValueError for anything else."""
        if isinstance(text, bytes):
            text = text.decode("ascii")
        ms, dash, seq = text.partition("-")
        if not (ms.isascii() and ms.isdigit()) or (dash and not (seq.isascii() and seq.isdigit())):
            raise ValueError(f"not an entry ID: {text[:50]!r}")
        entry_id = cls(int(ms), int(seq) if dash else 0)
        if entry_id.ms >> 64 or entry_id.seq >> 64:
            raise ValueError(f"not an entry ID: {text[:50]!r}")
        return entry_id


ZERO_ID = EntryID(0, 0)


class EventFields(TypedDict, total=False):
    """Optional fields of an event to be published (`relay.stream.format.entry.encode`)."""

    type: str | None
    uid: str | None
    to: Iterable[str] | None
    client: str | None
    info: bytes | None
    extra: Mapping[bytes, bytes] | None


@dataclass(frozen=True, slots=True)
class Position:
    """A place in one stream: everything up to and including `id` has been seen.

    A bare stream ID has only `id`. Positions that the relay makes itself also carry `added` (how
    many entries had ever been added up to here), `incarnation` (see `StreamState`) and `digest` (16
    bits of the content of the entry at `id`).
    """

    id: EntryID
    added: int | None = None
    incarnation: int | None = None
    digest: int | None = None


class Marker(NamedTuple):
    """The groups that carry a stream's incarnation (see `relay.stream.read.groups`), as stored.

    `is_current`: nothing was lost since the certificate in `id` was written.
    """

    id: EntryID
    has_failover: bool
    is_current: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """One moment of a stream, as XINFO STREAM and XINFO GROUPS report it.

    `first` is None in an empty stream; `added` counts every entry ever appended, `max_deleted` is
    the highest ID that XDEL removed (trimming leaves it alone). Redis stores the entries in
    `blocks`.

    `incarnation` is None if the stream has no marker group or it was not asked for. Its upper 32
    bits name the stream's life, which ends with DEL and FLUSHALL. Its lower 32 bits name the
    history of its entries, which ends when Redis may have lost some, at a failover or a restart.
    Such a loss concerns positions up to `failover`, None if there was none. `marker` is what the
    stream itself stores.
    """

    exists: bool
    first: EntryID | None
    last: EntryID
    length: int
    added: int
    max_deleted: EntryID
    blocks: int = 0
    incarnation: int | None = None
    failover: EntryID | None = None
    marker: Marker | None = None


@dataclass(slots=True, eq=False)
class Event:
    """One entry's meaning for clients. `id` is None for the ephemeral kind.

    `data` is JSON text if `is_json`, else any text, both UTF-8. `to` limits the recipients: a
    principal receives it if the two selector sets meet; None means everyone entitled. `extra` are
    the entry's fields that the schema does not know, for the door that wrote them. `door` limits an
    event of the ephemeral kind to the clients of one door; it means nothing there beyond. `after`
    is where this worker was in the stream when one of the ephemeral kind came.
    `frames` caches encodings by encoder.
    """

    channel: Channel
    id: EntryID | None
    data: bytes
    is_json: bool
    type: str | None = None
    uid: str | None = None
    to: frozenset[str] | None = None
    client: str | None = None
    info: bytes | None = None
    extra: Mapping[bytes, bytes] = field(default_factory=dict)
    door: str | None = None
    after: EntryID | None = None
    frames: dict[object, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Revocation:
    """A revocation entry: no event after `id` is delivered to `user` on this channel."""

    id: EntryID
    user: str


@dataclass(frozen=True, slots=True)
class Grant:
    """A grant entry: from `id` on a revocation of `user` no longer holds on this stream.

    It is not delivered and changes no subscription. Rights are always checked as of now: a client
    that reconnects after a grant receives everything after its position.
    """

    id: EntryID
    user: str


@dataclass(frozen=True, slots=True)
class Broken:
    """An entry that cannot be delivered. Its raw fields are moved to the dead letters."""

    id: EntryID
    reason: str
    fields: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One entry as read: its ID, 16 bits of its content, size in bytes, and what it means."""

    id: EntryID
    digest: int
    size: int
    body: Event | Revocation | Grant | Broken


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """The identity and rights of a client, from its credential.

    `user` is '' for anonymous. `expires_at` is seconds since the epoch, None for never.
    `channels` are the names that the token itself grants; a `*` in them is an ordinary character.
    `patterns`, where `*` matches any run of characters, come from native tokens only: the names in
    other protocols' tokens were chosen by users or by other servers. `unrestricted` is set by the
    native protocol with --insecure only. `door` is the protocol of the client. `grant` is the
    protocol's rule for channels of its own namespace; it is called at every check, so its result
    may change.
    """

    user: str = ""
    groups: frozenset[str] = frozenset()
    client: str = ""
    expires_at: float | None = None
    channels: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()
    unrestricted: bool = False
    door: str = "native"
    grant: Callable[[Channel], bool] | None = field(default=None, compare=False, repr=False)

    def selectors(self) -> frozenset[str]:
        """Return the selectors to match with an entry's `to`: `user:U`, `group:G`, `client:C`."""
        mine = {f"group:{group}" for group in self.groups}
        if self.user:
            mine.add(f"user:{self.user}")
        if self.client:
            mine.add(f"client:{self.client}")
        return frozenset(mine)
