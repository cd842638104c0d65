"""The limit of dead letters, the check of ephemeral events, and the application's answers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, cast

import pytest

from relay.config.settings import NamespaceSettings
from relay.core.clock import RedisClock
from relay.core.metrics import Metrics
from relay.core.model import Broken, Channel, EntryID, Position, Principal
from relay.doorkit.first_subscriptions import defer_if_away
from relay.process.admission import Admission, ReadRights
from relay.process.incoming import DEAD_LETTERS_WAITING, Incoming
from relay.rights.http import HttpRights
from relay.rights.policy import Policy
from tests.support.hub import Client, Reads, Words, examine, join, make_hub

CHANNEL = Channel("app:a")
BOB = Principal(user="bob")


class Answers:
    """An application whose answers are set by the test."""

    def __init__(self, answer: bool | None) -> None:
        self.answer = answer
        self.next = True
        self.asked = 0

    def cached(self, principal: Principal, channel: Channel) -> bool | None:
        del principal, channel
        return self.answer

    def expires_in(self, principal: Principal, channel: Channel) -> float | None:
        del principal, channel
        return None if self.answer is None else 10.0

    async def ask(self, principal: Principal, channel: Channel) -> bool:
        del principal, channel
        self.asked += 1
        self.answer = self.next
        return self.next


def rights(answer: bool | None) -> ReadRights:
    http = cast(HttpRights, Answers(answer))
    return ReadRights(Policy(lambda _: NamespaceSettings(rights="http"), http))


async def test_a_full_queue_of_dead_letters_does_not_block() -> None:
    incoming = Incoming(metrics=Metrics(), max_entry_bytes=1024)
    broken = Broken(EntryID(1, 1), "no data", ())
    for _ in range(DEAD_LETTERS_WAITING + 1):
        incoming.add_dead_letter(CHANNEL, broken)
    assert incoming.dead_letters.qsize() == DEAD_LETTERS_WAITING


def test_a_malformed_ephemeral_event_is_dropped() -> None:
    incoming = Incoming(metrics=Metrics(), max_entry_bytes=1024)
    assert incoming.decode_ephemeral(CHANNEL, b"no json") is None
    event = incoming.decode_ephemeral(CHANNEL, b'{"data":1}')
    assert event is not None
    assert event.id is None


def test_without_an_answer_new_clients_are_rejected_and_connected_ones_stay() -> None:
    assert not rights(None).allowed(BOB, CHANNEL, None, admitted=False)
    assert rights(None).allowed(BOB, CHANNEL, None, admitted=True)
    assert not rights(None).allowed(BOB, CHANNEL, b"-", admitted=True)


def test_an_answer_applies_to_new_and_connected_clients() -> None:
    for admitted in (False, True):
        assert rights(True).allowed(BOB, CHANNEL, None, admitted=admitted)
        assert not rights(False).allowed(BOB, CHANNEL, None, admitted=admitted)


@pytest.mark.parametrize("is_allowed", [True, False])
@pytest.mark.parametrize("marker", [1 << 32, None])
async def test_an_answer_that_expired_while_a_client_waited_is_requested_again(
    is_allowed: bool, marker: int | None
) -> None:
    answers = Answers(True)
    answers.next = is_allowed
    policy = Policy(lambda _: NamespaceSettings(rights="http"), cast(HttpRights, answers))
    reads, tasks = Reads(), asyncio.TaskGroup()
    hub = make_hub(reads)
    hub.rights = ReadRights(policy)

    def spawn(work: Coroutine[Any, Any, None], name: str) -> None:
        tasks.create_task(work, name=name)

    admission = Admission(rights=hub.rights, hub=hub, spawn=spawn)
    session, client, _ = join(hub, BOB, Words(), CHANNEL)
    session.subscriptions[CHANNEL].defer(EntryID(1000, 0))
    # The server was away for longer than answers are stored.
    answers.answer = None
    examine(hub, CHANNEL, marker=marker)
    feed = hub.feed(CHANNEL)
    assert feed is not None
    assert (client.told, list(feed.waiting())) == ([], [session.subscriptions[CHANNEL]])
    reads.examine.clear()
    async with tasks:
        admission.renew()
    assert (answers.asked, reads.examine) == (1, [feed])
    # The stream's marker is only created for a confirmed right.
    assert not examine(hub, CHANNEL, marker=marker).mark
    if is_allowed and marker is None:
        assert examine(hub, CHANNEL).mark
    word = "subscribed app:a" if is_allowed else "refused app:a: Forbidden"
    assert client.told == [word]


async def test_a_client_that_waits_for_the_application_is_deferred_as_well() -> None:
    policy = Policy(lambda _: NamespaceSettings(rights="http"), cast(HttpRights, Answers(None)))
    hub = make_hub(Reads())
    hub.rights = rights = ReadRights(policy)
    positions = set()
    async with asyncio.TaskGroup() as tasks:

        def spawn(work: Coroutine[Any, Any, None], name: str) -> None:
            tasks.create_task(work, name=name)

        admission = Admission(rights=rights, hub=hub, spawn=spawn)
        clock = RedisClock(monotonic=iter((0.0, 1000.001, 1000.999)).__next__, wall=lambda: 0.0)
        sessions = [hub.open(BOB, Words(), Client()) for _ in range(2)]
        for session in sessions:
            admission.subscribe(session, CHANNEL, None)
            assert not session.subscriptions
            defer_if_away(lambda _: "the server is away", clock, session, CHANNEL)
    for session in sessions:
        subscription = session.subscriptions[CHANNEL]
        assert subscription.is_deferred
        positions.add(subscription.start)
    # Each different position costs a command.
    assert positions == {Position(EntryID(999_000, 0))}
