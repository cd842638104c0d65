"""The live tap: what happens on this worker while an operator watches.

A record describes one event that was read from a stream, with the clients that received it and
those that did not, or one event of the journal: a rejection, a subscription, a gap. The console
asks all workers for their records about once a second. A worker that is no longer asked stops
recording. Without an operator who watches, the cost is one comparison per batch of entries.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections import Counter, deque
from itertools import islice
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from relay.core.model import Broken, Event, Grant, Revocation
from relay.core.slices import in_slices
from relay.hub.feed import FeedObserver
from relay.hub.session import SubscriptionMode
from relay.inspect.questions import BadQuestion

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from relay.core.model import Record
    from relay.hub.feed import Feed
    from relay.hub.hub import Hub
    from relay.hub.session import Session, Subscription
    from relay.inspect.journal import Journal
    from relay.inspect.questions import Questions, Values, WorkerAnswers

QUESTION = "tap"
# A watcher that has not asked for this long is removed.
_GONE_S = 10.0
_WATCHERS = 8
# Records of one watcher: the most that wait, and the most per second. Others are only counted.
_WAITING, _PER_S = 300, 100
# Limits for events with recipients: clients examined per event, clients examined per second, and
# clients named in a record.
_EXAMINED, _EXAMINED_PER_S, _NAMED = 500, 5_000, 5
# Anyone who may append entries chooses their types and recipients.
_RECIPIENTS, _TEXT_CHARS = 20, 100
_TEXTS = ("watch", "channel", "user", "connection")


class _Watcher:
    """The filters and records of one operator."""

    __slots__ = (
        "asked_at",
        "channel",
        "connection",
        "made",
        "matches",
        "records",
        "second",
        "session",
        "skipped",
        "user",
    )

    def __init__(self) -> None:
        self.records: deque[dict[str, Any]] = deque()
        self.skipped = self.made = 0
        self.second = self.asked_at = 0.0
        self.user = self.connection = self.channel = ""
        self.matches: Callable[[str], object] | None = None
        # The session with the connection, if it is one of this worker.
        self.session: Session | None = None

    def wants(self, channel: str) -> bool:
        if not self.channel or channel == self.channel:
            return True
        return self.matches is not None and bool(self.matches(channel))

    def has_room(self, now: float) -> bool:
        """Count a record. Return False if it must be skipped."""
        if now - self.second >= 1.0:
            self.second, self.made = now, 0
        self.made += 1
        if self.made <= _PER_S and len(self.records) < _WAITING:
            return True
        self.skipped += 1
        return False


class Tap(FeedObserver):
    """Records what happens on this worker, for each watcher."""

    def __init__(self, hub: Hub, journal: Journal, now_ms: Callable[[], float]) -> None:
        """`now_ms` is the time of Redis."""
        self._hub = hub
        self._journal = journal
        self._now_ms = now_ms
        self._watchers: dict[str, _Watcher] = {}
        # Clients that may still be examined in this second.
        self._second, self._left = 0.0, _EXAMINED_PER_S

    async def answer(self, values: Values) -> dict[str, Any]:
        """Answer the question `tap`: the records since the last answer to this watcher."""
        texts = {name: values.get(name, "") for name in _TEXTS}
        if not all(isinstance(text, str) and len(text) <= 255 for text in texts.values()):
            raise BadQuestion("watch, channel, user and connection must be short texts")
        now = time.monotonic()
        self._remove_gone(now)
        watcher = self._watchers.get(texts["watch"])
        if watcher is None:
            if len(self._watchers) >= _WATCHERS:
                raise BadQuestion(f"{_WATCHERS} operators are watching already")
            watcher = self._watchers[texts["watch"]] = _Watcher()
            self._hub.tap = self
            self._journal.on_event = self._happened
        watcher.asked_at = now
        watcher.user = texts["user"]
        if watcher.connection != texts["connection"] or watcher.session is None:
            watcher.connection = texts["connection"]
            watcher.session = await self._session_of(watcher.connection)
        if watcher.channel != texts["channel"]:
            watcher.channel = texts["channel"]
            watcher.matches = re.compile(fnmatch.translate(watcher.channel)).match
        answer = {"records": list(watcher.records), "skipped": watcher.skipped}
        watcher.records.clear()
        watcher.skipped = 0
        return answer

    async def _session_of(self, connection: str) -> Session | None:
        if connection:
            async for session in in_slices(self._hub.sessions()):
                if session.info is not None and session.info.id == connection:
                    return session
        return None

    def _remove_gone(self, now: float) -> None:
        gone = [name for name, each in self._watchers.items() if now - each.asked_at > _GONE_S]
        for name in gone:
            del self._watchers[name]
        if not self._watchers:
            self._hub.tap = None
            self._journal.on_event = None

    # ---- from the hub and the journal -----------------------------------------------------------

    @override
    def read(self, feed: Feed, records: Sequence[Record], offered: int) -> None:
        now = time.monotonic()
        self._remove_gone(now)
        for watcher in self._watchers.values():
            if not watcher.wants(feed.channel):
                continue
            chosen = self._subscriptions(watcher, feed)
            if chosen == []:
                continue
            for record in records:
                if watcher.has_room(now):
                    exact = offered if len(records) == 1 else None
                    watcher.records.append(self._record(feed, record, chosen, exact))

    @override
    def ephemeral(self, feed: Feed, event: Event) -> None:
        now = time.monotonic()
        self._remove_gone(now)
        for watcher in self._watchers.values():
            if watcher.wants(feed.channel):
                chosen = self._subscriptions(watcher, feed)
                if chosen != [] and watcher.has_room(now):
                    shown = {**self._about(event, feed, chosen, None), "ephemeral": True}
                    watcher.records.append(shown)

    def _happened(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        self._remove_gone(now)
        for watcher in self._watchers.values():
            if watcher.channel and not watcher.wants(event.get("channel", "")):
                continue
            if watcher.user and event.get("user") != watcher.user:
                continue
            if watcher.connection and event.get("connection") != watcher.connection:
                continue
            if watcher.has_room(now):
                watcher.records.append(event)

    def _subscriptions(self, watcher: _Watcher, feed: Feed) -> list[Subscription] | None:
        """Return the subscriptions of the watched user or client, None if all are watched."""
        sessions: Sequence[Session]
        if watcher.connection:
            sessions = [watcher.session] if watcher.session is not None else []
        elif watcher.user:
            # One more, so that it shows if there are too many.
            sessions = self._hub.sessions_of(watcher.user)[: _EXAMINED + 1]
        else:
            return None
        found = (each.subscriptions.get(feed.channel) for each in sessions)
        return [each for each in found if each is not None]

    def _record(
        self, feed: Feed, record: Record, chosen: list[Subscription] | None, offered: int | None
    ) -> dict[str, Any]:
        values: dict[str, Any] = {"channel": feed.channel, "id": str(record.id)}
        match record.body:
            case Event() as event:
                return self._about(event, feed, chosen, offered) | values
            case Revocation() as body:
                values |= {"event": "revocation", "user": body.user[:_TEXT_CHARS]}
            case Grant() as body:
                values |= {"event": "grant", "user": body.user[:_TEXT_CHARS]}
            case Broken() as body:
                values |= {"event": "broken", "reason": body.reason}
        return {"ms": int(self._now_ms()), **values}

    def _about(
        self, event: Event, feed: Feed, chosen: list[Subscription] | None, offered: int | None
    ) -> dict[str, Any]:
        """Return who received the event.

        With many followers, `delivered` is None if it is not known without examining all of them.
        """
        values: dict[str, Any] = {
            "ms": int(self._now_ms()),
            "event": "received",
            "channel": feed.channel,
            "type": event.type and event.type[:_TEXT_CHARS],
            "bytes": len(event.data),
            "followers": feed.live_count + feed.behind_count,
        }
        if event.to is not None:
            # Any of them: there may be thousands.
            some = islice(event.to, _RECIPIENTS)
            values["to"] = sorted(each[:_TEXT_CHARS] for each in some)
        if chosen is None and event.to is None:
            delivered = feed.live_count if offered is None else offered
            return values | {
                "delivered": delivered,
                "behind": feed.behind_count,
                "not_addressed": 0,
            }
        followers = chosen
        if followers is None:
            followers = list(islice(feed.subscriptions(), _EXAMINED + 1))
        else:
            values["followers"] = len(followers)
        examined = self._examinable(min(len(followers), _EXAMINED))
        counts: Counter[str] = Counter()
        named: list[dict[str, str]] = []
        for subscription in followers[:examined]:
            outcome = _outcome(event, subscription)
            counts[outcome] += 1
            if (chosen is not None or outcome != "delivered") and len(named) < _NAMED:
                named.append(_named(subscription, outcome))
        is_complete = len(followers) <= examined
        return values | {
            "delivered": counts["delivered"] if is_complete else offered,
            "behind": counts["behind"] if is_complete else feed.behind_count,
            "not_addressed": counts["not addressed"] if is_complete else None,
            "clients": named,
        }

    def _examinable(self, wanted: int) -> int:
        """Count clients that are examined, and return how many of the wanted ones may be."""
        now = time.monotonic()
        if now - self._second >= 1.0:
            self._second, self._left = now, _EXAMINED_PER_S
        granted = min(wanted, self._left)
        self._left -= granted
        return granted


def _outcome(event: Event, subscription: Subscription) -> str:
    if event.to is not None and event.to.isdisjoint(subscription.session.selectors):
        return "not addressed"
    return "delivered" if subscription.mode is SubscriptionMode.LIVE else "behind"


def _named(subscription: Subscription, outcome: str) -> dict[str, str]:
    principal = subscription.session.principal
    return {
        "connection": _connection_of(subscription),
        "user": principal.user,
        "protocol": principal.door,
        "outcome": outcome,
    }


def _connection_of(subscription: Subscription) -> str:
    info = subscription.session.info
    return "" if info is None else info.id


async def watch(questions: Questions, values: Values) -> WorkerAnswers:
    """Ask all workers for their records since the last call with the same `watch`."""
    return await questions.ask(QUESTION, values)
