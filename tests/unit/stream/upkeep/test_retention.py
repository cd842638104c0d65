"""relay/stream/upkeep/retention.py: the trims for a namespace's settings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relay.config.settings import NamespaceSettings
from relay.stream.upkeep.retention import commands

KEY = b"relay:stream:{news}"


def settings(count: int, age_s: int) -> NamespaceSettings:
    return NamespaceSettings(retention_count=count, retention_age_s=age_s)


def test_no_limit_no_command() -> None:
    assert commands(KEY, settings(0, 0), 10**12) == []
    assert commands(KEY, settings(5, 0), 10**12) == [("XTRIM", KEY, "MAXLEN", "~", 5)]


@given(now_ms=st.integers(10**12, 2 * 10**12), age_s=st.integers(1, 10**8))
def test_nothing_younger_goes_and_nothing_much_older_stays(now_ms: int, age_s: int) -> None:
    ((*words, min_ms),) = commands(KEY, settings(0, age_s), now_ms)
    assert words == ["XTRIM", KEY, "MINID"]
    assert isinstance(min_ms, int)
    assert now_ms - 1.1 * age_s * 1000 - 1 <= min_ms <= now_ms - age_s * 1000


def test_an_age_beyond_the_epoch_asks_for_nothing() -> None:
    assert commands(KEY, settings(0, 3153600000), 10**12) == []
