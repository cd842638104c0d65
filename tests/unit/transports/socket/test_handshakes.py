"""Requests of new clients wait for their turn. An overloaded worker rejects them early."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time

import pytest

from relay.core.free_memory import FreeMemory
from relay.transports.socket import handshakes
from relay.transports.socket.handshakes import Handshakes, begins_client, rejection
from tests.unit.transports.serving import GET, HANDSHAKE, Run

PLENTY = FreeMemory(8 << 30, 16 << 30)
FEW = FreeMemory(100 << 20, 16 << 30)
ALMOST = FreeMemory(300 << 20, 16 << 30)
SSE = b"GET /sse?channel=a HTTP/1.1\r\nHost: x\r\naccept: Text/Event-Stream\r\n\r\n"


class Request:
    """A request of a new client, which takes some time."""

    def __init__(self, done: list[Request], takes_s: float = 0.0) -> None:
        self.done = done
        self.takes_s = takes_s

    def proceed(self) -> None:
        time.sleep(self.takes_s)
        self.done.append(self)


def pacer(memory: FreeMemory | None = PLENTY) -> Handshakes:
    return Handshakes(memory=lambda: memory)


def test_a_storm_leaves_most_of_each_turn_to_others(run: Run) -> None:
    """The number per turn follows the measured time of the turns."""

    async def main() -> None:
        paced, done = pacer(), list[Request]()
        storm = [Request(done, 0.003) for _ in range(200)]
        assert [paced.enter(each) for each in storm] == [None] * 200
        turns = [len(done)]
        while len(done) < 200:
            await asyncio.sleep(0)
            turns.append(len(done))
        assert done == storm
        # All take far longer than a turn may take, so that the fewest are handled in each.
        steps = [after - before for before, after in itertools.pairwise(turns)]
        assert max(steps) <= handshakes._FEWEST
        assert turns[0] <= handshakes._FEWEST

    run(main())


def test_quick_handshakes_are_handled_in_larger_groups(run: Run) -> None:
    async def main() -> None:
        paced, done = pacer(), list[Request]()
        for _ in range(4000):
            paced.enter(Request(done))
        turns = 0
        while len(done) < 4000:
            await asyncio.sleep(0)
            turns += 1
        assert turns < 4000 / handshakes._FEWEST

    run(main())


def test_a_single_client_does_not_wait(run: Run) -> None:
    async def main() -> None:
        paced, done = pacer(), list[Request]()
        for number in range(100):
            paced.enter(Request(done))
            assert len(done) == number + 1
            for _ in range(3):
                await asyncio.sleep(0)

    run(main())


def test_a_client_that_disconnects_leaves_the_queue(run: Run) -> None:
    async def main() -> None:
        paced, done = pacer(), list[Request]()
        storm = [Request(done) for _ in range(100)]
        for each in storm:
            paced.enter(each)
        paced.leave(storm[50])
        while len(paced):
            await asyncio.sleep(0)
        assert done == [each for each in storm if each is not storm[50]]

    run(main())


def test_clients_are_rejected_early_and_return_one_after_the_other(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        rejected: list[None] = []
        paced = Handshakes(count_rejected=lambda: rejected.append(None), memory=lambda: PLENTY)
        done: list[Request] = []
        answers = [paced.enter(Request(done)) for _ in range(8000)]
        # As many wait as can be handled within the longest wait.
        accepted = answers.count(None)
        assert 4900 < accepted < 5200
        retries = [each for each in answers if each is not None]
        assert len(retries) == len(rejected) == 8000 - accepted
        assert retries[0] >= handshakes.LONGEST_WAIT_S / 2
        assert 2 < retries[-1] - retries[0] < 4
        # Those that have waited are not rejected, and after them others are accepted again.
        while len(done) < accepted:
            await asyncio.sleep(0)
        assert paced.enter(Request(done)) is None
        assert len(rejected) == 8000 - accepted

    with caplog.at_level(logging.WARNING):
        run(main())
    assert len(caplog.records) == 1
    assert "overloaded" in caplog.text


def test_the_decision_does_not_change_with_each_client(run: Run) -> None:
    async def main() -> None:
        paced, done = pacer(), list[Request]()
        while paced.enter(Request(done)) is None:
            pass
        waits_s = paced._wait_s
        while paced.is_overloaded:
            waits_s = paced._wait_s
            await asyncio.sleep(0)
        assert paced._wait_s <= handshakes.LONGEST_WAIT_S / 2 < waits_s

    run(main())


def test_a_client_is_asked_to_wait_for_a_minute_at_most(run: Run) -> None:
    async def main() -> None:
        paced = pacer(FEW)
        assert paced.is_overloaded
        retries = [paced.reject() for _ in range(200_000)]
        assert min(retries) >= 1
        assert 59 < max(retries) <= 60
        # The rest is spread as well.
        assert min(retries[-1000:]) < 40

    run(main())


def test_without_memory_clients_are_rejected_until_there_is_clearly_more(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handshakes, "_MEMORY_CHECK_S", 0.0)

    async def main() -> None:
        left: list[FreeMemory | None] = [PLENTY]
        paced, done = Handshakes(memory=lambda: left[0]), list[Request]()
        for memory, accepted in (
            (PLENTY, True), (ALMOST, True), (FEW, False), (ALMOST, False), (PLENTY, True),
            (ALMOST, True), (None, True),
        ):  # fmt: skip
            left[0] = memory
            assert (paced.enter(Request(done)) is None) == accepted
            await asyncio.sleep(0)

    with caplog.at_level(logging.WARNING):
        run(main())
    (line,) = caplog.messages
    assert line.startswith("Memory is short: less than 256 MB are available")


@pytest.mark.parametrize(
    ("head", "begins"),
    [
        (HANDSHAKE, True),
        (HANDSHAKE.replace(b"Upgrade: websocket", b"upgrade:WebSocket"), True),
        (SSE, True),
        (SSE.replace(b"accept: ", b"Accept: text/html, "), True),
        (b"GET /socket.io/?EIO=4&transport=polling HTTP/1.1\r\nHost: x\r\n\r\n", True),
        (GET, False),
        (HANDSHAKE[:-2], False),
        (b"GET /socket.io/?EIO=4&transport=polling&sid=~a HTTP/1.1\r\nHost: x\r\n\r\n", False),
        (HANDSHAKE.replace(b"GET /", b"GET /socket.io/?EIO=4&sid=~a"), False),
        (SSE.replace(b"/sse?", b"/connection/1/abc/eventsource?"), False),
        (b"POST / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n", False),
        (b"GET /events HTTP/1.1\r\nHost: x\r\nX-Upgrade: websocket\r\n\r\n", False),
        (GET + HANDSHAKE, False),
    ],
)
def test_requests_of_new_clients(head: bytes, begins: bool) -> None:
    assert begins_client(head) == begins


def test_answers_to_rejected_clients() -> None:
    answer = rejection(HANDSHAKE, 2.2)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: 3\r\n" in answer
    # An EventSource does not connect again after a 503.
    origin = SSE.replace(b"Host: x", b"Host: x\r\nOrigin: https://a.example")
    head, _, body = rejection(origin, 2.2).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nContent-Type: text/event-stream\r\n" in head
    assert b"\r\nAccess-Control-Allow-Origin: https://a.example\r\n" in head
    assert body.startswith(b"retry: 2200\n")
    assert body.endswith(b"\n\n")
