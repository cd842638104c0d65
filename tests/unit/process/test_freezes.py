"""A worker detects that it did not run for some time."""

from __future__ import annotations

import asyncio
import time

import pytest

from relay.process import freezes
from relay.process.freezes import FreezeDetector


async def test_a_freeze_is_reported_once_with_its_duration(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(freezes, "_PERIOD_S", 0.01)
    monkeypatch.setattr(freezes, "_SHORT_S", 0.2)
    woken = asyncio.Event()
    durations: list[float] = []
    detector = FreezeDetector()
    detector.on_wake.append(durations.append)
    detector.on_wake.append(lambda _: woken.set())
    detector.start()
    await asyncio.sleep(0.03)
    assert not durations
    time.sleep(0.4)  # noqa: ASYNC251  # nothing of this process runs
    async with asyncio.timeout(30):
        await woken.wait()
    await asyncio.sleep(0.03)
    detector.stop()
    assert len(durations) == 1
    assert 0.2 < durations[0] < 5
    assert "did not run for" in caplog.text
