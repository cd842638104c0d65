"""The interface between the hub and `relay.stream`: requests, results and callbacks.

The hub does no I/O, and `relay.stream` has no access to clients. A *followed* stream is a channel
with at least one local client. The hub owns its object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from relay.core.model import Channel, EntryID, Event, Record, StreamState


@dataclass(frozen=True, slots=True)
class ExamineRequest:
    """Request to read the state and rights of a stream in one transaction.

    `users` are the fields to read from the rights hash. `own` are the IDs whose entries are needed.
    `context` is for the hub, which receives the request again with the result. With `mark`, the
    stream and its marker group are created if they do not exist. It is set only after a client's
    right to read the stream has been confirmed.
    """

    users: tuple[str, ...]
    own: tuple[EntryID, ...]
    context: object
    mark: bool = False


@dataclass(frozen=True, slots=True)
class Examined:
    """Result of an examination: state, rights and the digests of the `own` entries."""

    state: StreamState
    rights: Mapping[str, bytes | None]
    own: Mapping[EntryID, int]


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Request for the entries after `start`, for lagging clients.

    `reached` is this worker's position at the time of the request. All entries up to it exist.
    """

    start: EntryID
    reached: EntryID


@dataclass(frozen=True, slots=True)
class Page:
    """Entries after the start of the request, in order, and the stream's state at that time.

    `complete` is True if there were no further entries.
    """

    state: StreamState
    records: Sequence[Record]
    complete: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The newest entries of a stream, newest first, and the stream's state at that time.

    `events` are the records that are delivered to clients. `whole` is True if there are no older
    entries.
    """

    state: StreamState
    records: Sequence[Record]
    events: Sequence[Event]
    whole: bool


class Followed(Protocol):
    """A stream with local clients. The reader calls these methods."""

    channel: Channel
    # The stream's key in Redis. The reader sets it when it follows the stream.
    key: bytes
    alive: bool
    exists: bool
    marked: bool
    settled: bool
    misaligned: bool
    average_bytes: float
    # Digest of the entry at `position`, or None if it is not known or there is none.
    digest: int | None

    @property
    def has_waiting(self) -> bool:
        """Return True if a client waits for the next examination."""

    @property
    def position(self) -> EntryID:
        """Return this worker's position W. All local clients were offered the entries up to it."""

    def examine_request(self) -> ExamineRequest:
        """Return the next request, which includes all subscriptions that are waiting now."""

    def on_examined(self, request: ExamineRequest, examined: Examined) -> None:
        """Handle the result of an examination."""

    def on_examine_failed(self, request: ExamineRequest, reason: str) -> None:
        """Handle a reply that is an error, for example because the key is not a stream."""

    def on_examine_lost(self, request: ExamineRequest) -> None:
        """Re-queue the waiting subscriptions: the connection was lost before the reply."""

    def on_records(self, records: Sequence[Record]) -> None:
        """Handle the entries that directly follow `position`, in order."""

    def on_end(self, last: EntryID) -> None:
        """Advance to `last`, the stream's last generated ID, which is after `position`.

        There are no other entries before it.
        """

    def on_read_to_end(self) -> None:
        """Handle a read that returned all entries. It was sent after the last command was read."""

    def on_gap(self, state: StreamState, first_read: EntryID | None, following: int | None) -> None:
        """Handle the removal of unread entries after `position`.

        `first_read` is the first entry that remains, or None. `following` is as in `has_gap`.
        """

    def on_unsettled(self) -> None:
        """Request an examination: the consumer group or the connection was lost."""

    def on_rights_changed(self) -> None:
        """Check the rights of all subscriptions again: the rights hash was changed."""

    def on_ephemeral(self, event: Event) -> None:
        """Deliver an ephemeral event."""

    def has_same_incarnation(self, state: StreamState) -> bool:
        """Return True if the state, read with its marker, has the examined incarnation."""

    def has_gap(self, state: StreamState, following: int | None) -> bool:
        """Return True if unread entries after `position` were removed.

        `following` is the number of entries after it, or None if not all of them were read.
        """

    def page_request(self) -> PageRequest | None:
        """Return the next page request of lagging clients, or None if all are caught up."""

    def on_page(self, request: PageRequest, page: Page) -> None:
        """Deliver a page to lagging clients."""


class StreamReads(Protocol):
    """Requests of the hub. The results arrive later, through `Followed`."""

    def follow(self, stream: Followed) -> None:
        """Start to read the stream and to receive its ephemeral events."""

    def want_join(self, stream: Followed) -> None:
        """Schedule an examination for a new client. Clients that join at once share it."""

    def want_examine(self, stream: Followed) -> None:
        """Schedule an examination."""

    def want_read(self, stream: Followed) -> None:
        """Schedule a read of the stream, up to its end."""

    def want_page(self, stream: Followed) -> None:
        """Schedule a page for lagging clients that can receive more."""

    def release(self, stream: Followed) -> None:
        """Stop reading: the last local client has unsubscribed."""
