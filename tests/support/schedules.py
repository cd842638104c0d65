"""Random schedules for Hypothesis: actions of producers, operators, clients and workers."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from relay.core.model import Channel
from relay.hub.session import SubscriptionMode
from tests.support.steps import CHANNELS, USERS
from tests.support.world import World, statistics

STEPS = int(os.environ.get("RELAY_STEPS", "60"))
# More turns than any schedule needs. The test fails if work is left after that.
PATIENCE = 400

channels = st.sampled_from(CHANNELS)
users = st.sampled_from(USERS)
workers = st.integers(0, 1)
people = st.integers(0, 4)


class Schedules(World):
    """One schedule. More important rules are listed twice."""

    @rule(channel=channels, count=st.integers(1, 6))
    def append_again(self, channel: Channel, count: int) -> None:
        self.append(channel, count, None)

    @rule(channel=channels, count=st.integers(1, 6), to=st.sampled_from([None, None, None, *USERS]))
    def append_to(self, channel: Channel, count: int, to: str | None) -> None:
        self.append(channel, count, to)

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
        """Revoke within one read.

        The invalidation of the hash arrives after the read, so only the entry can end access.
        """
        self.append(channel, 1, None)
        self.hear(which)
        self.revoke(channel, user)
        self.append(channel, 1, None)
        self.ask(which)
        self.take(which)

    @rule(channel=channels, user=users, which=workers, read=st.booleans())
    def revoke_and_grant(self, channel: Channel, user: str, which: int, read: bool) -> None:
        """Revoke and grant within one read, or in two reads."""
        before = self.ledger.logs[channel].value(user, self.clock.now)
        self.append(channel, 1, None)
        self.revoke(channel, user)
        self.append(channel, 1, None)
        if read:
            self.hear(which)
            self.ask(which)
            self.take(which)
        self.grant(channel, user, before)
        self.append(channel, 1, None)

    @rule(channel=channels, who=people, which=workers)
    def revoke_for_a_moment(self, channel: Channel, who: int, which: int) -> None:
        """Revoke and grant. A client that connects afterwards must not be affected."""
        person = self.people[who]
        self.revoke(channel, person.user)
        self.change_right(channel, person.user, b"r")
        self.connect(who, which, {channel}, "full")

    @rule(channel=channels, who=people, rewind=st.booleans())
    def delete_within_a_page(self, channel: Channel, who: int, rewind: bool) -> None:
        worker = self.people[who].worker
        if worker is None:
            return
        which = self.workers.index(worker)
        self.work(which, 2)
        self.fill(who)
        self.append(channel, 3, None)
        self.work(which, 1)
        self.drain(who)
        self.delete_stream(channel, rewind)
        self.append(channel, 2, None)
        self.ask_pages(which)
        self.take_pages(which)

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

    @rule(how=st.sampled_from(["save", "fail over"]))
    def server(self, how: str) -> None:
        if how == "save":
            self.save()
        else:
            self.fail_over()

    @rule(channel=channels, count=st.integers(1, 3), seen=st.booleans(), which=workers)
    def lose_what_was_appended(self, channel: Channel, count: int, seen: bool, which: int) -> None:
        """Lose acknowledged entries that at most one worker has read."""
        self.save()
        self.append(channel, count, None)
        if seen:
            self.work(which, 1)
        self.fail_over()

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
        self.workers[which].receive_pushes()
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
        """Process everything until there is no work left. Then every client must be complete."""
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
                worker.receive_pushes()
            if not any(before) and not any(worker.busy for worker in self.workers):
                break
        else:
            raise AssertionError("does not come to rest")
        for person in self.people:
            if person.session is None:
                continue
            for channel, subscription in person.session.subscriptions.items():
                assert subscription.mode is SubscriptionMode.LIVE, "still behind"
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
    """Run random schedules. They are the same each time unless a seed is set."""
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
