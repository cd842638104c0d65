"""Clients are asked to leave at a rate."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from relay.core.model import Principal
from relay.process.drain import drain, wait_for_silence
from tests.support.hub import Reads, Words, join, make_hub


@contextmanager
def virtual_time() -> Iterator[list[float]]:
    """Yield the loop's time in seconds. Every sleep ends at once and takes its full time."""
    now = [0.0]
    real = asyncio.sleep

    async def sleep(delay_s: float) -> None:
        now[0] += delay_s
        await real(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        patch.setattr(asyncio.get_running_loop(), "time", lambda: now[0])
        yield now


@pytest.mark.parametrize(
    ("count", "per_s", "limit_s", "takes_s"),
    [(500, 100, 60, 5), (500, 100, 2, 2), (3, 1, 60, 2), (0, 1, 60, 0), (2000, 1000, 60, 2)],
)
async def test_clients_are_asked_at_the_rate_but_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, count: int, per_s: float, limit_s: float, takes_s: float
) -> None:
    hub = make_hub(Reads())
    asked: list[float] = []
    loop = asyncio.get_running_loop()
    for _ in range(count):
        _, client, _ = join(hub, Principal(user="alice", door="words"), Words())
        monkeypatch.setattr(client, "disconnect", lambda _: asked.append(loop.time()))
    with virtual_time() as now:
        await drain(hub.sessions(), {}, per_s=per_s, limit_s=limit_s)
    assert len(asked) == count
    assert now[0] == pytest.approx(takes_s, abs=0.05)
    # The rate is kept at all times, not only on average.
    rate = count / takes_s if takes_s else 0
    assert all(abs(at * rate - index) <= 0.05 * rate + 1 for index, at in enumerate(asked))
    # Few are disconnected at the same time, because the others receive nothing meanwhile.
    assert max(Counter(asked).values(), default=0) <= 0.006 * rate + 1


async def test_a_stop_waits_until_no_client_has_connected_for_a_while() -> None:
    with virtual_time() as now:
        # One client each 0.4 s, until 2 s.
        await wait_for_silence(lambda: min(5, int(now[0] / 0.4)), 1.0, 5.0)
        assert now[0] == 3.0
        # They never cease.
        await wait_for_silence(lambda: int(now[0] * 10), 1.0, 5.0)
        assert now[0] == 8.0
