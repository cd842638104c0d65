"""Random schedules of two workers on one real server: nothing lost silently, twice or out of order.

RELAY_EXAMPLES and RELAY_STEPS ask for more than the quick default; RELAY_SEED for other schedules.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from relay.hub import feed, recovery
from relay.hub.feed import Feed
from relay.hub.session import Subscription
from relay.model import Channel, EntryID
from relay.stream import asking, entry
from relay.stream.groups import group_of
from relay.stream.keys import Keys
from tests.support.ledger import Ledger
from tests.support.steps import (
    CHANNELS,
    CLAIMS,
    ENTRY_BYTES,
    USERS,
    Clock,
    Format,
    Person,
    Wire,
    Worker,
    distinct_markers,
)
from tests.support.valkey import Server, running

EXAMPLES = int(os.environ.get("RELAY_EXAMPLES", "150"))
STEPS = int(os.environ.get("RELAY_STEPS", "60"))
# More turns than any schedule can have left over; one that needs more does not come to rest.
PATIENCE = 400

statistics: Counter[str] = Counter()

channels = st.sampled_from(CHANNELS)
users = st.sampled_from(USERS)
workers = st.integers(0, 1)
people = st.integers(0, 4)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("valkey"), options=("--appendonly", "no"))
    with running(server):
        yield server


class Schedules(RuleBasedStateMachine):
    """One schedule; `port` is set by the test."""

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

    def _worker(self) -> Worker:
        self.names += 1
        return Worker(f"w{self.names}", self.port, self.keys, self.clock, self.formats)

    def step(self) -> None:
        """The turn that a step ran in is over: bytes leave."""
        for worker in self.workers:
            worker.flush()
        self.clock.now += 1
        self.clock.known_at = self.ledger.step = self.clock.now
        statistics["steps"] += 1

    def _add(
        self, channel: Channel, to: str | None, revokes: str | None
    ) -> tuple[bytes | str | int, ...]:
        log = self.ledger.logs[channel]
        self.times[channel] += 1
        # The life is part of the ID, so that a bare ID names an entry of its own life only.
        entry_id = EntryID(self.times[channel], log.life + 1)
        added = self.ledger.append(channel, entry_id, to, revokes)
        fields = (
            entry.encode_revocation(revokes)
            if revokes
            else entry.encode(b"%*d" % (ENTRY_BYTES, added.number), to=to and [to])
        )
        return ("XADD", self.keys.stream(channel), str(entry_id), *fields)

    def _change_right(self, channel: Channel, user: str | None, value: bytes | None) -> None:
        self.ledger.logs[channel].rights.append((self.clock.now, user, value))

    # ---- producers and operators ------------------------------------------------------------

    @rule(channel=channels, count=st.integers(1, 6))
    def append_again(self, channel: Channel, count: int) -> None:
        self.append(channel, count, None)

    @rule(channel=channels, count=st.integers(1, 6), to=st.sampled_from([None, None, None, *USERS]))
    def append(self, channel: Channel, count: int, to: str | None) -> None:
        self._restore(channel)
        self.admin.execute([self._add(channel, to, None) for _ in range(count)])
        self.step()

    def revoke(self, channel: Channel, user: str) -> None:
        self._restore(channel)
        self._change_right(channel, user, b"-")
        commands = [
            ("MULTI",),
            ("HSET", self.keys.rights(channel), user, b"-"),
            self._add(channel, None, user),
            ("EXEC",),
        ]
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

    def touch_group(self, channel: Channel, which: int, at: str) -> None:
        """What an operator's hand can do to a worker's group, and not be told of.

        Not forward: a read that stops at its COUNT cannot see that; the next whole one tells it.
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

    @rule(
        channel=channels,
        user=users,
        how=st.sampled_from(["revoke", "revoke", "r", "r", "r", "-", "none"]),
    )
    def rights(self, channel: Channel, user: str, how: str) -> None:
        if how == "revoke":
            self.revoke(channel, user)
        else:
            self.change_right(channel, user, None if how == "none" else how.encode())

    @rule(channel=channels, user=users, which=workers)
    def revoke_within_a_read(self, channel: Channel, user: str, which: int) -> None:
        """The hash's own wake-up comes too late for this read: only the entry can stop it."""
        self.append(channel, 1, None)
        self.hear(which)
        self.revoke(channel, user)
        self.append(channel, 1, None)
        self.ask(which)
        self.take(which)

    @rule(channel=channels, how=st.sampled_from(["trim", "xdel"]), number=st.integers(0, 6))
    def remove(self, channel: Channel, how: str, number: int) -> None:
        if how == "trim":
            self.trim(channel, number)
        else:
            self.delete_entry(channel, number)

    @rule(
        channel=channels,
        how=st.sampled_from(["del", "flush", "type", "group gone", "group 0"]),
        which=workers,
        rewind=st.booleans(),
    )
    def destroy(self, channel: Channel, how: str, which: int, rewind: bool) -> None:
        match how:
            case "del":
                self.delete_stream(channel, rewind)
            case "flush":
                self.flush_everything(rewind)
            case "type":
                self.put_another_type(channel)
            case _:
                self.touch_group(channel, which, how.removeprefix("group "))

    # ---- clients ----------------------------------------------------------------------------

    @rule(
        who=people,
        which=workers,
        wanted=st.sets(channels, min_size=1),
        how=st.sampled_from(["full", "full", "bare", "anew"]),
    )
    def connect(self, who: int, which: int, wanted: set[Channel], how: str) -> None:
        person = self.people[who]
        if person.session is not None:
            person.leave(politely=how == "full")
        person.connect(self.workers[which], sorted(wanted), how)
        self.step()

    def subscribe(self, who: int, channel: Channel, how: str) -> None:
        person = self.people[who]
        if person.session is not None:
            person.subscribe(channel, how)
        self.step()

    def unsubscribe(self, who: int, channel: Channel) -> None:
        self.people[who].unsubscribe(channel)
        self.step()

    def disconnect(self, who: int, politely: bool) -> None:
        self.people[who].leave(politely=politely)
        self.step()

    def drain(self, who: int) -> None:
        self.people[who].drain()
        self.step()

    def fill(self, who: int) -> None:
        self.people[who].fill()
        self.step()

    @rule(
        who=people,
        channel=channels,
        how=st.sampled_from(["subscribe", "unsubscribe", "leave", "vanish"]),
    )
    def come_and_go(self, who: int, channel: Channel, how: str) -> None:
        if how == "subscribe":
            self.subscribe(who, channel, "full")
        elif how == "unsubscribe":
            self.unsubscribe(who, channel)
        else:
            self.disconnect(who, politely=how == "leave")

    @rule(who=people, full=st.booleans())
    def socket(self, who: int, full: bool) -> None:
        if full:
            self.fill(who)
        else:
            self.drain(who)

    # ---- workers ----------------------------------------------------------------------------

    def hear(self, which: int) -> None:
        self.workers[which].hear()
        self.step()

    def ask(self, which: int) -> None:
        self.workers[which].ask()
        self.step()

    def take(self, which: int) -> None:
        self.workers[which].take()
        self.step()

    def ask_pages(self, which: int) -> None:
        self.workers[which].ask_pages()
        self.step()

    def take_pages(self, which: int) -> None:
        self.workers[which].take_pages()
        self.step()

    @rule(which=workers, turns=st.integers(1, 3))
    def work_again(self, which: int, turns: int) -> None:
        self.work(which, turns)

    @rule(which=workers, turns=st.integers(1, 3))
    def work(self, which: int, turns: int) -> None:
        for _ in range(turns):
            self.workers[which].work()
            self.step()

    def lose_links(self, which: int) -> None:
        self.workers[which].lose_links()
        self.step()

    def restart(self, which: int) -> None:
        old = self.workers[which]
        for person in self.people:
            if person.worker is old:
                person.session = person.worker = None
                person.standing.clear()
                person.anew.clear()
        old.close()
        self.workers[which] = self._worker()
        self.step()

    @rule(
        which=workers,
        parts=st.lists(
            st.sampled_from(["hear", "ask", "take", "ask_pages", "take_pages"]), max_size=4
        ),
    )
    def turn(self, which: int, parts: list[str]) -> None:
        for part in parts:
            getattr(self, part)(which)

    @rule(which=workers, how=st.sampled_from(["lose", "ask and lose", "restart"]))
    def fail(self, which: int, how: str) -> None:
        if how.startswith("ask"):
            self.ask(which)
            self.ask_pages(which)
        if how.endswith("lose"):
            self.lose_links(which)
        else:
            self.restart(which)

    @initialize()
    def begin(self) -> None:
        for channel in CHANNELS:
            self._change_right(channel, "bob", b"r")
            self.admin.call("HSET", self.keys.rights(channel), "bob", b"r")
        self.people[0].connect(self.workers[0], CHANNELS, "anew")
        self.people[2].connect(self.workers[1], CHANNELS, "anew")
        self.step()

    @rule()
    def rest(self) -> None:
        """Everything is taken until nothing is wanted; then every client must be complete."""
        for channel in sorted(self.foreign):
            self.delete_stream(channel, rewind=False)
        for _ in range(PATIENCE):
            for worker in self.workers:
                worker.work()
            self.step()
            before = [len(person.outbox.data) for person in self.people]
            for person in self.people:
                person.drain()
            for worker in self.workers:
                worker.hear()
            if not any(before) and not any(worker.busy for worker in self.workers):
                break
        else:
            raise AssertionError("does not come to rest")
        for person in self.people:
            if person.session is None:
                continue
            for channel, subscription in person.session.subscriptions.items():
                assert subscription.live, "still behind"
                view = person.views[channel]
                self.ledger.check_complete(view, channel, person.user)

    def teardown(self) -> None:
        try:
            self.rest()
        finally:
            for worker in self.workers:
                worker.close()
            self.admin.close()
            statistics["schedules"] += 1
            statistics.update(self.ledger.statistics)


def explore(examples: int, *, random: int | None = None, shrink: bool = True) -> None:
    """Random schedules, the same every time unless a seed is given."""
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])]
    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=random is None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    if random is not None:
        run_state_machine_as_test(seed(random)(Schedules), settings=chosen)
    else:
        run_state_machine_as_test(Schedules, settings=chosen)


@pytest.fixture(autouse=True)
def prepared(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Schedules, "port", server.port)
    monkeypatch.setattr(asking, "new_marker", distinct_markers())


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.timeout(0)
def test_no_schedule_loses_an_event_silently() -> None:
    statistics.clear()
    chosen = os.environ.get("RELAY_SEED")
    try:
        explore(EXAMPLES, random=None if chosen is None else int(chosen))
    finally:
        print(dict(statistics))  # noqa: T201 - `pytest -s` shows how much was proven


# ---- the test's teeth: each of these breaks one rule, and is found -------------------------------


def _blind_to_trims(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (feed, recovery):
        monkeypatch.setattr(module, "untrimmed", lambda _position, _state: True)
    monkeypatch.setattr(Feed, "untouched", lambda *_: True)


def _live_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    catch_up = Feed.catch_up

    def broken(self: Feed, subscription: Subscription) -> None:
        cursor = subscription.cursor
        if cursor is not None and cursor < self.position and not subscription.session.paused:
            subscription.cursor = self.position
        catch_up(self, subscription)

    monkeypatch.setattr(Feed, "catch_up", broken)


def _revocations_unheeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Feed, "_revoke", lambda *_: None)


def _full_socket_unheeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Feed, "stall", lambda *_: None)


def _any_life_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "incarnation_of", lambda _marker, _replid: 1)
    monkeypatch.setattr(recovery, "incarnation_of", lambda _marker, _replid: 1)


def _holes_unheeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Feed, "untouched", lambda *_: True)


def _examined_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Feed, "on_examine_lost", lambda *_: None)


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "broken",
    [
        _blind_to_trims,
        _live_too_early,
        _revocations_unheeded,
        _full_socket_unheeded,
        _any_life_will_do,
        _holes_unheeded,
        _examined_for_nobody,
    ],
)
def test_a_broken_rule_is_found(
    broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        explore(4 * EXAMPLES, shrink=False)
