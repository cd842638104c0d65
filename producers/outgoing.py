"""What a producer hands over: one event, checked before anything is sent, and how sending ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from relay.core.errors import RelayError
from relay.core.model import Channel, EntryID, parse_channel
from relay.stream.format import entry

UID_BYTES = 255
# How long Redis remembers a uid: longer than any outage after which a spool must not repeat.
WINDOW_S = 24 * 3600
SPOOL_BYTES = 64 * 1024 * 1024


class PublishFailed(RelayError):
    """The event was neither delivered nor spooled; the text says why, in one line.

    `unknown` is true where it was sent and no answer came: it may have been appended. Only an
    event with a uid can then be published again without the risk of a second one.
    """

    def __init__(self, text: str, *, unknown: bool = False) -> None:
        super().__init__(text)
        self.unknown = unknown


class DestinationUnavailable(RelayError):
    """The relay or Redis cannot take events now; the same ones may be sent again.

    `sent` is true where they may have arrived all the same.
    """

    def __init__(self, text: str, *, sent: bool = False) -> None:
        super().__init__(text)
        self.sent = sent


@dataclass(frozen=True, slots=True)
class RejectedEvent:
    """This event was refused, and would be again; others may go through."""

    reason: str


@dataclass(frozen=True, slots=True)
class PostponedEvent:
    """This event was not taken, for a reason that may pass."""

    reason: str


# None: taken, under an ID that this way of sending does not tell.
Outcome = EntryID | RejectedEvent | PostponedEvent | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingEvent:
    """One event as its producer meant it. `to` is None or the names, as `entry.encode` wants."""

    channel: Channel
    data: bytes
    uid: str | None = None
    type: str | None = None
    to: tuple[str, ...] | None = None
    client: str | None = None

    def fields(self) -> list[bytes]:
        """Flat fields for XADD."""
        return entry.encode(self.data, type=self.type, uid=self.uid, to=self.to, client=self.client)


class Sender(Protocol):
    """A way to the relay. One event, or several that all have a uid."""

    async def send(
        self, events: Sequence[OutgoingEvent], leaving: Callable[[], None]
    ) -> list[Outcome]:
        """Send in order; what became of each. `Away` where that is not known of all of them.

        Has no time limit of its own: the caller cancels it. From the call of `leaving` on the
        events may arrive.
        """
        ...

    async def close(self) -> None:
        """Give up connections."""
        ...


async def send_until(
    deadline: float, sender: Sender, events: Sequence[OutgoingEvent]
) -> list[Outcome]:
    """`sender.send`, given up at this time of the loop's clock with Away."""
    left = asyncio.Event()
    try:
        async with asyncio.timeout_at(deadline):
            return await sender.send(events, left.set)
    except TimeoutError as exc:
        raise DestinationUnavailable("no answer within the time limit", sent=left.is_set()) from exc


def outgoing(
    channel: str,
    data: object,
    *,
    uid: str | None = None,
    type: str | None = None,
    to: str | Iterable[str] | None = None,
    client: str | None = None,
) -> OutgoingEvent:
    """An event from what a caller gave.

    `data`: str and bytes as they are, anything else as JSON. `to`: names as in an entry's field
    (`"anna, group:kitchen"`), or an iterable of names. ValueError or TypeError, with the reason,
    for what no relay could deliver.
    """
    if isinstance(data, str):
        data = data.encode()
    elif not isinstance(data, bytes):
        data = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    names = None
    if to is not None:
        names = tuple(sorted(entry.recipients(to if isinstance(to, str) else list(to))))
    if uid is not None and not 0 < len(uid.encode()) <= UID_BYTES:
        raise ValueError(f"a uid is 1 to {UID_BYTES} bytes long")
    event = OutgoingEvent(
        channel=parse_channel(channel), data=data, uid=uid, type=type, to=names, client=client
    )
    event.fields()  # raises where the relay would find the entry broken
    return event
