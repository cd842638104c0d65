"""What the hub asks of the stream side, and what comes back.

The hub does no I/O and the stream side knows no clients; these values are all they exchange.
A *followed* stream is a channel with at least one local client; its object belongs to the hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from relay.core.model import Channel, EntryID, Event, Record, StreamState


@dataclass(frozen=True, slots=True)
class ExamineRequest:
    """Look at a stream and its rights in one transaction.

    `users` are the fields of the rights hash wanted; `own` the IDs whose own entries matter.
    With `mark` the stream gets a marker group if it has none, and is created if it is missing. It
    is set only after a client's right to read the stream has been confirmed.
    """

    users: tuple[str, ...]
    own: tuple[EntryID, ...]
    token: object
    mark: bool = False


@dataclass(frozen=True, slots=True)
class Examined:
    """The answer: one moment of the stream, its rights, and the digests of `own` entries."""

    state: StreamState
    rights: Mapping[str, bytes | None]
    own: Mapping[EntryID, int]


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Entries after `start` for clients that are behind. `reached` was this worker's position
    when the request was made: all entries up to it exist already."""

    start: EntryID
    reached: EntryID


@dataclass(frozen=True, slots=True)
class Page:
    """Entries after the request's start, in order. `complete`: there were no more.

    `state` is of the same moment.
    """

    state: StreamState
    records: Sequence[Record]
    complete: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The newest entries of a stream, newest first, and the moment they belong to.

    `events` are what of `records` is for clients; `whole`: there are no older entries.
    """

    state: StreamState
    records: Sequence[Record]
    events: Sequence[Event]
    whole: bool


class Followed(Protocol):
    """A stream with local clients, as the reader sees it."""

    channel: Channel
    alive: bool
    exists: bool
    marked: bool
    settled: bool
    misaligned: bool
    average_bytes: float

    @property
    def has_waiting(self) -> bool:
        """Return True if a client waits for the next examination."""

    @property
    def position(self) -> EntryID:
        """This worker's position W: everything up to it was offered to every local client."""

    def examine_request(self) -> ExamineRequest:
        """What the next examination must answer; everybody waiting now is part of it."""

    def on_examined(self, request: ExamineRequest, examined: Examined) -> None:
        """The examination's answer."""

    def on_examine_failed(self, request: ExamineRequest, reason: str) -> None:
        """Redis answered, but not with a stream (for instance a foreign key of that name)."""

    def on_examine_lost(self, request: ExamineRequest) -> None:
        """The connection was lost before the answer came: whoever waited waits again."""

    def on_records(self, records: Sequence[Record]) -> None:
        """The entries directly after `position`, in order."""

    def on_end(self, last: EntryID) -> None:
        """There was nothing more to read up to `last`, the stream's last generated ID."""

    def on_hole(
        self, state: StreamState, first_read: EntryID | None, following: int | None
    ) -> None:
        """Entries after `position` were removed before they were read; `first_read` is what
        follows now, None where nothing does. `following` as in `untouched`."""

    def on_unsettled(self) -> None:
        """The group or the connection was lost: the position must be judged anew."""

    def on_rights_changed(self) -> None:
        """The rights hash was written: everybody must be checked again."""

    def on_ephemeral(self, event: Event) -> None:
        """An event of the ephemeral kind."""

    def same_life(self, state: StreamState) -> bool:
        """Whether the state, taken with its marker, is of the incarnation that was examined."""

    def untouched(self, state: StreamState, following: int | None) -> bool:
        """Whether nothing after `position` was removed unread. `following`: how many entries
        there are after it, None where more may follow than were read."""

    def page_request(self) -> PageRequest | None:
        """What clients that are behind need next, None if nothing."""

    def on_page(self, request: PageRequest, page: Page) -> None:
        """The page for them."""


class StreamReads(Protocol):
    """What the hub asks for; answers come later, through `Followed`."""

    def follow(self, stream: Followed) -> None:
        """Begin: ephemeral events are received from here on."""

    def want_examine(self, stream: Followed) -> None:
        """Somebody waits for an examination."""

    def want_page(self, stream: Followed) -> None:
        """Somebody is behind and can take more."""

    def release(self, stream: Followed) -> None:
        """The last local client left."""
