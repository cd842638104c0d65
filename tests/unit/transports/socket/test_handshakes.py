"""Requests of new clients wait for their turn. An overloaded worker rejects them early."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter

import pytest

from relay.core.client_address import TrustedProxies
from relay.core.free_memory import FreeMemory
from relay.transports.socket import handshakes
from relay.transports.socket.handshakes import (
    Handshakes,
    Source,
    begins_client,
    forwarded_for,
    rejection,
    source_of,
)
from tests.unit.transports.serving import GET, HANDSHAKE, Run

PLENTY = FreeMemory(8 << 30, 16 << 30)
FEW = FreeMemory(100 << 20, 16 << 30)
ALMOST = FreeMemory(300 << 20, 16 << 30)
OTHER = ("10.0.0.2", "")
SSE = b"GET /sse?channel=a HTTP/1.1\r\nHost: x\r\naccept: Text/Event-Stream\r\n\r\n"


class Request:
    """A request of a new client, which takes some time."""

    def __init__(
        self, done: list[Request], takes_s: float = 0.0, source: Source = ("10.0.0.1", "")
    ) -> None:
        self.done = done
        self.takes_s = takes_s
        self.where = source
        self.retry_s: float | None = None

    def source(self) -> Source:
        return self.where

    def turn_away(self, retry_s: float) -> None:
        self.retry_s = retry_s

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
        for source in itertools.cycle([Request(done).where, OTHER]):
            if paced.enter(Request(done, source=source)) is not None:
                break
        waits_s = paced._wait_s
        while paced.is_overloaded:
            waits_s = paced._wait_s
            await asyncio.sleep(0)
        assert paced._wait_s <= handshakes.LONGEST_WAIT_S / 2 < waits_s

    run(main())


@pytest.mark.parametrize(
    ("flood", "others", "trusted"),
    [
        # One host has a whole network of IPv6 addresses.
        (
            ["2001:db8::1", "2001:db8::ffff:1"],
            ["2001:db8:0:1::1", "10.0.0.2", "::ffff:10.0.0.3"],
            [],
        ),
        # Behind a proxy. The client has invented all addresses but the last.
        (["10.0.0.9, 10.7.7.7", "10.0.0.8, 10.7.7.7"], ["10.0.0.2", "10.0.0.3", "2001:db8::1"], []),
        (["10.0.0.9,10.7.7.7", "10.7.7.7"], ["10.0.0.2", "10.0.0.3"], ["127.0.0.1"]),
    ],
    ids=["direct", "proxy", "trusted proxy"],
)
def test_no_address_can_fill_the_queue(
    run: Run, flood: list[str], others: list[str], trusted: list[str]
) -> None:
    proxied = "," in flood[0]

    def source(address: str) -> Source:
        peer, listed = ("127.0.0.1", [address]) if proxied else (address, [])
        return source_of(peer, listed, TrustedProxies(trusted))

    async def main() -> None:
        paced, done = pacer(), list[Request]()
        sent: list[Request] = []
        for address in itertools.cycle(flood):
            sent.append(Request(done, source=source(address)))
            if paced.enter(sent[-1]) is not None:
                break
        assert paced.is_overloaded
        waiting = len(paced)
        for address in others:
            assert paced.enter(Request(done, source=source(address))) is None
        # The newest ones of the flood have made room.
        assert len(paced) == waiting
        away = [each for each in sent if each.retry_s is not None]
        assert away == sent[-1 - len(others) : -1]
        # Each address has its turn, so that these do not wait until the others are done.
        first = len(done)
        while len(done) < first + 2 * len(others):
            await asyncio.sleep(0)
        assert {source(each) for each in others} < {each.where for each in done}
        # A third of the queue for each of three busy addresses.
        for _ in range(10_000):
            paced.enter(Request(done, source=source(others[0])))
            paced.enter(Request(done, source=source(others[1])))
        shares = Counter(path for path, _ in paced._waiting.values())
        assert max(shares.values()) - min(shares.values()) <= 1
        assert len(shares) == 3

    run(main())


def test_a_client_without_a_proxy_cannot_invent_addresses(run: Run) -> None:
    async def main() -> None:
        paced, done = pacer(), list[Request]()
        for number in itertools.count():
            listed = [f"10.1.{number // 250}.{number % 250}"]
            invented = source_of("10.0.0.1", listed, TrustedProxies())
            if paced.enter(Request(done, source=invented)) is not None:
                break
        other = Request(done, source=OTHER)
        assert paced.enter(other) is None
        while other not in done:
            assert len(done) < 3 * handshakes._MOST
            await asyncio.sleep(0)

    run(main())


def test_the_requests_that_wait_have_a_limited_size(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        paced, done = pacer(), list[Request]()
        large = handshakes._MOST_BYTES // 100
        sent = [Request(done) for _ in range(200)]
        answers = [paced.enter(each, large) for each in sent]
        assert answers.count(None) == 100 + handshakes._FEWEST
        # Another address makes room, but only as much as the request that it replaces has used.
        assert paced.enter(Request(done, source=OTHER), 2 * large) is not None
        assert paced.enter(Request(done, source=OTHER), large) is None
        assert paced.enter(Request(done, source=OTHER), 500) is None
        # What arrives while a request waits counts as well.
        last = sent[handshakes._FEWEST]
        assert paced.extend(last, 1000) is None
        assert paced._held_bytes <= handshakes._MOST_BYTES
        retry_s = paced.extend(last, large)
        assert retry_s is not None
        assert len(paced) == 99
        while len(paced):
            await asyncio.sleep(0)
        assert last not in done
        assert paced._held_bytes == 0
        assert paced.extend(last, large) is None
        assert paced.enter(Request(done), large) is None

    with caplog.at_level(logging.WARNING):
        run(main())
    (line,) = caplog.messages
    assert "hold more than 64 MB" in line


def test_a_client_is_asked_to_wait_for_a_minute_at_most(run: Run) -> None:
    async def main() -> None:
        paced = pacer(FEW)
        clients = [paced.enter(Request([])) for _ in range(200_000)]
        retries = [each for each in clients if each is not None]
        assert len(retries) == len(clients)
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
        # Parameters that have no meaning for the path, or another one.
        (HANDSHAKE.replace(b"GET /", b"GET /ws?channel=a&sid=1"), True),
        (HANDSHAKE.replace(b"GET /", b"GET /ws?EIO=4&sid=1"), True),
        (HANDSHAKE.replace(b"GET /", b"GET /ws/?EIO=4&sid=1"), True),
        (SSE.replace(b"?", b"?sid=1&"), True),
        (SSE.replace(b"?", b"?EIO=4&sid=1&"), True),
        (SSE.replace(b"?", b"?a=/eventsource&"), True),
        (b"GET /sse?channel=a HTTP/1.1\r\nHost: x\r\n\r\n", True),
        (b"GET /socket.io/?E%49O=4&transport=polling HTTP/1.1\r\n\r\n", True),
        (b"GET /socket.io/?EIO=4&x%26sid=1 HTTP/1.1\r\n\r\n", True),
        (b"GET /socket.io/?EIO=4&xsid=1 HTTP/1.1\r\n\r\n", True),
        (b"GET /socket.io/?EIO=4#&sid=1 HTTP/1.1\r\n\r\n", True),
        (b"GET /socket.io/?sid=~a&EIO=4 HTTP/1.1\r\n\r\n", False),
        # The parser accepts them.
        (b"\r\n\r\n" + HANDSHAKE, True),
        (b"\n" + SSE, True),
        (b"GET  //socket.io/?EIO=4 HTTP/1.1\r\n\r\n", True),
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


def test_the_address_that_the_nearest_proxy_reports() -> None:
    sent = HANDSHAKE.replace(b"Host: x", b"X-Forwarded-For: 1.1.1.1\r\nx-forwarded-for: 2, 3::4 ")
    assert [each.strip() for each in forwarded_for(sent)] == ["1.1.1.1", "2, 3::4"]
    assert forwarded_for(b"\r\n\r\n" + sent) == forwarded_for(sent)
    assert forwarded_for(HANDSHAKE) == []
    assert forwarded_for(HANDSHAKE + b"\r\nX-Forwarded-For: 1.1.1.1\r\n") == []
    none, trusted = TrustedProxies(), TrustedProxies(["10.0.0.1"])
    assert source_of("10.0.0.1", forwarded_for(sent), none) == ("10.0.0.1", "3::/64")
    assert source_of("10.0.0.1", forwarded_for(sent), trusted) == ("3::/64", "")
    assert source_of("", [], trusted) == ("", "")
