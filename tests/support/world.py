"""Actions of producers and operators on the streams, each recorded in the ledger."""

from __future__ import annotations

from collections import Counter

from hypothesis.stateful import RuleBasedStateMachine

from relay.core.model import Channel, EntryID
from relay.stream.format import entry
from relay.stream.format.keys import Keys
from relay.stream.read.groups import group_of
from tests.support.ledger import Ledger, Saved
from tests.support.steps import CHANNELS, CLAIMS, ENTRY_BYTES, Clock, Format, Person, Worker
from tests.support.wire import Wire

statistics: Counter[str] = Counter()


class World(RuleBasedStateMachine):
    """Two workers, five clients and two channels. The test sets `port`."""

    port = 0

    def __init__(self) -> None:
        super().__init__()
        self.keys = Keys("relay:")
        self.admin = Wire(self.port)
        self.admin.call("FLUSHALL")
        self.clock = Clock()
        self.formats = (Format(self.clock, personal=False), Format(self.clock, personal=True))
        self.ledger = Ledger(CHANNELS, CLAIMS)
        self.names = 0
        self.workers = [self._worker() for _ in range(2)]
        names = ["ann-s", "ann-p", "bob-s", "bob-p", "ann2-s"]
        self.people = [
            Person(name, "bob" if name.startswith("bob") else "ann", self.ledger, self.clock)
            for name in names
        ]
        self.times = dict.fromkeys(CHANNELS, 0)
        self.foreign: set[Channel] = set()
        # The data of a lagging replica or an old RDB file.
        self.saved: Saved | None = None

    def _worker(self) -> Worker:
        self.names += 1
        return Worker(f"w{self.names}", self.port, self.keys, self.clock, self.formats)

    def step(self) -> None:
        """End the turn in which a step ran: send pending bytes and advance the clock."""
        for worker in self.workers:
            worker.flush()
        self.clock.now += 1
        self.clock.known_at = self.ledger.step = self.clock.now
        statistics["steps"] += 1

    def _add(
        self,
        channel: Channel,
        to: str | None = None,
        *,
        revokes: str | None = None,
        grants: str | None = None,
    ) -> tuple[bytes | str | int, ...]:
        log = self.ledger.logs[channel]
        self.times[channel] += 1
        # The ID contains the life, so that IDs of different lives are different.
        entry_id = EntryID(self.times[channel], log.life + 1)
        added = self.ledger.append(channel, entry_id, to, revokes, grants)
        if revokes:
            fields = entry.encode_revocation(revokes)
        elif grants:
            fields = entry.encode_grant(grants)
        else:
            fields = entry.encode(b"%*d" % (ENTRY_BYTES, added.number), to=to and [to])
        return ("XADD", self.keys.stream(channel), str(entry_id), *fields)

    def _change_right(self, channel: Channel, user: str | None, value: bytes | None) -> None:
        self.ledger.logs[channel].rights.append((self.clock.now, user, value))

    def append(self, channel: Channel, count: int, to: str | None) -> None:
        self._restore(channel)
        self.admin.execute([self._add(channel, to) for _ in range(count)])
        self.step()

    def revoke(self, channel: Channel, user: str) -> None:
        self._restore(channel)
        self._change_right(channel, user, b"-")
        commands = [
            ("MULTI",),
            ("HSET", self.keys.rights(channel), user, b"-"),
            self._add(channel, revokes=user),
            ("EXEC",),
        ]
        self.admin.execute(commands)
        self.step()

    def grant(self, channel: Channel, user: str, before: bytes | None) -> None:
        """End a revocation, and restore the previous value of the rights hash."""
        self._restore(channel)
        self._change_right(channel, user, before)
        key = self.keys.rights(channel)
        restored = ("HSET", key, user, before) if before else ("HDEL", key, user)
        commands = [("MULTI",), self._add(channel, grants=user), restored, ("EXEC",)]
        self.admin.execute(commands)
        self.step()

    def change_right(self, channel: Channel, user: str, value: bytes | None) -> None:
        self._change_right(channel, user, value)
        key = self.keys.rights(channel)
        if value is None:
            self.admin.call("HDEL", key, user)
        else:
            self.admin.call("HSET", key, user, value)
        self.step()

    def trim(self, channel: Channel, keep: int) -> None:
        self._restore(channel)
        self.admin.call("XTRIM", self.keys.stream(channel), "MAXLEN", keep)
        log = self.ledger.logs[channel]
        present = log.present()
        for old in present[: len(present) - keep]:
            old.present = False
            log.removals += 1
        self.step()

    def delete_entry(self, channel: Channel, back: int) -> None:
        log = self.ledger.logs[channel]
        present = log.present()
        if len(present) <= back:
            return
        one = present[-1 - back]
        assert self.admin.call("XDEL", self.keys.stream(channel), str(one.id)) == 1
        one.present = False
        log.removals += 1
        self.step()

    def _gone(self, channel: Channel, *, rewind: bool) -> None:
        log = self.ledger.logs[channel]
        self.saved = None
        log.gone()
        log.life += 1
        log.removals += 1
        if rewind:
            self.times[channel] = 0

    def delete_stream(self, channel: Channel, rewind: bool) -> None:
        self.foreign.discard(channel)
        self.admin.call("DEL", self.keys.stream(channel))
        self._gone(channel, rewind=rewind)
        self.step()

    def put_another_type(self, channel: Channel) -> None:
        self.admin.call("SET", self.keys.stream(channel), "not a stream")
        self.foreign.add(channel)
        self._gone(channel, rewind=False)
        self.step()

    def flush_everything(self, rewind: bool) -> None:
        self.admin.call("FLUSHALL")
        self.foreign.clear()
        for channel in CHANNELS:
            self._gone(channel, rewind=rewind)
            self._change_right(channel, None, None)
        self.step()

    def save(self) -> None:
        """Take a snapshot. The next failover loses all later entries, although acknowledged."""
        if not self.foreign:
            self.admin.call("SAVE")
            self.saved = self.ledger.save()
            self.step()

    def fail_over(self) -> None:
        """Turn the server into a promoted replica with the data of the last `save`.

        It has a new replication ID, with the old one as the previous ID.
        """
        if self.saved is not None:
            self.admin.call("DEBUG", "RELOAD", "NOSAVE")
            self.ledger.roll_back(self.saved, self.clock.now)
        for log in self.ledger.logs.values():
            # A loss cannot be excluded, so clients may receive notices.
            log.removals += 1
        self.saved = None
        self.admin.call("REPLICAOF", "127.0.0.1", 1)
        self.admin.call("REPLICAOF", "NO", "ONE")
        for worker in self.workers:
            worker.lose_links()
        self.step()

    def touch_group(self, channel: Channel, which: int, at: str) -> None:
        """Change a worker's group as an operator could.

        Not forward: a read that reaches its COUNT cannot detect that; the next complete one does.
        """
        key, group = self.keys.stream(channel), group_of(self.workers[which].name)
        if at == "gone":
            self.admin.call("XGROUP", "DESTROY", key, group)
        else:
            self.admin.call("XGROUP", "SETID", key, group, at)
        self.step()

    def _restore(self, channel: Channel) -> None:
        if channel in self.foreign:
            self.delete_stream(channel, rewind=False)
