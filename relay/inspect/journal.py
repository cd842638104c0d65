"""The journal: a short Redis stream of the events of this worker's clients.

Each worker has one stream, which expires an hour after the worker has ended:

    XADD <p>journal:<instance> MINID ~ <oldest> * n <number of events> events <JSON array>

Events are collected and appended in batches, ten times a second at most. If Redis is too slow, they
are dropped and counted. Nothing here waits for Redis except `run`.

A client without a user is a stranger. Repeated events of strangers are counted per address and
reason and not written, so that a client without a credential cannot fill the journal.

At log level debug, the same events are logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from typing_extensions import override

from relay.core.client_address import network_of
from relay.core.errors import RelayError, Unavailable
from relay.core.model import Principal
from relay.hub.session import SessionObserver
from relay.stream.format.keys import Keys

if TYPE_CHECKING:
    from relay.core.connection import ConnectionInfo
    from relay.core.model import Channel
    from relay.core.reasons import Reason
    from relay.hub.recovery import Notice
    from relay.hub.session import Session, Subscription
    from relay.stream.connection.pipeline_connection import RedisCommand
    from relay.stream.shards.links import ShardLinks

_log = logging.getLogger(__name__)

BATCH_S = 0.1
EXPIRY_S = 3600
_RENEW_S = 60.0
# Events that wait for Redis. Further ones are dropped.
_MAX_WAITING = 10_000
# Events of one entry, and of one append.
_PER_ENTRY, _PER_BATCH = 200, 2_000
# An event has 150 to 400 bytes.
_EVENT_BYTES = 400
# Events of one kind, address and reason that strangers may write per window, and the number of such
# combinations that are counted separately.
_STRANGERS, _WINDOW_S, _KINDS = 10, 60.0, 1_000
_SWEEP_S = 10.0
_TEXT_CHARS = 200
# Subscriptions whose last position an event of a disconnection contains.
_POSITIONS = 20
# Connections whose recent rejections are kept in memory, and rejections of each.
_CONNECTIONS, _RECENT = 1_000, 5

Event = dict[str, Any]


class _StrangerCount:
    """Events of strangers with the same kind, address and reason since `began`."""

    __slots__ = ("began", "event", "suppressed", "written")

    def __init__(self, began: float) -> None:
        self.began = began
        self.written = 0
        self.suppressed = 0
        self.event: Event = {}


class Journal(SessionObserver):
    """Writes the journal of one worker. `run` must be running."""

    def __init__(
        self,
        *,
        links: ShardLinks,
        keys: Keys,
        instance: str,
        events: int,
        now_ms: Callable[[], float],
        rights_of: Callable[[Channel], str] = lambda _: "",
    ) -> None:
        """`events` is the number that is kept; 0 disables the journal. `now_ms` is Redis' time.

        `rights_of` returns the names of the sources that can grant a right to a channel.
        """
        self.dropped = 0
        # Called with each event while an operator watches the live tap.
        self.on_event: Callable[[Event], None] | None = None
        self._links = links
        self._keys = keys
        self._key = keys.journal(instance)
        self._instance = instance
        self._events = events
        self._now_ms = now_ms
        self._rights_of = rights_of
        self._waiting: list[Event] = []
        self._wake = asyncio.Event()
        # The entries in Redis: ID, number of events and size.
        self._entries: deque[tuple[bytes, int, int]] = deque()
        self._kept = self._kept_bytes = 0
        self._renewed_at = -_RENEW_S
        self._strangers: OrderedDict[tuple[str, str, str], _StrangerCount] = OrderedDict()
        self._rejections: OrderedDict[str, deque[Event]] = OrderedDict()

    # ---- from the hub -----------------------------------------------------------------------

    @override
    def connected(self, session: Session) -> None:
        info, outbox = session.info, session.outbox
        if info is None or outbox is None:
            return
        event = self._event("connected", info, session.principal)
        event["transport"] = outbox.transport_name
        if info.agent:
            event["agent"] = info.agent
        if info.forwarded_for:
            event["forwarded_for"] = info.forwarded_for
        self._add(event)

    @override
    def disconnected(self, session: Session, subscriptions: Sequence[Subscription]) -> None:
        info = session.info
        if info is None or session.outbox is None:
            return
        event = self._event("disconnected", info, session.principal)
        code = session.outbox.close_code
        reason = session.ending or session.outbox.ending
        event["reason"] = reason or ("closed by the client" if code else "connection ended")
        if code:
            event["code"] = code
        event["duration_s"] = round(max(0.0, time.time() - info.since), 1)
        if subscriptions:
            event["positions"] = {
                each.feed.channel: str(each.at) for each in subscriptions[:_POSITIONS]
            }
        self._add(event)

    @override
    def subscribed(self, subscription: Subscription) -> None:
        event = self._of(subscription.session, "subscribed", subscription.feed.channel)
        event["after"] = str(subscription.began)
        if subscription.start is not None:
            event["resumed"] = True
        self._add(event)

    @override
    def rejected(self, session: Session, channel: Channel, error: RelayError, rule: str) -> None:
        event = self._of(session, "rejected", channel)
        event["reason"] = getattr(error, "code", "unavailable")
        event["detail"] = str(error)[:_TEXT_CHARS]
        if rule == "revoked":
            event["rule"] = "revoked, until `relay grant`"
        elif rule:
            event["rule"] = f"none of the sources grants it: {self._rights_of(channel)}"
        self._remember(event)
        self._add(event)

    @override
    def unsubscribed(self, subscription: Subscription, notice: Notice | None) -> None:
        event = self._of(subscription.session, "unsubscribed", subscription.feed.channel)
        event["reason"] = "by the client" if notice is None else notice.reason
        event["position"] = str(subscription.at)
        self._add(event)

    @override
    def notified(self, channel: Channel, notice: Notice, session: Session | None) -> None:
        if session is not None:
            event = self._of(session, notice.kind, channel)
        else:
            # One event for all live clients of the worker.
            event = {"ms": int(self._now_ms()), "event": notice.kind, "channel": channel}
        event["reason"] = notice.reason
        if notice.from_id is not None:
            event["from"] = str(notice.from_id)
        if notice.to_id is not None:
            event["to"] = str(notice.to_id)
        self._add(event)

    # ---- from the protocols -----------------------------------------------------------------

    def turned_away(
        self, info: ConnectionInfo | None, protocol: str, reason: Reason | str, detail: str = ""
    ) -> None:
        """Record that a request or a new connection was rejected. It has no session."""
        if info is None:
            return
        event = self._event("rejected", info, Principal(door=protocol))
        event["reason"] = reason
        if detail:
            event["detail"] = detail[:_TEXT_CHARS]
        self._add(event)

    def answered(self, info: ConnectionInfo, route: str, status: int, text: str) -> None:
        """Record an HTTP error answer to `route`."""
        if info.id in self._rejections:
            # The rejection of a subscription is the reason for this answer.
            return
        event = self._event("rejected", info, Principal(door=""))
        event["route"] = route
        event["reason"] = status
        if text:
            event["detail"] = text
        self._add(event)

    def rejections_of(self, connection: str) -> list[Event]:
        """Return the latest rejections of a connection, by its ID."""
        return list(self._rejections.get(connection, ()))

    # ---- events -----------------------------------------------------------------------------

    def _of(self, session: Session, kind: str, channel: Channel) -> Event:
        event = self._event(kind, session.info, session.principal)
        event["channel"] = channel
        return event

    def _event(self, kind: str, info: ConnectionInfo | None, principal: Principal) -> Event:
        if info is None:
            return {
                "ms": int(self._now_ms()),
                "event": kind,
                "user": principal.user,
                "protocol": principal.door,
            }
        return {
            "ms": int(self._now_ms()),
            "event": kind,
            "connection": info.id,
            "address": info.address,
            "user": principal.user,
            "protocol": principal.door,
        }

    def _remember(self, event: Event) -> None:
        name = event.get("connection")
        if name is None:
            return
        recent = self._rejections.pop(name, None) or deque(maxlen=_RECENT)
        recent.append(event)
        self._rejections[name] = recent
        if len(self._rejections) > _CONNECTIONS:
            self._rejections.popitem(last=False)

    def _add(self, event: Event) -> None:
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s", describe(event))
        if self.on_event is not None:
            self.on_event(event)
        if not self._events or (not event.get("user", True) and not self._may_write(event)):
            return
        if len(self._waiting) >= _MAX_WAITING:
            self.dropped += 1
            return
        self._waiting.append(event)
        if len(self._waiting) == 1:
            self._wake.set()

    def _may_write(self, event: Event) -> bool:
        """Return False for an event of a stranger that is only counted."""
        now = time.monotonic()
        network = network_of(event.get("address", ""))
        key = (event["event"], network, str(event.get("reason", "")))
        count = self._strangers.get(key)
        if count is None:
            if len(self._strangers) >= _KINDS:
                key = (event["event"], "", "")
                count = self._strangers.get(key)
            if count is None:
                count = self._strangers[key] = _StrangerCount(now)
        if count.written < _STRANGERS:
            count.written += 1
            return True
        count.suppressed += 1
        count.event = event
        return False

    def _sweep(self, now: float) -> None:
        """Write the counts of windows that have ended."""
        over = [key for key, each in self._strangers.items() if now - each.began >= _WINDOW_S]
        for key in over:
            count = self._strangers.pop(key)
            if count.suppressed and len(self._waiting) < _MAX_WAITING:
                event = {**count.event, "similar": count.suppressed}
                self._waiting.append(event)

    # ---- to Redis ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Append batches until cancelled."""
        await self._links.wait_home_open()
        # The first event, so that readers know that nothing is missing before it.
        self._waiting.insert(0, {"ms": int(self._now_ms()), "event": "started"})
        self._wake.set()
        while True:
            with contextlib.suppress(TimeoutError):
                # Without strangers there is nothing to count.
                async with asyncio.timeout(_SWEEP_S if self._strangers else None):
                    await self._wake.wait()
                    await asyncio.sleep(BATCH_S)
            self._wake.clear()
            self._sweep(time.monotonic())
            await self.flush()
            if self._waiting:
                # The append failed. Further events do not wake this task.
                self._wake.set()

    async def flush(self) -> None:
        """Append the events that wait. They are dropped if Redis does not accept them."""
        while self._waiting:
            batch, self._waiting = self._waiting[:_PER_BATCH], self._waiting[_PER_BATCH:]
            if self.dropped:
                batch.append(
                    {"ms": int(self._now_ms()), "event": "dropped", "number": self.dropped}
                )
            try:
                await self._append(batch)
            except Unavailable as exc:
                if "NOPERM" in str(exc):
                    # The reader reports a Redis that is unreachable.
                    _log.warning(
                        "Could not append to the journal (%s): `relay events` and `relay explain`"
                        " miss events of this worker. Compare the ACL user with docs/redis.md",
                        exc,
                    )
                self.dropped += len(batch) - bool(self.dropped)
                return
            self.dropped = 0

    async def _append(self, batch: Sequence[Event]) -> None:
        commands: list[RedisCommand] = []
        sizes: list[tuple[int, int]] = []
        for start in range(0, len(batch), _PER_ENTRY):
            part = batch[start : start + _PER_ENTRY]
            text = orjson.dumps(part)
            sizes.append((len(part), len(text)))
            commands.append(("XADD", self._key, *self._trim(), "*", "n", len(part), "events", text))
        now = time.monotonic()
        renews = now - self._renewed_at >= _RENEW_S
        if renews:
            now_ms = int(self._now_ms())
            commands += [
                ("EXPIRE", self._key, EXPIRY_S),
                ("ZADD", self._keys.journals, now_ms + EXPIRY_S * 1000, self._instance),
                ("ZREMRANGEBYSCORE", self._keys.journals, "-inf", now_ms),
            ]
        replies = await self._links.call_all(commands)
        if renews:
            # Only now: a worker whose first append failed must not be missing for a minute.
            self._renewed_at = now
        for (number, size), entry_id in zip(sizes, replies, strict=False):
            if isinstance(entry_id, bytes):
                self._entries.append((entry_id, number, size))
                self._kept += number
                self._kept_bytes += size

    def _trim(self) -> tuple[str | bytes, ...]:
        """Return the option of XADD that removes old entries, or nothing."""
        oldest = None
        limit = self._events * _EVENT_BYTES
        while len(self._entries) > 1 and (self._kept > self._events or self._kept_bytes > limit):
            _, number, size = self._entries.popleft()
            self._kept -= number
            self._kept_bytes -= size
            oldest = self._entries[0][0]
        return () if oldest is None else ("MINID", "~", oldest)


def describe(event: Event) -> str:
    """Return one line about an event, as the log and `relay events` show it."""
    kind = event["event"]
    text = f"{kind.capitalize():<12} {event.get('connection') or '-':<12}"
    user = event.get("user")
    who = [user or "-", event.get("protocol") or "-"] if user is not None else ["all live clients"]
    facts = [
        *who,
        *(
            f"{name} {event[key]}"
            for key, name in (
                ("channel", "channel"),
                ("transport", "over"),
                ("after", "after"),
                ("from", "from"),
                ("to", "to"),
                ("position", "at"),
                ("address", "from"),
                ("route", "route"),
                ("agent", "with"),
                ("code", "code"),
            )
            if event.get(key) not in (None, "")
        ),
    ]
    if "duration_s" in event:
        facts.append(f"after {event['duration_s']:g} s")
    reason = ": ".join(str(event[key]) for key in ("reason", "rule", "detail") if event.get(key))
    if reason:
        facts.append(reason)
    if "similar" in event:
        facts.append(f"and {event['similar']:,} similar ones in the last minute")
    if kind == "started":
        facts = ["worker", str(event.get("worker", ""))]
    if kind == "dropped":
        facts = [f"{event['number']:,} events of the journal: Redis was too slow"]
    return f"{text} {', '.join(facts)}"
