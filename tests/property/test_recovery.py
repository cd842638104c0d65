"""Random schedules of two workers on a real server: no event is lost silently, repeated or
reordered.

RELAY_EXAMPLES and RELAY_STEPS set more than the quick default, RELAY_SEED other schedules.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from relay.core.model import ZERO_ID, Revocation, StreamState
from relay.core.stream_interface import Page, PageRequest
from relay.hub import feed, recovery
from relay.hub.feed import Feed
from relay.hub.session import Subscription
from relay.stream.connection.primary import Primary, Replication
from relay.stream.read import stream_commands
from relay.stream.read.stream_commands import parse_state
from tests.support.schedules import Schedules, explore
from tests.support.steps import CHANNELS, distinct_markers
from tests.support.valkey import Server, running
from tests.support.world import statistics

NEWS, WORK = CHANNELS
EXAMPLES = int(os.environ.get("RELAY_EXAMPLES", "200"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("valkey"), options=("--appendonly", "no"))
    with running(server):
        yield server


@pytest.fixture(autouse=True)
def prepared(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Schedules, "port", server.port)
    monkeypatch.setattr(stream_commands, "new_marker", distinct_markers())


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


@pytest.mark.redis
def test_no_event_is_sent_twice_after_a_failover_that_lost_the_marker() -> None:
    """The stream was created, read, and lost its newest entries before its marker was
    replicated."""
    schedule = Schedules()
    schedule.begin()
    schedule.save()
    schedule.delete_within_a_page(NEWS, rewind=False, who=4)
    schedule.revoke_within_a_read(WORK, user="bob", which=0)
    schedule.delete_within_a_page(WORK, rewind=True, who=0)
    schedule.connect(0, which=1, wanted={WORK}, how="full")
    schedule.lose_what_was_appended(NEWS, count=1, seen=False, which=0)
    schedule.lose_what_was_appended(NEWS, count=1, seen=True, which=1)
    schedule.save()
    schedule.lose_what_was_appended(WORK, count=1, seen=True, which=1)
    schedule.teardown()


# ---- proof that the test detects faults: each of these breaks one rule --------------------------


def _blind_to_trims(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (feed, recovery):
        monkeypatch.setattr(module, "untrimmed", lambda _position, _state: True)
    monkeypatch.setattr(Feed, "has_gap", lambda *_: False)


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


def _old_revocations_hit_new_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    revoke = Feed._revoke

    def broken(self: Feed, body: Revocation) -> None:
        for subscription in self.subscriptions():
            subscription.rights_as_of = ZERO_ID
        revoke(self, body)

    monkeypatch.setattr(Feed, "_revoke", broken)


def _pages_of_any_life(monkeypatch: pytest.MonkeyPatch) -> None:
    on_page = Feed.on_page

    def broken(self: Feed, request: PageRequest, page: Page) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Feed, "has_same_incarnation", lambda *_: True)
            on_page(self, request, page)

    monkeypatch.setattr(Feed, "on_page", broken)


def _full_socket_unheeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Feed, "stall", lambda *_: None)


def _any_life_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*replies: object) -> StreamState:
        state = parse_state(*replies)  # type: ignore[arg-type]
        return replace(state, incarnation=1) if state.exists else state

    monkeypatch.setattr(stream_commands, "parse_state", broken)


def _failovers_unheeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's own entry is sufficient proof, regardless of the replication history."""
    monkeypatch.setattr(recovery, "may_have_lost", lambda *_: False)


def _every_server_is_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Primary, "is_without_loss_since", lambda *_: True)


def _every_process_is_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same process may have been a replica in between."""
    observe = Primary._observe

    def broken(self: Primary, replication: Replication) -> bool:
        return observe(self, replication._replace(previous=b""))

    monkeypatch.setattr(Primary, "_observe", broken)


def _holes_unheeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Feed, "has_gap", lambda *_: False)


def _examined_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Feed, "on_examine_lost", lambda *_: None)


def _search() -> None:
    """Try several seeds. With a single one, the search for a rare fault may take two minutes."""
    for random in range(1, 31):
        explore(50, random=random, shrink=False)


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "broken",
    [
        _blind_to_trims,
        _live_too_early,
        _revocations_unheeded,
        _old_revocations_hit_new_rights,
        _pages_of_any_life,
        _full_socket_unheeded,
        _any_life_will_do,
        _failovers_unheeded,
        _every_server_is_without_loss,
        _every_process_is_without_loss,
        _holes_unheeded,
        _examined_for_nobody,
    ],
)
def test_a_broken_rule_is_found(
    broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        _search()
