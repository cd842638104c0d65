"""The limit of dead letters, the check of ephemeral events, and the application's answers."""

from __future__ import annotations

from typing import cast

from relay.config.settings import NamespaceSettings
from relay.core.metrics import Metrics
from relay.core.model import Broken, Channel, EntryID, Principal
from relay.process.admission import ReadRights
from relay.process.incoming import DEAD_LETTERS_WAITING, Incoming
from relay.rights.http import HttpRights
from relay.rights.policy import Policy

CHANNEL = Channel("app:a")
BOB = Principal(user="bob")


class Answers:
    """An application whose answers are set by the test."""

    def __init__(self, answer: bool | None) -> None:
        self.answer = answer

    def cached(self, principal: Principal, channel: Channel) -> bool | None:
        del principal, channel
        return self.answer

    def expires_in(self, principal: Principal, channel: Channel) -> float | None:
        del principal, channel
        return None if self.answer is None else 10.0


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
