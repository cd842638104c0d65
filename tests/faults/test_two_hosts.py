"""Two hosts behind a proxy that is not sticky, while workers and connections die at random.

`TEST_TWO_HOSTS_S=60` runs it at full scale: with four workers for each host, and longer freezes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.two_hosts import Scale, run_chaos

DURATION_S = float(os.environ.get("TEST_TWO_HOSTS_S", "10"))
SEED = int(os.environ.get("TEST_TWO_HOSTS_SEED", "14"))
FULL = Scale(workers=4, clients=3, freeze_s=(1.0, 20.0))
SHORT = Scale(workers=2, clients=1, freeze_s=(1.0, 4.0))


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_each_event_and_command_once_while_workers_die(tmp_path: Path) -> None:
    scale = FULL if DURATION_S >= 30 else SHORT
    report = await run_chaos(tmp_path, scale, duration_s=DURATION_S, seed=SEED)
    print("\n".join([*report.details, str(report.figures)]))  # noqa: T201  # for a failure
    assert report.problems == []
    # Not more than is lost in any case if the machine is slow.
    assert report.figures["deliveries"] > 0
    assert report.figures["acknowledged"] > 0
    assert report.figures["unexplained silence, ms"] < 5000
