"""A sweep reads each stream once per interval, regardless of the number of streams."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import cast

import pytest

from relay.core.model import Channel
from relay.core.stream_interface import Followed
from relay.stream.read.invalidations import sweep_steps, swept_streams


def stream(number: int) -> Followed:
    return cast(Followed, SimpleNamespace(channel=Channel(f"app:{number}")))


@pytest.mark.parametrize("sweep_s", [1.0, 4.5, 300.0, 86400.0])
@pytest.mark.parametrize("count", [1, 5, 301, 2000])
def test_each_stream_is_read_once_per_interval(sweep_s: float, count: int) -> None:
    steps, streams = sweep_steps(sweep_s), [stream(number) for number in range(count)]
    read: Counter[Channel] = Counter()
    for step in range(steps):
        # Other streams are added and removed meanwhile.
        followed = [*streams, *(stream(count + other) for other in range(step % 7))]
        read.update(each.channel for each in swept_streams(followed, step, steps))
    assert {read[each.channel] for each in streams} == {1}
