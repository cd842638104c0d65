"""Explain whether a user's clients received an event, and if not, why.

The answer is derived from the entry and its stream, the revocations and grants in the stream, the
journals of all workers and their present connections. Each client has one sentence, and the user
has one for all of them. `unknown` lists what could not be determined, so that an answer is never
more certain than its sources.

"Received" means that relay has written the event to the client's connection. A protocol without
acknowledgements contains no further information.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from relay.core.model import Broken, EntryID, Event, Grant, Revocation
from relay.inspect.connections import MOST, ConnectionFilter, find_connections
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
_RIGHTS_ENTRIES, _RIGHTS_PAGE = 10_000, 500
_DEAD_LETTERS = 10_000


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


@dataclass(slots=True, kw_only=True)
class ClientOutcome:
    """One client of the user. `at_ms` is when it received the event, if that is known."""

    connection: str
    outcome: Outcome
    sentence: str
    at_ms: int | None = None


@dataclass(slots=True, kw_only=True)
class Explanation:
    """The answer. `clients` are the user's connections in the journals and on the workers."""

    user: str
    channel: str
    id: str
    outcome: Outcome
    sentence: str
    clients: list[ClientOutcome] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """Return the explanation as JSON values."""
        return asdict(self)


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
    rejections: list[dict[str, Any]] = field(default_factory=list)
    gaps: list[dict[str, Any]] = field(default_factory=list)
    # Its row in the directory, if it is connected now.
    row: dict[str, Any] | None = None


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
        clients = await self._clients(found, user, channel)
        to = event.to if isinstance(event, Event) else None
        not_addressed = _not_addressed(found, user, to, clients)
        no_right = await self._no_right(found, user, channel, event_id, view.state)
        for each in clients:
            found.clients.append(_judge(each, channel, event_id, not_addressed, no_right))
        _summarize(found, missing, not_addressed, no_right, event_id)
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

    async def _clients(self, found: Explanation, user: str, channel: Channel) -> list[_Client]:
        reader = JournalReader(self._servers.home, self._keys)
        events = await reader.newest(EventFilter(user=user), MOST_EVENTS)
        complete_ms = await reader.complete_since_ms()
        event_ms = EntryID.parse(found.id).ms
        if complete_ms is None:
            found.unknown.append("There is no journal: clients that have left are not known.")
        elif complete_ms > event_ms:
            found.unknown.append(
                f"The journals are complete since {_when(complete_ms)}, after the event: clients"
                " that had left before are not known."
            )
        clients: dict[str, _Client] = {}
        notices = []
        for event in events:
            if event["event"] == "dropped":
                found.unknown.append(
                    f"{event['number']} events are missing in the journal of {event['worker']}"
                    f" ({_when(event['ms'])})."
                )
            elif "user" not in event:
                if event.get("channel") == channel:
                    notices.append(event)
            elif "connection" in event:
                client = clients.setdefault(event["connection"], _Client(event["connection"]))
                _note(client, event, channel)
        for client in clients.values():
            client.gaps += [each for each in notices if _followed_at(client, each["ms"])]
        page = await find_connections(self._questions, ConnectionFilter(user=user, limit=MOST))
        for instance in [*page.silent, *page.failed]:
            found.unknown.append(f"{instance} did not answer: its connections are not known.")
        if page.after:
            found.unknown.append(f"More than {MOST} connections are open; the others are missing.")
        for row in page.connections:
            client = clients.setdefault(row["id"], _Client(row["id"]))
            await self._note_row(client, row, channel)
        return list(clients.values())

    async def _note_row(self, client: _Client, row: dict[str, Any], channel: Channel) -> None:
        client.row = row
        client.protocol = row["protocol"]
        client.connected_ms = client.connected_ms or row["since_ms"]
        mine = [each for each in row["subscriptions"] if each["channel"] == channel]
        if not mine and row["subscription_count"] > len(row["subscriptions"]):
            wanted = ConnectionFilter(user=row["user"], channel=channel, after="", limit=MOST)
            page = await find_connections(self._questions, wanted)
            mine = [
                each
                for found in page.connections
                if found["id"] == row["id"]
                for each in found["subscriptions"]
                if each["channel"] == channel
            ]
        for subscription in mine:
            row["subscription"] = subscription
            if subscription["began"] is None:
                continue
            began = EntryID.parse(subscription["began"])
            opened = [each for each in client.intervals if each.ended_ms is None]
            if not opened:
                opened = [_Following(began, row["since_ms"])]
                client.intervals += opened
            opened[-1].until = EntryID.parse(subscription["position"])


def _note(client: _Client, event: dict[str, Any], channel: Channel) -> None:
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
            client.rejections.append(event)
        case "gap" | "reset" if event.get("channel") == channel:
            client.gaps.append(event)


def _end(client: _Client, ms: int, reason: str, position: str | None) -> None:
    for interval in client.intervals:
        if interval.ended_ms is None:
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
    found: Explanation, user: str, to: frozenset[str] | None, clients: Sequence[_Client]
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
            mine = {f"group:{name}" for name in row["groups"]} | {f"client:{row['client']}"}
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
    elif outcome is Outcome.NOT_SUBSCRIBED and client.rejections:
        last = client.rejections[-1]
        why = last.get("rule") or last.get("detail") or last.get("reason")
        when = _when(last["ms"])
        outcome = Outcome.NO_RIGHT if last.get("reason") == "forbidden" else outcome
        text = f"was not subscribed to {channel}: its request at {when} was rejected ({why})"
    elif outcome is Outcome.NOT_SUBSCRIBED:
        text = f"was not subscribed to {channel}"
    state = "connected now" if client.row is not None else "has left"
    sentence = f"Client {client.id} ({client.protocol}, {state}) {text}."
    return ClientOutcome(connection=client.id, outcome=outcome, sentence=sentence, at_ms=at_ms)


def _judge_intervals(client: _Client, event_id: EntryID) -> tuple[Outcome, str, int | None]:
    # A gap also explains why an interval does not contain the event.
    for gap in client.gaps:
        if _is_in_gap(gap, event_id):
            text = (
                f"received a notice of missing events instead ({gap['event']}, {gap['reason']}) at"
                f" {_when(gap['ms'])}"
            )
            return Outcome.GAP, text, None
    found: tuple[Outcome, str, int | None] = (Outcome.NOT_SUBSCRIBED, "", None)
    for interval in client.intervals:
        if event_id <= interval.after:
            if found[0] is not Outcome.DISCONNECTED_BEFORE:
                when = _when(interval.since_ms)
                text = f"subscribed later, at {when}, and asked for events after {interval.after}"
                found = (Outcome.SUBSCRIBED_LATER, text, None)
            continue
        if interval.until is not None and event_id <= interval.until:
            # A client that subscribed before the event received it at once, or a little later.
            is_live = interval.since_ms <= event_id.ms
            at_ms = event_id.ms if is_live else interval.since_ms
            how = "live, at about" if is_live else "as a missed event, soon after"
            return Outcome.RECEIVED, f"received it {how} {_when(at_ms)}", at_ms
        if interval.ended_ms is None:
            return Outcome.BEHIND, _behind(client), None
        end = f"at {_when(interval.ended_ms)} ({interval.reason})"
        if interval.until is None and interval.ended_ms > event_id.ms:
            text = f"may have received it: it left {end}, and its last position is not known"
            return Outcome.UNKNOWN, text, None
        text = f"stopped following the channel {end}, before it had received the event"
        found = (Outcome.DISCONNECTED_BEFORE, text, None)
    return found


def _is_in_gap(gap: dict[str, Any], event_id: EntryID) -> bool:
    start, end = gap.get("from"), gap.get("to")
    if start is None or end is None:
        return False
    return EntryID.parse(start) < event_id <= EntryID.parse(end)


def _behind(client: _Client) -> str:
    row = client.row
    if row is None:
        return "had not received it when the journal ends"
    subscription = row.get("subscription", {})
    number = subscription.get("behind")
    count = "an unknown number of entries" if number is None else f"{number} entries"
    return (
        f"has not received it yet: on {row['worker']} it is {count} behind, at"
        f" {subscription.get('position')}, and {row['waiting_bytes']:,} bytes wait to be sent"
    )


def _summarize(
    found: Explanation,
    missing: tuple[Outcome, str] | None,
    not_addressed: Callable[[_Client], str],
    no_right: str,
    event_id: EntryID,
) -> None:
    user, channel = found.user or "an anonymous user", found.channel
    outcomes = {each.outcome for each in found.clients}
    received = [each for each in found.clients if each.outcome is Outcome.RECEIVED]
    if received:
        found.outcome = Outcome.RECEIVED
        total = len(found.clients)
        found.sentence = (
            f"{user} received {event_id} on {len(received)} of {total}"
            f" {'client' if total == 1 else 'clients'}, first at about"
            f" {_when(min(each.at_ms or 0 for each in received))}."
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
        _summarize_clients(found, user, channel, event_id)


def _summarize_clients(found: Explanation, user: str, channel: str, event_id: EntryID) -> None:
    connected_then = [each for each in found.clients if each.outcome in _PRECEDENCE]
    first = next(
        (each for wanted in _PRECEDENCE for each in connected_then if each.outcome is wanted), None
    )
    if first is None:
        found.sentence = f"It is not known whether {user} received {event_id} of {channel}."
        return
    found.outcome = first.outcome
    more = len(found.clients) - 1
    others = f" ({more} other {'client' if more == 1 else 'clients'}: see below)" if more else ""
    found.sentence = f"{user} did not receive {event_id}: {_lower(first.sentence)[:-1]}{others}."


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _when(ms: float) -> str:
    text = datetime.fromtimestamp(ms / 1000, UTC).isoformat(sep=" ", timespec="milliseconds")
    return f"{text.removesuffix('+00:00')} UTC"
