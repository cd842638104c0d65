"""The ledger of random schedules: appended entries, rights, and what each client received.

It does not use relay's code. If a client did not receive an event that it may read, it must have
received a notice before any later event, based on a read that is not older than the event.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from relay.core.model import Channel, EntryID
from relay.hub.recovery import Notice


@dataclass(slots=True, kw_only=True)
class Entry:
    """One entry, even if it was removed."""

    number: int  # Index among all entries that were ever appended to the channel.
    step: int
    life: int
    id: EntryID
    to: str | None = None
    revokes: str | None = None
    grants: str | None = None
    present: bool = True


@dataclass(slots=True)
class Log:
    """The history of one channel."""

    entries: list[Entry] = field(default_factory=list)
    life: int = 0
    exists: bool = False
    removals: int = 0
    # Changes of the rights hash: step, user (None: all), value.
    rights: list[tuple[int, str | None, bytes | None]] = field(default_factory=list)

    def value(self, user: str, step: int) -> bytes | None:
        """Return the hash's value for a user after this step."""
        value = None
        for at, who, new in self.rights:
            if at <= step and who in (None, user):
                value = new
        return value

    def present(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.present]

    def gone(self) -> None:
        """Record that the stream was deleted."""
        for entry in self.entries:
            self.removals += entry.present
            entry.present = False
        self.exists = False


@dataclass(slots=True)
class Received:
    """Events and notices that one client received on one channel, over all its connections."""

    events: set[int] = field(default_factory=set)
    # The step of the newest read that a notice was based on.
    told: int = -1
    last: int = -1
    # Entries before this index need not be delivered, because the client subscribed after them.
    owed_after: int = 0
    # The step of the examination that accepted this subscription. Its rights are of this step.
    admitted: int = 0
    excused: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Saved:
    """A snapshot of the server: the existing entries, and the step of the rights hashes."""

    step: int
    present: dict[Channel, set[int]]


class Ledger:
    """All channels and clients. `allowed` is the rights rule: (user, value of the hash)."""

    def __init__(self, channels: list[Channel], claims: frozenset[str]) -> None:
        self.step = 0
        self.logs = {channel: Log() for channel in channels}
        self.statistics: Counter[str] = Counter()
        self._claims = claims

    def allowed(self, channel: Channel, user: str, step: int) -> bool:
        value = self.logs[channel].value(user, step)
        return value == b"r" or (value is None and user in self._claims)

    def append(
        self,
        channel: Channel,
        entry_id: EntryID,
        to: str | None = None,
        revokes: str | None = None,
        grants: str | None = None,
    ) -> Entry:
        log = self.logs[channel]
        log.exists = True
        entry = Entry(
            number=len(log.entries),
            step=self.step,
            life=log.life,
            id=entry_id,
            to=to,
            revokes=revokes,
            grants=grants,
        )
        log.entries.append(entry)
        return entry

    def save(self) -> Saved:
        """Return a snapshot of all streams and rights hashes."""
        return Saved(
            step=self.step,
            present={
                channel: {entry.number for entry in log.present()}
                for channel, log in self.logs.items()
            },
        )

    def roll_back(self, saved: Saved, now: int) -> None:
        """Restore a snapshot of the server."""
        for channel, log in self.logs.items():
            for entry in log.entries:
                present = entry.number in saved.present[channel]
                log.removals += entry.present and not present
                entry.present = present
            users = {who for _, who, _ in log.rights if who is not None}
            before = {user: log.value(user, saved.step) for user in users}
            log.rights.extend((now, user, value) for user, value in before.items())

    # ---- reports of clients -----------------------------------------------------------------

    def admitted(self, view: Received, channel: Channel, user: str, known_at: int) -> None:
        """Record that the hub accepted a client, based on a read at `known_at`."""
        assert self.allowed(channel, user, known_at), "let in without a right"
        view.admitted = known_at

    def began(self, view: Received, channel: Channel, known_at: int) -> None:
        """Record that a client began without a position. It need not receive earlier entries."""
        view.owed_after = known_at
        view.excused |= {
            entry.number
            for entry in self.logs[channel].entries
            if entry.step <= known_at and entry.number not in view.events
        }

    def received_event(
        self, view: Received, channel: Channel, user: str, number: int, offered_at: int
    ) -> None:
        """Check the rules that apply to every single event."""
        log = self.logs[channel]
        entry = log.entries[number]
        assert number not in view.events, f"entry {number} came twice"
        assert number > view.last, f"entry {number} came after {view.last}"
        assert entry.to in (None, user), "an event for somebody else"
        for other in log.entries[:number]:
            if other.revokes == user and other.step > view.admitted:
                granted = any(
                    other.step < at <= offered_at and value != b"-"
                    for at, who, value in log.rights
                    if who in (None, user)
                )
                assert granted, f"entry {number} came after the revocation {other.number}"
        self._check_hole(view, channel, user, view.last + 1, number)
        view.events.add(number)
        view.last = number
        self.statistics["events"] += 1

    def dropped(self, view: Received, channel: Channel, user: str) -> None:
        """Record that the hub ended a subscription."""
        changes = {at for at, who, _ in self.logs[channel].rights if who in (None, user)}
        assert any(at > view.admitted and not self.allowed(channel, user, at) for at in changes), (
            "dropped, and the right was there all the time"
        )

    def received_notice(
        self, view: Received, channel: Channel, user: str, notice: Notice, known_at: int
    ) -> None:
        log = self.logs[channel]
        if notice.kind != "revoked":
            assert log.removals, f"{notice} though nothing was ever removed"
            missing = any(
                not entry.present and entry.number > view.last and self._owed(view, entry, user)
                for entry in log.entries
            )
            self.statistics["notices"] += 1
            self.statistics["false alarms"] += not missing
        view.told = max(view.told, known_at)

    @staticmethod
    def _owed(view: Received, entry: Entry, user: str) -> bool:
        return (
            entry.revokes is None
            and entry.grants is None
            and entry.to in (None, user)
            and entry.number not in view.events
            and entry.number not in view.excused
            and entry.step > view.owed_after
        )

    def _check_hole(
        self, view: Received, channel: Channel, user: str, begin: int, end: int
    ) -> None:
        """Check that the client received a notice if it missed owed entries from begin to end.

        The notice must precede later events and be based on a read that is not older than the
        entry.
        """
        for entry in self.logs[channel].entries[begin:end]:
            if self._owed(view, entry, user) and view.told < entry.step:
                raise AssertionError(
                    f"silent about {entry}; last event {view.last}, told {view.told}"
                )

    def check_complete(self, view: Received, channel: Channel, user: str) -> None:
        """Check at the end that each subscribed client received everything or a notice."""
        assert self.allowed(channel, user, self.step), "still subscribed without a right"
        self._check_hole(view, channel, user, view.last + 1, len(self.logs[channel].entries))
