"""The directory of connections: this worker's, and those of all workers of all hosts.

A worker lists the sessions in its hub, that is the clients that have presented a credential or need
none. Lists are in the order of the connection IDs, which are random. A page contains at most
`MOST` connections, and the next one begins after the last ID of the page.
"""

from __future__ import annotations

import fnmatch
import heapq
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from relay.core.connection import software
from relay.core.model import Channel
from relay.core.slices import in_slices
from relay.hub.session import SubscriptionMode
from relay.inspect.questions import WITHIN_S, BadQuestion, WorkerAnswers

if TYPE_CHECKING:
    from relay.core.connection import ConnectionInfo
    from relay.hub.hub import Hub
    from relay.hub.session import Session, Subscription
    from relay.inspect.questions import Questions, Values

QUESTION = "connections"
MOST = 500
# Sessions that are checked between two pauses. Each may have thousands of subscriptions.
_AT_ONCE, _AT_ONCE_BY_CHANNEL = 100, 10
# Subscriptions that are listed for one connection, and for each connection of a list.
_SUBSCRIPTIONS, _SUBSCRIPTIONS_IN_LIST = 500, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionFilter:
    """Which connections to list. Empty fields match all.

    `channel` is a name, or a pattern with `*`, `?` or `[abc]`. `address` is the beginning of the
    peer's address, or of the address that a proxy reports. `after` is the last ID of the page
    before. With `id`, one connection is listed with all its subscriptions.
    """

    id: str = ""
    user: str | None = None
    channel: str = ""
    protocol: str = ""
    address: str = ""
    after: str = ""
    limit: int = 100

    @classmethod
    def parse(cls, values: Values) -> ConnectionFilter:
        """Check values from outside. Raise BadQuestion if one is not valid."""
        unknown = [name for name in values if name not in cls.__dataclass_fields__]
        if unknown:
            raise BadQuestion(f"unknown filter {unknown[0][:50]!r}")
        limit = values.get("limit", 100)
        if not isinstance(limit, int) or not 1 <= limit <= MOST:
            raise BadQuestion(f"limit must be an integer from 1 to {MOST}")
        texts = {name: text for name, text in values.items() if name != "limit"}
        for name, text in texts.items():
            if not isinstance(text, str) and not (name == "user" and text is None):
                raise BadQuestion(f"{name} must be a text")
        return cls(limit=limit, **texts)


@dataclass(slots=True, kw_only=True)
class ConnectionPage:
    """One page of connections, and how many match in all.

    `after` is the filter's `after` of the next page, '' if this is the last one. `silent` and
    `failed` are those of `WorkerAnswers`: their connections are missing.
    """

    connections: list[dict[str, Any]]
    total: int
    after: str
    silent: list[str]
    failed: dict[str, str]


class ConnectionDirectory:
    """Lists the connections of this worker."""

    def __init__(
        self,
        hub: Hub,
        *,
        instance: str,
        host: str,
        rejections: Callable[[str], list[dict[str, Any]]] = lambda _: [],
    ) -> None:
        """`rejections` returns the recent rejections of a connection, by its ID."""
        self._hub = hub
        self._instance = instance
        self._host = host
        self._rejections = rejections

    async def answer(self, values: Values) -> dict[str, Any]:
        """Answer the question `connections`: the first matches, and the number of all."""
        wanted = ConnectionFilter.parse(values)
        matches = _matcher(wanted)
        page: list[tuple[str, Session]] = []
        total = 0
        candidates = iter(self._candidates(wanted))
        at_once = _AT_ONCE_BY_CHANNEL if wanted.channel else _AT_ONCE
        # Check many at once: a pause after each of 50,000 would take most of the time.
        async for some in in_slices(iter(lambda: list(islice(candidates, at_once)), [])):
            found = [
                (info.id, session)
                for session in some
                if session is not None
                and session.outbox is not None
                and (info := session.info) is not None
                and matches(session, info)
            ]
            total += len(found)
            page += [each for each in found if each[0] > wanted.after]
            page.sort(key=itemgetter(0))
            del page[wanted.limit :]
        rows = []
        async for _, session in in_slices(page):
            if not session.closed and (row := self._row(session, wanted)) is not None:
                rows.append(row)
        return {"connections": rows, "total": total}

    def _candidates(self, wanted: ConnectionFilter) -> Iterable[Session | None]:
        if wanted.user is not None:
            return self._hub.sessions_of(wanted.user)
        if wanted.channel:
            return self._subscribed(wanted.channel)
        return self._hub.sessions()

    def _subscribed(self, pattern: str) -> Iterator[Session | None]:
        feed = self._hub.feed(Channel(pattern))
        if feed is not None:
            yield from [each.session for each in feed.subscriptions()]
            return
        if not _is_pattern(pattern):
            return
        matches = re.compile(fnmatch.translate(pattern)).match
        seen: set[Session] = set()
        for feed in self._hub.feeds():
            yield None
            if matches(feed.channel):
                for session in [each.session for each in feed.subscriptions()]:
                    if session not in seen:
                        seen.add(session)
                        yield session

    def _row(self, session: Session, wanted: ConnectionFilter) -> dict[str, Any] | None:
        outbox, info = session.outbox, session.info
        if outbox is None or info is None:
            return None
        subscriptions = list(session.subscriptions.values())
        shown = subscriptions
        if wanted.channel and not wanted.id:
            named = session.subscriptions.get(Channel(wanted.channel))
            if named is not None:
                shown = [named]
            elif _is_pattern(wanted.channel):
                matches = re.compile(fnmatch.translate(wanted.channel)).match
                shown = [each for each in subscriptions if matches(each.feed.channel)]
        most = _SUBSCRIPTIONS if wanted.id else _SUBSCRIPTIONS_IN_LIST
        principal = session.principal
        return {
            "id": info.id,
            "user": principal.user,
            "groups": sorted(principal.groups)[:50],
            "client": principal.client,
            "protocol": principal.door,
            "transport": outbox.transport_name,
            "software": software(info.agent),
            "agent": info.agent,
            "address": info.address,
            "forwarded_for": info.forwarded_for,
            "since_ms": round(info.since * 1000),
            "connected_s": round(max(0.0, time.time() - info.since), 1),
            "expires_ms": _ms(principal.expires_at),
            "host": self._host,
            "worker": self._instance,
            "waiting_bytes": outbox.waiting_bytes(),
            "paused": session.paused,
            "behind": sum(each.mode is not SubscriptionMode.LIVE for each in subscriptions),
            "subscriptions": [_subscription(each) for each in shown[:most]],
            "subscription_count": len(subscriptions),
            "rejections": self._rejections(info.id),
        }


def _subscription(subscription: Subscription) -> dict[str, Any]:
    """Return channel, position and mode.

    `behind` is the number of entries that the client has not received, None if it is not known.
    """
    feed, mode = subscription.feed, subscription.mode
    behind: int | None = 0
    if mode is not SubscriptionMode.LIVE:
        counted = subscription.added is not None and feed.added is not None
        behind = max(0, feed.added - subscription.added) if counted else None  # type: ignore[operator]
        if subscription.at == feed.position:
            behind = 0
    return {
        "channel": feed.channel,
        "mode": mode.name.lower(),
        "position": str(subscription.at),
        "began": None if subscription.began is None else str(subscription.began),
        "behind": behind,
        "newest": str(feed.position),
    }


def _matcher(wanted: ConnectionFilter) -> Callable[[Session, ConnectionInfo], bool]:
    is_pattern = _is_pattern(wanted.channel)
    matches_channel = re.compile(fnmatch.translate(wanted.channel)).match

    def matches(session: Session, info: ConnectionInfo) -> bool:
        if wanted.id and info.id != wanted.id:
            return False
        if wanted.user not in (None, session.principal.user):
            return False
        if wanted.protocol and session.principal.door != wanted.protocol:
            return False
        if wanted.address and not (
            info.address.startswith(wanted.address) or info.forwarded_for.startswith(wanted.address)
        ):
            return False
        if wanted.channel and Channel(wanted.channel) not in session.subscriptions:
            # With a user, the candidates are not selected by the channel.
            return is_pattern and any(map(matches_channel, session.subscriptions))
        return True

    return matches


def _is_pattern(text: str) -> bool:
    return any(each in text for each in "*?[")


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


async def find_connections(
    questions: Questions, wanted: ConnectionFilter, *, within_s: float = WITHIN_S
) -> ConnectionPage:
    """Ask all workers for one page. Raise BadQuestion if the filter is not valid."""
    values = {name: value for name, value in asdict(wanted).items() if value not in ("", None)}
    ConnectionFilter.parse(values)
    answers = await questions.ask(QUESTION, values, within_s=within_s)
    return _page(answers, wanted.limit)


def _page(answers: WorkerAnswers, limit: int) -> ConnectionPage:
    rows = heapq.nsmallest(limit, _rows(answers.by_worker), key=lambda row: row["id"])
    remaining = sum(len(each.get("connections", ())) for each in answers.by_worker.values())
    # A worker with more matches than it has listed has filled its own page.
    more = remaining > len(rows) or any(
        len(each.get("connections", ())) >= limit for each in answers.by_worker.values()
    )
    return ConnectionPage(
        connections=rows,
        total=sum(int(each.get("total", 0)) for each in answers.by_worker.values()),
        after=rows[-1]["id"] if rows and more else "",
        silent=answers.silent,
        failed=answers.failed,
    )


def _rows(by_worker: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for answer in by_worker.values():
        yield from answer.get("connections", ())
