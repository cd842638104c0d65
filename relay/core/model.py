"""Values that all layers share: channels, entry IDs, positions, events, principals.

All values are immutable, except that an `Event` caches its encoded frames, so that each protocol
encodes it only once for all clients.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, NewType, TypedDict

Channel = NewType("Channel", str)

# Protocols prefix their channels with these. Other protocols must not use them as namespaces.
RESERVED_NAMESPACES = frozenset({"seafile", "pydio", "axr"})
# Every character is allowed except unpaired surrogates, which have no UTF-8 encoding. Special
# characters are escaped in keys, see relay/stream/format/keys.py.
_CHANNEL = re.compile(r"[^\ud800-\udfff]{1,255}", re.DOTALL)


def parse_channel(text: str) -> Channel:
    """Return `text` as a channel. Raise ValueError if it is empty, too long or not valid UTF-8."""
    if not _CHANNEL.fullmatch(text):
        raise ValueError(f"channel must have 1 to 255 characters of valid UTF-8; {_problem(text)}")
    return Channel(text)


def _problem(text: str) -> str:
    if not text:
        return "this one is empty"
    return f"this one has {len(text)}" if len(text) > 255 else "this one has an unpaired surrogate"


def namespace_of(channel: Channel) -> str:
    """Return the text before the first ':', or '' if there is none."""
    head, colon, _ = channel.partition(":")
    return head if colon else ""


class EntryID(NamedTuple):
    """The ID of a stream entry. IDs are compared as two numbers, not as text."""

    ms: int
    seq: int

    def __str__(self) -> str:
        return f"{self.ms}-{self.seq}"

    @classmethod
    def parse(cls, text: str | bytes) -> EntryID:
        """Parse `ms-seq` or `ms`. Raise ValueError for anything else."""
        if isinstance(text, str):
            text = text.encode(errors="replace")
        head, dash, tail = text.partition(b"-")
        # Only ASCII digits are digits in bytes.
        if head.isdigit() and (tail.isdigit() or not dash):
            ms, seq = int(head), int(tail or 0)
            if not (ms >> 64 or seq >> 64):
                return cls(ms, seq)
        raise ValueError(f"not an entry ID: {text[:50].decode(errors='replace')!r}")


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
    """A position in one stream: all entries up to and including `id` have been received.

    A plain stream ID has only `id`. Relay's own positions also contain `added` (the number of
    entries ever added up to here), `incarnation` (see `StreamState`) and `digest` (a 16-bit hash of
    the entry at `id`).
    """

    id: EntryID
    added: int | None = None
    incarnation: int | None = None
    digest: int | None = None


class Marker(NamedTuple):
    """The groups that store a stream's incarnation (see `relay.stream.read.groups`).

    `is_current` is True if no entry was lost since the certificate in `id` was written.
    """

    id: EntryID
    is_current: bool


@dataclass(slots=True, kw_only=True)  # not frozen: one is created per read, at twice the speed
class StreamState:
    """Snapshot of a stream, from XINFO STREAM and XINFO GROUPS.

    `first` is None if the stream is empty. `added` is the number of entries ever appended.
    `max_deleted` is the highest ID that XDEL removed; trimming does not change it. `blocks` is the
    number of nodes in which Redis stores the entries.

    `incarnation` is None if the stream has no marker group or the groups were not read. Its upper
    32 bits identify the life of the stream, which ends with DEL and FLUSHALL. Its lower 32 bits
    identify the history of the entries, which ends when Redis may have lost some, at a failover or
    a restart. Such a loss concerns positions up to `failover`; None if there was none. `marker` is
    what the stream itself stores.
    """

    exists: bool
    first: EntryID | None
    last: EntryID
    length: int
    added: int
    max_deleted: EntryID
    blocks: int = field(default=0, compare=False)
    incarnation: int | None = None
    failover: EntryID | None = None
    marker: Marker | None = None


@dataclass(slots=True, eq=False)
class Event:
    """The meaning of an entry for clients. `id` is None for an ephemeral event.

    `data` is JSON if `is_json`, otherwise any text, both in UTF-8. `to` limits the recipients to
    principals with one of these selectors; None means all principals with the right to read.
    `extra` contains fields beyond the schema, for the protocol that wrote them. `door` limits an
    ephemeral event to the clients of one protocol. `after` is this worker's position in the stream
    when an ephemeral event arrived. `frames` caches encodings by encoder.
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
    """A grant entry: from `id` on, an earlier revocation of `user` is no longer effective.

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


class Record(NamedTuple):
    """One entry as read: its ID, a 16-bit hash of its content, its size in bytes, its meaning."""

    id: EntryID
    digest: int
    size: int
    body: Event | Revocation | Grant | Broken


# One for all: each new empty frozenset would take 216 bytes.
_NO_SELECTORS: frozenset[str] = frozenset()


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
        selectors = {f"group:{group}" for group in self.groups}
        if self.user:
            selectors.add(f"user:{self.user}")
        if self.client:
            selectors.add(f"client:{self.client}")
        return frozenset(selectors) if selectors else _NO_SELECTORS
