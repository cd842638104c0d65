"""A hub without Redis, with clients that store what they receive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from relay.core.connection import ConnectionInfo
from relay.core.errors import RelayError
from relay.core.metrics import Metrics
from relay.core.model import (
    ZERO_ID,
    Channel,
    EntryID,
    Event,
    Position,
    Principal,
    Record,
    StreamState,
)
from relay.core.reasons import Reason
from relay.core.stream_interface import Examined, ExamineRequest, Followed
from relay.hub.hub import Hub
from relay.hub.recovery import Notice
from relay.hub.session import Session, Subscription
from relay.stream.format.keys import Keys

NEWS = Channel("news")
KEYS = Keys("relay:")
# The incarnation of a stream with life 1, on a server without a replication history.
INCARNATION = 1 << 32


class Reads:
    def __init__(self) -> None:
        self.examine: list[Followed] = []
        self.pages: list[Followed] = []
        self.reads: list[Followed] = []
        self.released: list[Followed] = []

    def follow(self, stream: Followed) -> None:
        stream.key = KEYS.stream(stream.channel)

    def want_join(self, stream: Followed) -> None:
        self.examine.append(stream)

    def want_examine(self, stream: Followed) -> None:
        self.examine.append(stream)

    def want_read(self, stream: Followed) -> None:
        self.reads.append(stream)

    def want_page(self, stream: Followed) -> None:
        self.pages.append(stream)

    def release(self, stream: Followed) -> None:
        self.released.append(stream)


class Rights:
    def allowed(
        self, principal: Principal, channel: Channel, hash_value: bytes | None, *, admitted: bool
    ) -> bool:
        del principal, channel, admitted
        return hash_value != b"-"

    def asks_again(self, principal: Principal, channel: Channel) -> bool:
        del principal, channel
        return False


class Words:
    """An encoder whose frames are readable words."""

    door = "words"

    def __init__(self, *, personal: bool = False, speechless: bool = False) -> None:
        self.personal = personal
        self.speechless = speechless
        self.encoded = 0

    def event(self, event: Event) -> bytes:
        self.encoded += 1
        return event.data + b" "

    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        if position is None:
            return shared
        cursor = subscription.session.cursor(event.channel, position)
        return shared + b",".join(f"{c}@{at.id}+{at.added}".encode() for c, at in cursor) + b" "

    def notice(self, channel: Channel, notice: Notice) -> bytes | None:
        if self.speechless:
            return None
        return f"!{channel}:{notice.reason} ".encode()


class Client:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.on_notice: Callable[[], None] = lambda: None

    def subscribed(self, subscription: Subscription) -> None:
        self.told.append(f"subscribed {subscription.feed.channel}")

    def refused(self, channel: Channel, error: RelayError) -> None:
        self.told.append(f"refused {channel}: {type(error).__name__}")

    def dropped(self, channel: Channel, notice: Notice) -> None:
        self.told.append(f"dropped {channel}: {notice.reason}")

    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        self.told.append(f"noticed {subscription.feed.channel}: {notice.reason}")
        self.on_notice()

    def expired(self) -> None:
        self.told.append("expired")

    def disconnect(self, reason: Reason) -> None:
        self.told.append(f"disconnect: {reason}")


class Outbox:
    def __init__(self) -> None:
        self.full = False
        self.info: ConnectionInfo | None = None
        self.transport_name = "memory"
        self.close_code: int | None = None
        self.ending: Reason | None = None
        self.writes: list[bytes] = []

    def waiting_bytes(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self, last: bytes = b"") -> None:
        self.writes.append(last)


def make_hub(reads: Reads, *, most: int = 0) -> Hub:
    def at_once(call: Callable[[], None]) -> None:
        call()

    hub = Hub(
        rights=Rights(),
        metrics=Metrics(),
        call_soon=at_once,
        spawn=lambda work: asyncio.get_running_loop().create_task(work),
        connections_per_user=most,
    )
    hub.reads = reads
    return hub


def join(
    hub: Hub, principal: Principal, encoder: Words, *channels: Channel
) -> tuple[Session, Client, Outbox]:
    client, outbox = Client(), Outbox()
    session = hub.open(principal, encoder, client)
    session.attach(outbox)
    for channel in channels or (NEWS,):
        hub.subscribe(session, channel, None)
    return session, client, outbox


def examine(
    hub: Hub,
    channel: Channel = NEWS,
    *,
    marker: int | None = INCARNATION,
    last: EntryID | None = None,
    **rights: bytes,
) -> ExamineRequest:
    """Reply to the feed's examination as for an empty stream."""
    feed = hub.feed(channel)
    assert feed
    request = feed.examine_request()
    state = StreamState(
        exists=True,
        first=None,
        last=last or feed.position,
        length=0,
        added=feed.added or 0,
        max_deleted=ZERO_ID,
        incarnation=marker,
    )
    values = {user: rights.get(user) for user in request.users}
    feed.on_examined(request, Examined(state=state, rights=values, own={}))
    return request


def event(text: str, number: int, to: str | None = None) -> Record:
    entry_id = EntryID(number, 0)
    recipients = None if to is None else frozenset({to})
    body = Event(NEWS, entry_id, text.encode(), is_json=False, to=recipients)
    return Record(entry_id, 0, len(text), body)
