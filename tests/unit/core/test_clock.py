"""The time of Redis by offset: both clocks are set, one at a time; the monotonic one runs on."""

from __future__ import annotations

import logging
import time

import pytest

from relay.core.clock import RedisClock
from relay.core.metrics import Metrics


class Host:
    """A host's clocks, and those of a Redis."""

    def __init__(self) -> None:
        self.monotonic = 1000.0
        self.wall = 1_800_000_000.0
        self.redis_lead_s = 0.0
        self.clock = RedisClock(monotonic=lambda: self.monotonic, wall=lambda: self.wall)

    @property
    def redis(self) -> float:
        return self._true + self.redis_lead_s

    @property
    def _true(self) -> float:
        return 1_800_000_000.0 + self.monotonic - 1000.0

    def pass_(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall += seconds

    def measure(self) -> None:
        self.clock.measured(self.redis * 1000, self.monotonic)


def test_before_the_first_measurement_it_is_the_hosts_time() -> None:
    host = Host()
    assert not host.clock.is_measured
    assert host.clock.now() == host.wall
    assert host.clock.problem() == ""


def test_a_host_ahead_is_named() -> None:
    host = Host()
    host.wall += 7200.0
    host.measure()
    assert host.clock.now() == pytest.approx(host.redis)
    assert "7200 s ahead of the clock of Redis" in host.clock.problem()


def test_the_lead_of_a_host_is_no_lag() -> None:
    clock = RedisClock(wall=lambda: time.time() + 7200.0)
    metrics = Metrics(clock=clock)
    clock.measured(time.time() * 1000, time.monotonic())
    metrics.read_live(1, 1, int(time.time() * 1000) - 250)
    assert 0.2 < metrics.pop_worst_lag() < 10


def test_a_host_behind_is_named() -> None:
    host = Host()
    host.wall -= 31.4
    host.measure()
    assert "31 s behind the clock of Redis" in host.clock.problem()


def test_a_host_whose_clock_is_set_keeps_the_time_of_redis(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = Host()
    host.measure()
    host.wall -= 3600.0
    host.pass_(0.5)
    assert host.clock.now() == pytest.approx(host.redis)
    with caplog.at_level(logging.WARNING):
        host.measure()
    assert caplog.messages == ["The clock of this host was set back by 3600 s"]


def test_a_redis_whose_clock_is_set_forward_is_reported_to_those_who_keep_keys(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = Host()
    jumps: list[float] = []
    host.clock.on_jump.append(jumps.append)
    host.measure()
    host.pass_(10.0)
    host.measure()
    before, before_s = host.redis, host.monotonic
    host.redis_lead_s = 3600.0
    host.pass_(0.5)
    with caplog.at_level(logging.WARNING):
        host.measure()
    assert caplog.messages == ["The clock of Redis was set forward by 3600 s"]
    assert jumps == [pytest.approx(3600.0)]
    assert host.clock.now() == pytest.approx(host.redis)
    # An entry that was appended before has an ID of that time.
    assert host.clock.at_ms(before_s) == pytest.approx(before * 1000)
    host.pass_(1.0)
    assert host.clock.at_ms(host.monotonic - 0.5) == pytest.approx((host.redis - 0.5) * 1000)


def test_a_redis_whose_clock_is_set_back_is_no_jump() -> None:
    host = Host()
    jumps: list[float] = []
    host.clock.on_jump.append(jumps.append)
    host.measure()
    host.redis_lead_s = -60.0
    host.pass_(0.5)
    host.measure()
    assert not jumps
    assert host.clock.now() == pytest.approx(host.redis)


def test_a_slow_answer_does_not_replace_a_quick_one() -> None:
    host = Host()
    host.measure()
    asked_at, answer = host.monotonic, host.redis
    host.pass_(1.5)
    host.clock.measured(answer * 1000, asked_at)
    assert host.clock.now() == pytest.approx(host.redis)
