"""Explain whether a user's clients received an event, and if not, why.

The answer is derived from the entry and its stream, the revocations and grants in the stream, the
journals of all workers and their present connections. Each client has one sentence, and the user
has one for all of them. A user may have thousands of clients: the answer lists a few, first those
that did not receive the event, and counts the others. `unknown` lists what could not be determined,
so that an answer is never more certain than its sources.

"Received" means that relay has written the event to the client's connection. A protocol without
acknowledgements contains no further information.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from relay.core.model import Broken, EntryID, Event, Grant, Revocation
from relay.core.slices import in_slices
from relay.inspect.connections import ConnectionFilter, find_connections
from relay.inspect.journal_reader import MOST as MOST_EVENTS
from relay.inspect.journal_reader import EventFilter, JournalReader
from relay.stream.connection import connect
from relay.stream.read.view import read_newest, read_view
from relay.stream.upkeep import dead_letter_list

if TYPE_CHECKING:
    from relay.core.model import Channel, Record, StreamState
    from relay.inspect.questions import Questions
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients

# Entries before the event in which revocations and grants are searched.
_RIGHTS_ENTRIES, _RIGHTS_PAGE = 10_000, 100
_DEAD_LETTERS = 10_000
# Connections that are examined, and how long the workers are asked for them, page by page.
_CONNECTIONS, _CONNECTIONS_S = 10_000, 10.0
# A page of the largest size takes 10 ms of the event loop of the worker that asks.
_PAGE = 200
# Clients in the answer.
_LISTED = 50


class Outcome(StrEnum):
    """The outcome of an event for a user or one client."""

    RECEIVED = "received"
    # Of the event:
    NO_ENTRY = "no_entry"
    TRIMMED = "trimmed"
    DEAD_LETTER = "dead_letter"
    NOT_AN_EVENT = "not_an_event"
    # Of the user:
    NOT_ADDRESSED = "not_addressed"
    NO_RIGHT = "no_right"
    NOT_CONNECTED = "not_connected"
    # Of a client:
    BEHIND = "behind"
    GAP = "gap"
    SUBSCRIBED_LATER = "subscribed_later"
    DISCONNECTED_BEFORE = "disconnected_before"
    NOT_SUBSCRIBED = "not_subscribed"
    UNKNOWN = "unknown"


# The first of these that a client has is the user's.
_PRECEDENCE = (
    Outcome.RECEIVED,
    Outcome.BEHIND,
    Outcome.GAP,
    Outcome.NOT_ADDRESSED,
    Outcome.NO_RIGHT,
    Outcome.SUBSCRIBED_LATER,
    Outcome.DISCONNECTED_BEFORE,
    Outcome.NOT_SUBSCRIBED,
)
# Clients with the first of these are listed first.
_LIST_ORDER = (
    Outcome.BEHIND,
    Outcome.GAP,
    Outcome.UNKNOWN,
    Outcome.NOT_ADDRESSED,
    Outcome.NO_RIGHT,
    Outcome.SUBSCRIBED_LATER,
    Outcome.DISCONNECTED_BEFORE,
    Outcome.NOT_SUBSCRIBED,
    Outcome.RECEIVED,
)


@dataclass(slots=True, kw_only=True)
class ClientOutcome:
    """One client of the user. `at_ms` is when it received the event, if that is known."""

    connection: str
    outcome: Outcome
    sentence: str
    at_ms: int | None = None


@dataclass(slots=True, kw_only=True)
class Explanation:
    """The answer. `clients` are the user's connections in the journals and on the workers.

    At most `_LISTED` are listed; `others` counts the remaining ones by outcome.
    """

    user: str
    channel: str
    id: str
    outcome: Outcome
    sentence: str
    clients: list[ClientOutcome] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """Return the explanation as JSON values."""
        return asdict(self)


class _Outcomes:
    """The outcomes of all clients: a count, and the newest clients of each outcome."""

    def __init__(self) -> None:
        self.counts: Counter[Outcome] = Counter()
        self.newest: dict[Outcome, list[ClientOutcome]] = {}
        self.first_received_ms: int | None = None

    def add(self, each: ClientOutcome) -> None:
        """Add a client. Call it for the newest first."""
        self.counts[each.outcome] += 1
        kept = self.newest.setdefault(each.outcome, [])
        if len(kept) < _LISTED:
            kept.append(each)
        if each.outcome is Outcome.RECEIVED:
            at_ms = each.at_ms or 0
            known = self.first_received_ms
            self.first_received_ms = at_ms if known is None else min(known, at_ms)

    def list_in(self, found: Explanation) -> None:
        """List the clients in the explanation."""
        kept = [each for outcome in _LIST_ORDER for each in self.newest.get(outcome, ())]
        found.clients = kept[:_LISTED]
        others = self.counts - Counter(each.outcome for each in found.clients)
        found.others = {
            outcome.value: others[outcome] for outcome in _LIST_ORDER if others[outcome]
        }


@dataclass(slots=True)
class _Following:
    """A time in which a client followed the channel: it received the entries after `after`."""

    after: EntryID
    since_ms: int
    # The last entry that it has received by now, or by its end. None: unknown.
    until: EntryID | None = None
    ended_ms: int | None = None
    reason: str = ""


@dataclass(slots=True)
class _Client:
    """Facts about one connection."""

    id: str
    protocol: str = ""
    connected_ms: int | None = None
    ended_ms: int | None = None
    reason: str = ""
    intervals: list[_Following] = field(default_factory=list)
    # The latest rejection.
    rejection: dict[str, Any] | None = None
    # The first notice that concerns the event.
    gap: dict[str, Any] | None = None
    # Its row in the list of connections, or None if it is not connected now.
    row: _Row | None = None
    # It has not left, but is not among the connections that were found.
    may_be_connected: bool = False


@dataclass(frozen=True, slots=True)
class _Row:
    """The facts of a connection's row that are used. Thousands of whole rows would be large."""

    client: str | None
    groups: tuple[str, ...]
    worker: str
    waiting_bytes: int
    subscription: Mapping[str, Any]


class Explainer:
    """Explains for one installation."""

    def __init__(
        self,
        *,
        clients: ShardClients,
        keys: Keys,
        questions: Questions,
        max_entry_bytes: int,
    ) -> None:
        self._servers = clients
        self._keys = keys
        self._questions = questions
        self._max_entry_bytes = max_entry_bytes

    async def explain(self, user: str, channel: Channel, event_id: EntryID) -> Explanation:
        """Return the explanation. Raise RelayError if Redis is unreachable."""
        found = Explanation(
            user=user, channel=channel, id=str(event_id), outcome=Outcome.UNKNOWN, sentence=""
        )
        view = await read_view(
            self._servers, self._keys, channel, event_id, self._max_entry_bytes, count=1
        )
        event = view.own.body if view.own is not None else None
        missing = None
        if isinstance(event, Broken):
            found.outcome = Outcome.DEAD_LETTER
            found.sentence = await self._dead_letter(channel, event)
            return found
        if isinstance(event, Revocation | Grant):
            kind = "revocation" if isinstance(event, Revocation) else "grant"
            found.outcome = Outcome.NOT_AN_EVENT
            found.sentence = (
                f"{event_id} is not an event: it is the {kind} of {event.user} on {channel}."
            )
            return found
        if event is None:
            missing = _missing(view.state, channel, event_id)
            if missing[0] is Outcome.NO_ENTRY:
                found.outcome, found.sentence = missing
                return found
        clients, are_all_known = await self._clients(found, user, channel, event_id)
        to = event.to if isinstance(event, Event) else None
        not_addressed = _not_addressed(found, user, to, clients)
        no_right = await self._no_right(found, user, channel, event_id, view.state)
        outcomes = _Outcomes()
        async for each in in_slices(clients):
            each.may_be_connected = each.row is None and each.ended_ms is None and not are_all_known
            outcomes.add(_judge(each, channel, event_id, not_addressed, no_right))
        outcomes.list_in(found)
        _summarize(found, outcomes, missing, not_addressed, no_right, event_id)
        return found

    # ---- the event --------------------------------------------------------------------------

    async def _dead_letter(self, channel: Channel, broken: Broken) -> str:
        checked = 0
        async for letters in dead_letter_list.pages(self._servers.home, self._keys):
            for letter in letters:
                if letter.channel == channel and letter.entry_id == broken.id:
                    return (
                        f"{broken.id} could not be delivered to anybody: {letter.reason}; it is"
                        f" dead letter {letter.id}."
                    )
            checked += len(letters)
            if checked >= _DEAD_LETTERS:
                break
        return (
            f"{broken.id} cannot be delivered to anybody: {broken.reason}; its dead letter was"
            " dropped, or no client has followed the channel since."
        )

    # ---- the user ---------------------------------------------------------------------------

    async def _no_right(
        self, found: Explanation, user: str, channel: Channel, at: EntryID, state: StreamState
    ) -> str:
        """Return why the user had no right at that time, or '' if it is not known that there was
        none."""
        if not user:
            return ""
        before, checked = at, 0
        while checked < _RIGHTS_ENTRIES:
            records = await read_newest(
                self._servers.for_key(self._keys.stream(channel)),
                self._keys,
                channel,
                before,
                self._max_entry_bytes,
                _RIGHTS_PAGE,
            )
            change = _latest_change(records, user)
            if change is not None:
                if isinstance(change, Revocation):
                    return f"the right of {user} was revoked at {change.id} ({_when(change.id.ms)})"
                return ""
            if not records:
                break
            checked += len(records)
            before = records[-1].id
        rights = await connect.command(
            self._servers.for_key(self._keys.stream(channel)),
            "HGET",
            self._keys.rights(channel),
            user,
        )
        if rights != b"-":
            return ""
        after = await self._first_change_after(user, channel, at)
        if after is None and state.first is not None and checked < _RIGHTS_ENTRIES:
            return f"the right of {user} is revoked, and was before {before}"
        if after is None:
            found.unknown.append(f"{user} is revoked now; the time is not in the stream any more")
        return ""

    async def _first_change_after(
        self, user: str, channel: Channel, at: EntryID
    ) -> Revocation | Grant | None:
        after, checked = at, 0
        while checked < _RIGHTS_ENTRIES:
            view = await read_view(
                self._servers,
                self._keys,
                channel,
                after,
                self._max_entry_bytes,
                _RIGHTS_PAGE,
            )
            change = _latest_change(view.records, user)
            if change is not None:
                return change
            if not view.more:
                return None
            checked += len(view.records)
            after = view.records[-1].id
        return None

    # ---- the clients ------------------------------------------------------------------------

    async def _clients(
        self, found: Explanation, user: str, channel: Channel, event_id: EntryID
    ) -> tuple[list[_Client], bool]:
        """Return the clients, the newest first, and whether all present connections are known."""
        reader = JournalReader(self._servers.home, self._keys)
        events = await reader.newest(EventFilter(user=user), MOST_EVENTS)
        complete_ms = await reader.complete_since_ms()
        if complete_ms is None:
            found.unknown.append("There is no journal: clients that have left are not known.")
        elif complete_ms > event_id.ms:
            found.unknown.append(
                f"The journals are complete since {_when(complete_ms)}, after the event: clients"
                " that had left before are not known."
            )
        clients: dict[str, _Client] = {}
        notices = []
        dropped: Counter[str] = Counter()
        async for event in in_slices(events):
            if event["event"] == "dropped":
                dropped[event["worker"]] += event["number"]
            elif "user" not in event:
                if event.get("channel") == channel and _is_in_gap(event, event_id):
                    notices.append(event)
            elif "connection" in event:
                client = clients.setdefault(event["connection"], _Client(event["connection"]))
                _note(client, event, channel, event_id)
        found.unknown += (
            f"{number} events are missing in the journal of {worker}."
            for worker, number in dropped.items()
        )
        if notices:
            async for client in in_slices(clients.values()):
                if client.gap is None:
                    own = (each for each in notices if _followed_at(client, each["ms"]))
                    client.gap = next(own, None)
        are_all_known = await self._note_connections(found, clients, user, channel)
        newest = sorted(clients.values(), key=lambda each: each.connected_ms or 0, reverse=True)
        return newest, are_all_known

    async def _note_connections(
        self, found: Explanation, clients: dict[str, _Client], user: str, channel: Channel
    ) -> bool:
        """Add the present connections. Return False if some are not known."""
        problems: dict[str, None] = {}
        # Clients with so many subscriptions that their row does not contain all of them.
        unlisted: set[str] = set()
        async for row in self._rows(ConnectionFilter(user=user, limit=_PAGE), problems):
            client = clients.setdefault(row["id"], _Client(row["id"]))
            subscriptions = row["subscriptions"]
            own = [each for each in subscriptions if each["channel"] == channel]
            if not own and row["subscription_count"] > len(subscriptions):
                unlisted.add(client.id)
            _note_row(client, row, own)
        if unlisted:
            wanted = ConnectionFilter(user=user, channel=channel, limit=_PAGE)
            async for row in self._rows(wanted, problems):
                if row["id"] in unlisted:
                    own = [each for each in row["subscriptions"] if each["channel"] == channel]
                    _note_row(clients[row["id"]], row, own)
        found.unknown += problems
        return not problems

    async def _rows(
        self, wanted: ConnectionFilter, problems: dict[str, None]
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the connections in slices. Add what is missing to `problems`."""
        number, end = 0, time.monotonic() + _CONNECTIONS_S
        while True:
            page = await find_connections(self._questions, wanted)
            for instance in [*page.silent, *page.failed]:
                problems[f"{instance} did not answer: its connections are not known."] = None
            async for row in in_slices(page.connections):
                yield row
            number += len(page.connections)
            if not page.after:
                return
            if number >= _CONNECTIONS or time.monotonic() >= end:
                problems[f"{page.total - number} connections were not examined."] = None
                return
            wanted = replace(wanted, after=page.after)


def _note_row(
    client: _Client, row: dict[str, Any], subscriptions: Iterable[dict[str, Any]]
) -> None:
    """Add a connection, and its subscriptions to the channel."""
    client.protocol = row["protocol"]
    client.connected_ms = client.connected_ms or row["since_ms"]
    present: Mapping[str, Any] = {}
    for present in subscriptions:
        if present["began"] is None:
            continue
        last = client.intervals[-1] if client.intervals else None
        if last is None or last.ended_ms is not None:
            last = _Following(EntryID.parse(present["began"]), row["since_ms"])
            client.intervals.append(last)
        last.until = EntryID.parse(present["position"])
    client.row = _Row(
        row["client"], tuple(row["groups"]), row["worker"], row["waiting_bytes"], present
    )


def _note(client: _Client, event: dict[str, Any], channel: Channel, event_id: EntryID) -> None:
    """Add an event of the journal to what is known of its client."""
    client.protocol = event.get("protocol", client.protocol)
    ms = int(event["ms"])
    match event["event"]:
        case "connected":
            client.connected_ms = ms
        case "disconnected":
            client.ended_ms, client.reason = ms, str(event.get("reason", ""))
            position = event.get("positions", {}).get(channel)
            _end(client, ms, client.reason, position)
        case "subscribed" if event["channel"] == channel:
            client.intervals.append(_Following(EntryID.parse(event["after"]), ms))
        case "unsubscribed" if event["channel"] == channel:
            _end(client, ms, str(event["reason"]), event["position"])
        case "rejected" if event.get("channel") == channel:
            client.rejection = event
        case "gap" | "reset" if event.get("channel") == channel:
            if client.gap is None and _is_in_gap(event, event_id):
                client.gap = event


def _end(client: _Client, ms: int, reason: str, position: str | None) -> None:
    for interval in reversed(client.intervals):
        if interval.ended_ms is not None:
            break
        interval.ended_ms, interval.reason = ms, reason
        interval.until = None if position is None else EntryID.parse(position)


def _followed_at(client: _Client, ms: int) -> bool:
    return any(
        each.since_ms <= ms and (each.ended_ms is None or ms <= each.ended_ms)
        for each in client.intervals
    )


def _missing(state: StreamState, channel: Channel, event_id: EntryID) -> tuple[Outcome, str]:
    if not state.exists:
        text = (
            f"There is no entry {event_id}: {channel} has no stream, because nothing was ever"
            " appended or the stream was deleted."
        )
        return Outcome.NO_ENTRY, text
    if event_id > state.last:
        return (
            Outcome.NO_ENTRY,
            f"There is no entry {event_id}: the newest ID of {channel} is {state.last}.",
        )
    if state.first is None or event_id < state.first:
        begins = "is empty" if state.first is None else f"begins at {state.first}"
        text = (
            f"{event_id} is not stored any more: {channel} {begins}, so it was trimmed, unless it"
            " never existed."
        )
        return Outcome.TRIMMED, text
    deleted = " or was deleted with XDEL" if event_id <= state.max_deleted else ""
    return (
        Outcome.NO_ENTRY,
        f"There is no entry {event_id} in {channel}: it never existed{deleted}.",
    )


def _latest_change(records: Iterable[Record], user: str) -> Revocation | Grant | None:
    for record in records:
        if isinstance(record.body, Revocation | Grant) and record.body.user == user:
            return record.body
    return None


def _not_addressed(
    found: Explanation, user: str, to: frozenset[str] | None, clients: Iterable[_Client]
) -> Callable[[_Client], str]:
    """Return the function that says why a client is not among the recipients, or ''."""
    if to is None or f"user:{user}" in to:
        return lambda _: ""
    names = ", ".join(sorted(to)[:5]) + (" ..." if len(to) > 5 else "")
    reason = f"it is addressed to {names or 'nobody'} only"
    only_users = all(each.startswith("user:") for each in to)
    if not only_users and any(each.row is None for each in clients):
        found.unknown.append(
            f"The event is addressed to {names}; the groups of clients that have left are unknown."
        )

    def check(client: _Client) -> str:
        row = client.row
        if row is not None:
            mine = {f"group:{name}" for name in row.groups} | {f"client:{row.client}"}
            return "" if to & mine else reason
        return reason if only_users else ""

    return check


def _judge(
    client: _Client,
    channel: Channel,
    event_id: EntryID,
    not_addressed: Callable[[_Client], str],
    no_right: str,
) -> ClientOutcome:
    outcome, text, at_ms = _judge_intervals(client, event_id)
    reason = not_addressed(client)
    if outcome in (Outcome.RECEIVED, Outcome.BEHIND) and reason:
        outcome, text, at_ms = Outcome.NOT_ADDRESSED, f"did not receive it: {reason}", None
    elif outcome in (Outcome.NOT_SUBSCRIBED, Outcome.SUBSCRIBED_LATER) and no_right:
        outcome, text = Outcome.NO_RIGHT, f"could not receive it: {no_right}"
    elif outcome is Outcome.NOT_SUBSCRIBED and (last := client.rejection) is not None:
        why = last.get("rule") or last.get("detail") or last.get("reason")
        when = _when(last["ms"])
        outcome = Outcome.NO_RIGHT if last.get("reason") == "forbidden" else outcome
        text = f"was not subscribed to {channel}: its request at {when} was rejected ({why})"
    elif outcome is Outcome.NOT_SUBSCRIBED:
        text = f"was not subscribed to {channel}"
    state = "connected now" if client.row is not None else "has left"
    if client.may_be_connected:
        state = "perhaps connected"
    sentence = f"Client {client.id} ({client.protocol}, {state}) {text}."
    return ClientOutcome(connection=client.id, outcome=outcome, sentence=sentence, at_ms=at_ms)


def _judge_intervals(client: _Client, event_id: EntryID) -> tuple[Outcome, str, int | None]:
    # A gap also explains why an interval does not contain the event.
    if (gap := client.gap) is not None:
        text = (
            f"received a notice of missing events instead ({gap['event']}, {gap['reason']}) at"
            f" {_when(gap['ms'])}"
        )
        return Outcome.GAP, text, None
    # The last ones of each kind. There may be thousands of intervals.
    later = before = None
    for interval in client.intervals:
        if event_id <= interval.after:
            later = interval
            continue
        if interval.until is not None and event_id <= interval.until:
            # A client that subscribed before the event received it at once, or a little later.
            is_live = interval.since_ms <= event_id.ms
            at_ms = event_id.ms if is_live else interval.since_ms
            how = "live, at about" if is_live else "as a missed event, soon after"
            return Outcome.RECEIVED, f"received it {how} {_when(at_ms)}", at_ms
        if interval.ended_ms is None and client.may_be_connected:
            return Outcome.UNKNOWN, "may have received it: its position is not known", None
        if interval.ended_ms is None:
            return Outcome.BEHIND, _behind(client), None
        if interval.until is None and interval.ended_ms > event_id.ms:
            text = f"may have received it: it left {_end_of(interval)}, and its last position is"
            return Outcome.UNKNOWN, f"{text} not known", None
        before = interval
    if before is not None:
        text = f"stopped following the channel {_end_of(before)}, before it had received the event"
        return Outcome.DISCONNECTED_BEFORE, text, None
    if later is not None:
        when = _when(later.since_ms)
        text = f"subscribed later, at {when}, and asked for events after {later.after}"
        return Outcome.SUBSCRIBED_LATER, text, None
    return Outcome.NOT_SUBSCRIBED, "", None


def _end_of(interval: _Following) -> str:
    return f"at {_when(interval.ended_ms or 0)} ({interval.reason})"


def _is_in_gap(gap: dict[str, Any], event_id: EntryID) -> bool:
    start, end = gap.get("from"), gap.get("to")
    if start is None or end is None:
        return False
    return EntryID.parse(start) < event_id <= EntryID.parse(end)


def _behind(client: _Client) -> str:
    row = client.row
    if row is None:
        return "had not received it when the journal ends"
    subscription = row.subscription
    number = subscription.get("behind")
    count = "an unknown number of entries" if number is None else f"{number} entries"
    return (
        f"has not received it yet: on {row.worker} it is {count} behind, at"
        f" {subscription.get('position')}, and {row.waiting_bytes:,} bytes wait to be sent"
    )


def _summarize(
    found: Explanation,
    clients: _Outcomes,
    missing: tuple[Outcome, str] | None,
    not_addressed: Callable[[_Client], str],
    no_right: str,
    event_id: EntryID,
) -> None:
    user, channel = found.user or "an anonymous user", found.channel
    outcomes, total = set(clients.counts), clients.counts.total()
    if clients.first_received_ms is not None:
        found.outcome = Outcome.RECEIVED
        found.sentence = (
            f"{user} received {event_id} on {clients.counts[Outcome.RECEIVED]} of {total}"
            f" {'client' if total == 1 else 'clients'}, first at about"
            f" {_when(clients.first_received_ms)}."
        )
        return
    if missing is not None and not outcomes & {Outcome.GAP, Outcome.UNKNOWN}:
        found.outcome, found.sentence = missing
        return
    reason = not_addressed(_Client(""))
    if reason and not outcomes & {Outcome.BEHIND, Outcome.GAP}:
        found.outcome = Outcome.NOT_ADDRESSED
        found.sentence = f"{user} was not to receive {event_id}: {reason}."
    elif no_right:
        found.outcome = Outcome.NO_RIGHT
        found.sentence = f"{user} could not receive {event_id}: {no_right}."
    elif not found.clients and not found.unknown:
        found.outcome = Outcome.NOT_CONNECTED
        found.sentence = f"{user} did not receive {event_id}: no client of this user was connected."
    elif not found.clients:
        found.sentence = (
            f"It is not known whether {user} received {event_id}: no client of this user is"
            " connected or in the journals."
        )
    else:
        _summarize_clients(found, clients, user, channel, event_id)


def _summarize_clients(
    found: Explanation, clients: _Outcomes, user: str, channel: str, event_id: EntryID
) -> None:
    first = next((clients.newest[each][0] for each in _PRECEDENCE if each in clients.newest), None)
    if first is None:
        found.sentence = f"It is not known whether {user} received {event_id} of {channel}."
        return
    found.outcome = first.outcome
    more = clients.counts.total() - 1
    others = f" ({more} other {'client' if more == 1 else 'clients'}: see below)" if more else ""
    found.sentence = f"{user} did not receive {event_id}: {_lower(first.sentence)[:-1]}{others}."


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _when(ms: float) -> str:
    text = datetime.fromtimestamp(ms / 1000, UTC).isoformat(sep=" ", timespec="milliseconds")
    return f"{text.removesuffix('+00:00')} UTC"
