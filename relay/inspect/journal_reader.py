"""Read the journals of all workers, for `relay events`, `relay explain` and the admin API."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import orjson

from relay.core.model import ZERO_ID, EntryID
from relay.core.slices import in_slices, next_slice
from relay.inspect.journal import EXPIRY_S
from relay.stream.connection import connect

if TYPE_CHECKING:
    from relay.inspect.journal import Event
    from relay.stream.connection.connect import RedisClient
    from relay.stream.format.keys import Keys

# Entries per command. An entry has up to 200 events.
_PAGE = 100
MOST = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """Which events of the journals to read. Empty fields match all.

    Events of all live clients of a channel (a gap or reset) match each user and connection.
    """

    user: str | None = None
    connection: str = ""
    channel: str = ""
    protocol: str = ""
    event: str = ""

    def matches(self, event: Event) -> bool:
        """Return True if the event matches all fields."""
        for name in ("event", "channel"):
            wanted = getattr(self, name)
            if wanted and event.get(name) != wanted and not self._has_position(name, event):
                return False
        if "user" not in event:
            # A notice to all clients, a number of dropped events, or the start of a worker.
            of_one = self.user is not None or self.connection
            return not self.protocol and not (of_one and event["event"] == "started")
        if self.user is not None and event["user"] != self.user:
            return False
        if self.connection and event.get("connection") != self.connection:
            return False
        return not self.protocol or event.get("protocol") == self.protocol

    def _has_position(self, name: str, event: Event) -> bool:
        return name == "channel" and self.channel in event.get("positions", ())


class JournalReader:
    """Reads forwards: first the stored events, then those that are added."""

    def __init__(self, client: RedisClient, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._last: dict[str, EntryID] = {}

    async def newest(self, wanted: EventFilter, limit: int) -> list[Event]:
        """Return the newest matching events of all workers, the oldest first.

        `read` continues after them.
        """
        journals: list[list[Event]] = []
        for instance in await self._instances():
            matching: list[Event] = []
            async for entry_id, events in self._backwards(instance):
                self._last.setdefault(instance, entry_id)
                matching += (
                    {**each, "worker": instance}
                    for each in reversed(events)
                    if wanted.matches(each)
                )
                if len(matching) >= limit:
                    break
            await next_slice()
            # Nearly sorted already: the newest first.
            matching.sort(key=_ms, reverse=True)
            journals.append(matching)
        merged = heapq.merge(*journals, key=_ms, reverse=True)
        newest = [each async for each in in_slices(islice(merged, limit))]
        newest.reverse()
        return newest

    async def read(self, wanted: EventFilter) -> list[Event]:
        """Return matching events that were added since the last call, the oldest first."""
        found: list[Event] = []
        for instance in await self._instances():
            key = self._keys.journal(instance)
            while True:
                start = f"({self._last.get(instance, ZERO_ID)}"
                entries = await connect.command(
                    self._client, "XRANGE", key, start, "+", "COUNT", _PAGE
                )
                for entry_id, events in _parsed(entries):
                    self._last[instance] = entry_id
                    found += (
                        {**each, "worker": instance} for each in events if wanted.matches(each)
                    )
                if len(entries) < _PAGE:
                    break
        found.sort(key=_ms)
        return found

    async def complete_since_ms(self) -> int | None:
        """Return since when the journals of all workers are complete, or None without a journal.

        A journal that has not been trimmed begins with the start of its worker. Journals of workers
        that ended more than an hour ago are gone.
        """
        begins, trimmed = [], []
        for instance in await self._instances():
            key = self._keys.journal(instance)
            oldest = await connect.command(self._client, "XRANGE", key, "-", "+", "COUNT", 1)
            for _, events in _parsed(oldest):
                begins.append(int(events[0]["ms"]))
                if events[0]["event"] != "started":
                    trimmed.append(begins[-1])
        if not begins:
            return None
        now_ms = await connect.time_ms(self._client)
        return max(min(begins), now_ms - EXPIRY_S * 1000, *trimmed)

    async def _instances(self) -> list[str]:
        names = await connect.command(self._client, "ZRANGE", self._keys.journals, 0, -1)
        return [name.decode() for name in names]

    async def _backwards(self, instance: str) -> AsyncIterator[tuple[EntryID, list[Event]]]:
        key, end = self._keys.journal(instance), "+"
        while True:
            entries = await connect.command(
                self._client, "XREVRANGE", key, end, "-", "COUNT", _PAGE
            )
            for entry_id, events in _parsed(entries):
                end = f"({entry_id}"
                # Parsing all journals takes longer than a worker's other clients may wait.
                await next_slice()
                yield entry_id, events
            if len(entries) < _PAGE:
                return


def _ms(event: Event) -> int:
    return int(event["ms"])


def _parsed(entries: Any) -> Iterator[tuple[EntryID, list[Event]]]:
    for raw, fields in entries:
        entry_id = EntryID.parse(raw)
        try:
            events = orjson.loads(fields[b"events"])
        except (KeyError, orjson.JSONDecodeError):
            events = None
        # Another program may have appended anything.
        known = [each for each in events if _is_event(each)] if isinstance(events, list) else []
        if known:
            yield entry_id, known


def _is_event(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("ms"), int)
        and isinstance(value.get("event"), str)
    )
