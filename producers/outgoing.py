"""Events that a producer sends, checked before sending, and the outcome of sending them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from relay.core.durability import Durability
from relay.core.errors import RelayError
from relay.core.model import Channel, EntryID, parse_channel
from relay.stream.format import entry

UID_BYTES = 255
# How long Redis remembers a uid. A spool can be delivered again after shorter outages without
# publishing an event twice.
WINDOW_S = 24 * 3600
SPOOL_BYTES = 64 * 1024 * 1024


class PublishFailed(RelayError):
    """The event was neither delivered nor spooled. The text gives the reason in one line.

    `unknown` is True if the event was sent but not acknowledged, so that it may have been appended.
    Publish it again only if it has a uid; otherwise it could appear twice.
    """

    def __init__(self, text: str, *, unknown: bool = False) -> None:
        super().__init__(text)
        self.unknown = unknown


class InvalidEvent(PublishFailed, ValueError):
    """Relay could not deliver such an event. The text gives the reason in one line."""


class DestinationUnavailable(RelayError):
    """Relay or Redis cannot accept events at the moment. The caller can retry.

    `sent` is True if the events may have arrived although no reply was received.
    """

    def __init__(self, text: str, *, sent: bool = False) -> None:
        super().__init__(text)
        self.sent = sent


@dataclass(frozen=True, slots=True)
class RejectedEvent:
    """This event was rejected permanently. Other events may be accepted."""

    reason: str


@dataclass(frozen=True, slots=True)
class PostponedEvent:
    """This event was rejected for a temporary reason.

    `sent` is True if it was appended, but not as durably as wanted.
    """

    reason: str
    sent: bool = False


# None: accepted by a server that does not return entry IDs.
Outcome = EntryID | RejectedEvent | PostponedEvent | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingEvent:
    """One event. `to` is None or the recipients, in the form that `entry.encode` expects."""

    channel: Channel
    data: bytes
    uid: str | None = None
    type: str | None = None
    to: tuple[str, ...] | None = None
    client: str | None = None
    durability: Durability | None = None

    def fields(self) -> list[bytes]:
        """Return the fields and values for XADD as one flat list."""
        return entry.encode(self.data, type=self.type, uid=self.uid, to=self.to, client=self.client)


class Sender(Protocol):
    """Sends events to Redis or to relay's HTTP API: a single event, or several that have uids."""

    async def send(
        self, events: Sequence[OutgoingEvent], on_sending: Callable[[], None]
    ) -> list[Outcome]:
        """Send the events in order and return the outcome of each.

        There is no time limit; the caller cancels the call. `on_sending` is called before the
        first byte is written: from then on the events may arrive.

        Raises:
            DestinationUnavailable: The outcome of at least one event is unknown.
        """
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


async def send_until(
    deadline: float, sender: Sender, events: Sequence[OutgoingEvent]
) -> list[Outcome]:
    """Call `sender.send()`. Raise DestinationUnavailable at `deadline` (time of the event loop)."""
    sending = asyncio.Event()
    try:
        async with asyncio.timeout_at(deadline):
            return await sender.send(events, sending.set)
    except TimeoutError as exc:
        raise DestinationUnavailable(
            "no reply within the time limit", sent=sending.is_set()
        ) from exc


def outgoing_event(
    channel: str,
    data: object,
    *,
    uid: str | None = None,
    type: str | None = None,
    to: str | Iterable[str] | None = None,
    client: str | None = None,
    durability: str | None = None,
) -> OutgoingEvent:
    """Check the arguments and return them as an event.

    Args:
        channel: Name of the channel.
        data: str and bytes are sent unchanged, other values as JSON.
        uid: 1 to 255 bytes; events with the same uid are appended once.
        type: Type of the event.
        to: Recipients as in an entry's field (`"anna, group:kitchen"`), or an iterable of names.
        client: ID of the client that caused the event.
        durability: As `[namespace] durability`.

    Raises:
        InvalidEvent: Relay could not deliver such an event.
    """
    try:
        event = _event(channel, data, uid=uid, type=type, to=to, client=client)
        return replace(event, durability=Durability.parse(durability) if durability else None)
    except (ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise InvalidEvent(str(exc)) from exc


def _event(
    channel: str,
    data: object,
    *,
    uid: str | None,
    type: str | None,
    to: str | Iterable[str] | None,
    client: str | None,
) -> OutgoingEvent:
    if isinstance(data, str):
        data = data.encode()
    elif not isinstance(data, bytes):
        data = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    names = None
    if to is not None:
        names = tuple(sorted(entry.recipients(to if isinstance(to, str) else list(to))))
    if uid is not None and not 0 < len(uid.encode()) <= UID_BYTES:
        raise ValueError(f"uid must have 1 to {UID_BYTES} bytes")
    event = OutgoingEvent(
        channel=parse_channel(channel), data=data, uid=uid, type=type, to=names, client=client
    )
    event.fields()  # raises ValueError if relay could not decode the entry
    return event
