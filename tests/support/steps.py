"""Two real workers (hub, live reads, pages) on a real server, controlled one step at a time.

The server executes a worker's commands at once. The worker receives the replies in a separate step,
so that replies interleave with appends, trims, revocations and lost connections. Invalidations come
from the server.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, cast

import orjson

from relay.config.settings import StreamSettings
from relay.core.connection import ConnectionInfo
from relay.core.errors import RelayError
from relay.core.metrics import Metrics
from relay.core.model import ZERO_ID, Channel, EntryID, Event, Position, Principal
from relay.core.reasons import Reason
from relay.core.stream_interface import Followed
from relay.hub.hub import Hub
from relay.hub.recovery import Notice
from relay.hub.session import Session, Subscription
from relay.stream.connection.primary import Primary, Replication
from relay.stream.format import entry
from relay.stream.format.keys import Keys
from relay.stream.read.control_reader import ControlReader
from relay.stream.read.groups import CERTIFY, group_of
from relay.stream.read.pipelines import LivePipelines, PagePipelines
from tests.support.ledger import Ledger, Received
from tests.support.wire import Wire

CHANNELS = [Channel("news"), Channel("work")]
USERS = ["ann", "bob"]
# The token of ann grants all channels. The rights of bob are in the rights hash.
CLAIMS = frozenset({"ann"})
BUFFER_BYTES = 250
# Four entries per page, because schedules are short and must reach every limit.
PAGE_BYTES = 2048
ENTRY_BYTES = 500


class Rights:
    """The rights of the hub: a claim, unless the rights hash overrides it."""

    def allowed(
        self, principal: Principal, channel: Channel, hash_value: bytes | None, *, admitted: bool
    ) -> bool:
        del channel, admitted
        return hash_value == b"r" or (hash_value is None and principal.user in CLAIMS)

    def asks_again(self, principal: Principal, channel: Channel) -> bool:
        del principal, channel
        return False


class Format:
    """Encodes lines of JSON. A personal one contains the client's whole cursor."""

    door = "native"

    def __init__(self, clock: Clock, *, personal: bool) -> None:
        self.personal = personal
        self._clock = clock

    def event(self, event: Event) -> bytes:
        return orjson.dumps(
            {"c": event.channel, "e": int(event.data), "i": str(event.id), "k": self._clock.now}
        )[:-1] + (b"" if self.personal else b"}\n")

    def personal_event(
        self,
        event: Event,
        position: Position | None,
        subscription: Subscription,
        shared: bytes,
    ) -> bytes:
        assert position is not None
        cursor = subscription.session.cursor(event.channel, position)
        places = {
            channel: (str(at.id), at.added, at.incarnation, at.digest) for channel, at in cursor
        }
        return shared + b',"p":' + orjson.dumps(places) + b"}\n"

    def notice(self, channel: Channel, notice: Notice) -> bytes:
        told = {"c": channel, "n": notice.kind, "r": notice.reason, "k": self._clock.known_at}
        return orjson.dumps(told) + b"\n"


class Clock:
    """The step of the schedule, and the step of the snapshot that is being processed."""

    def __init__(self) -> None:
        self.now = 0
        self.known_at = 0


class Outbox:
    """A socket whose peer reads on request."""

    def __init__(self) -> None:
        self.data = b""
        self.full = False
        self.info: ConnectionInfo | None = None
        self.transport_name = "memory"
        self.close_code: int | None = None
        self.ending: Reason | None = None

    def waiting_bytes(self) -> int:
        return len(self.data)

    def write(self, data: bytes) -> None:
        # The size of unsent data must not exceed the limit by more than one turn's events.
        assert not self.full or b'"e":' not in data, "an event for a full socket"
        self.data += data
        self.full = self.full or len(self.data) > BUFFER_BYTES

    def close(self, last: bytes = b"") -> None:
        self.data += last


class Person:
    """A client that connects repeatedly, with everything it has received."""

    def __init__(self, name: str, user: str, ledger: Ledger, clock: Clock) -> None:
        self.name = name
        self.user = user
        self.ledger = ledger
        self.clock = clock
        self.views = {channel: Received() for channel in CHANNELS}
        self.bare: dict[Channel, EntryID] = {}
        self.places: dict[Channel, Position] = {}
        self.anew: set[Channel] = set()
        self.worker: Worker | None = None
        self.session: Session | None = None
        self.outbox = Outbox()
        self.standing: set[Channel] = set()

    # relay.hub.session.Client

    def subscribed(self, subscription: Subscription) -> None:
        channel = subscription.feed.channel
        view = self.views[channel]
        self.standing.add(channel)
        self.ledger.admitted(view, channel, self.user, self.clock.known_at)
        if channel in self.anew:
            self.anew.discard(channel)
            self.ledger.began(view, channel, self.clock.known_at)
            self.bare[channel] = subscription.position.id
            self.places[channel] = subscription.position

    def refused(self, channel: Channel, error: RelayError) -> None:
        del error
        self.anew.discard(channel)

    def dropped(self, channel: Channel, notice: Notice) -> None:
        del notice
        self.ledger.dropped(self.views[channel], channel, self.user)
        self.standing.discard(channel)

    def noticed(self, subscription: Subscription, notice: Notice) -> None:
        raise AssertionError(notice)

    def expired(self) -> None:
        raise AssertionError

    def disconnect(self, reason: Reason) -> None:
        raise AssertionError(reason)

    # ---- actions of the test

    def connect(self, worker: Worker, channels: Iterable[Channel], how: str) -> None:
        assert self.session is None
        self.worker = worker
        self.outbox = Outbox()
        principal = Principal(user=self.user)
        personal = self.name.endswith("p")
        encoder = worker.personal if personal else worker.shared
        self.session = worker.hub.open(principal, encoder, self)
        self.session.attach(self.outbox)
        for channel in channels:
            self.subscribe(channel, how)

    def subscribe(self, channel: Channel, how: str) -> None:
        assert self.worker
        assert self.session
        if channel in self.session.subscriptions:
            return
        self.read()
        start: Position | None = None
        if how == "full":
            start = self.places.get(channel)
        if start is None and how != "anew" and channel in self.bare:
            start = Position(self.bare[channel])
        # A bare 0-0 means the beginning of the existing stream.
        if start is None or start == Position(ZERO_ID):
            self.anew.add(channel)
        else:
            self.anew.discard(channel)
        self.worker.hub.subscribe(self.session, channel, start)

    def unsubscribe(self, channel: Channel) -> None:
        if self.worker and self.session and channel in self.session.subscriptions:
            self.read()
            self._keep_place(channel)
            self.worker.hub.unsubscribe(self.session, channel)
            self.standing.discard(channel)

    def read(self) -> None:
        """Read all data in the socket."""
        data, self.outbox.data = self.outbox.data, b""
        for line in data.splitlines():
            frame = orjson.loads(line)
            channel = Channel(frame["c"])
            view = self.views[channel]
            if "n" in frame:
                notice = Notice(frame["n"], Reason(frame["r"]))
                self.ledger.received_notice(view, channel, self.user, notice, frame["k"])
                continue
            self.ledger.received_event(view, channel, self.user, frame["e"], frame["k"])
            self.bare[channel] = EntryID.parse(frame["i"])
            self.places.pop(channel, None)
            for name, (entry_id, *rest) in frame.get("p", {}).items():
                self.places[Channel(name)] = Position(EntryID.parse(entry_id), *rest)

    def drain(self) -> None:
        self.read()
        self.outbox.full = False
        if self.session is not None and self.session.paused:
            self.session.resume()

    def fill(self) -> None:
        """Fill the socket with other data."""
        self.outbox.full = True
        if self.session is not None:
            self.session.pause()

    def leave(self, *, politely: bool) -> None:
        """Disconnect after all sent data has arrived, with relay's last position."""
        if self.session is None:
            return
        if politely:
            self.read()
            for channel in self.standing:
                self._keep_place(channel)
        self.session.end()
        self.session = None
        self.worker = None
        self.standing.clear()
        self.anew.clear()

    def _keep_place(self, channel: Channel) -> None:
        if self.session is not None and channel in self.standing:
            self.places[channel] = self.session.subscriptions[channel].position


def _no_task(work: Coroutine[Any, Any, None]) -> None:
    raise AssertionError(f"{work} in a world without a loop")


class Worker:
    """A relay process without its event loop: connections, reads and hub."""

    def __init__(
        self, name: str, port: int, keys: Keys, clock: Clock, formats: tuple[Format, Format]
    ) -> None:
        self.name = name
        self.port = port
        self.clock = clock
        self.shared, self.personal = formats
        self._keys = keys
        self._later: list[Callable[[], None]] = []
        self._followed: dict[Channel, Followed] = {}
        metrics = Metrics()
        self.hub = Hub(
            rights=Rights(),
            metrics=metrics,
            call_soon=self._later.append,
            spawn=_no_task,
        )
        self.hub.reads = self
        self._primary = Primary()
        settings = StreamSettings().model_copy(update={"page_bytes": PAGE_BYTES})
        decode = partial(entry.decode, max_bytes=settings.max_entry_bytes)
        self._taken = 0
        self.live = LivePipelines(
            keys=keys,
            instance=name,
            primary=self._primary,
            settings=settings,
            metrics=metrics,
            decode=decode,
            control=ControlReader(keys, lambda _command: None, lambda: self.hub.recheck(None)),
        )
        self.pages = PagePipelines(primary=self._primary, settings=settings, decode=decode)
        self._asked: tuple[int, list[object]] | None = None
        self._asked_pages: tuple[int, list[object]] | None = None
        self._open()

    def _open(self) -> None:
        self._connection = Wire(self.port, self._on_push)
        self._connection.call("CLIENT", "TRACKING", "ON")
        self._connection.call("SCRIPT", "LOAD", CERTIFY.text)
        self._page_link = Wire(self.port)
        info = cast(bytes, self._connection.call("INFO", "replication"))
        server = cast(bytes, self._connection.call("INFO", "server"))
        run_id = re.search(rb"run_id:(\w+)", server)
        assert run_id
        self._primary.connected(run_id[1], Replication.parse(info))

    def close(self) -> None:
        self._connection.close()
        self._page_link.close()

    # relay.core.stream_interface.StreamReads

    def follow(self, stream: Followed) -> None:
        stream.key = self._keys.stream(stream.channel)
        self._followed[stream.channel] = stream
        # Set the average of a stream that has been read for long, so that each page has four
        # entries.
        stream.average_bytes = ENTRY_BYTES

    def want_join(self, stream: Followed) -> None:
        self.live.want_examine(stream)

    def want_examine(self, stream: Followed) -> None:
        self.live.want_examine(stream)

    def want_read(self, stream: Followed) -> None:
        self.live.want_read(stream)

    def want_page(self, stream: Followed) -> None:
        self.pages.want(stream)

    def release(self, stream: Followed) -> None:
        del self._followed[stream.channel]
        self.live.discard(stream)
        self.pages.discard(stream)
        key = self._keys.stream(stream.channel)
        self._connection.call("XGROUP", "DESTROY", key, group_of(self.name))

    # wake-ups

    def _on_push(self, push: list[object]) -> None:
        assert push[0] == b"invalidate", push
        keys = push[1]
        if not isinstance(keys, list):
            self.live.want_control()
            for stream in self._followed.values():
                stream.on_unsettled()
            return
        for key in keys:
            channel = self._keys.channel_of_stream(key)
            if channel is not None and channel in self._followed:
                self.live.want_read(self._followed[channel])
            channel = self._keys.channel_of_rights(key)
            if channel is not None and channel in self._followed:
                self._followed[channel].on_rights_changed()
            if key == self._keys.control:
                self.live.want_control()

    # steps

    @property
    def busy(self) -> bool:
        requested = self.live.has_work or self.pages.has_work
        return bool(requested or self._asked or self._asked_pages or self._later)

    def receive_pushes(self) -> None:
        """Process every push that the server has sent so far."""
        self._connection.call("PING")

    def ask(self) -> None:
        if self._asked is None and self.live.has_work:
            commands = self.live.commands()
            if commands:
                self._asked = self.clock.now, self._connection.execute(commands)

    def take(self) -> None:
        if self._asked is not None:
            (self.clock.known_at, replies), self._asked = self._asked, None
            self._taken += 1
            if self._taken % 5 == 0:
                # A second has passed. Groups are moved now, also while a read is on its way.
                self.live.retry_paused()
            self.live.on_replies(replies)
            self.flush()

    def ask_pages(self) -> None:
        if self._asked_pages is None and self.pages.has_work:
            commands = self.pages.commands()
            if commands:
                self._asked_pages = self.clock.now, self._page_link.execute(commands)

    def take_pages(self) -> None:
        if self._asked_pages is not None:
            (self.clock.known_at, replies), self._asked_pages = self._asked_pages, None
            self.pages.on_replies(replies)
            self.flush()

    def work(self) -> None:
        self.receive_pushes()
        self.ask()
        self.take()
        self.ask_pages()
        self.take_pages()

    def flush(self) -> None:
        """End a turn of the event loop."""
        later, self._later[:] = list(self._later), []
        for call in later:
            call()
        self.hub.flush()
        self.clock.known_at = self.clock.now

    def lose_links(self) -> None:
        """Lose the connections. The commands may have been executed, but their replies are lost."""
        self.close()
        self._asked = self._asked_pages = None
        self._open()
        self.live.connected()
        self.live.all_unsettled(self._followed.values())


def distinct_markers() -> Callable[[], int]:
    """Return a function that returns distinct markers.

    Random ones agree in 16 bits in one of 65,536 pairs, which is too often for a million schedules.
    """
    numbers = itertools.count(1)
    return lambda: next(numbers)
