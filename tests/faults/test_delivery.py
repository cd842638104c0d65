"""Each event arrives once, or with a notice, while channels move and servers of Redis fail.

`TEST_DELIVERY_MOVES=20` runs it at full scale: more clients and moves, one more primary, and
longer freezes. `TEST_DELIVERY_DURABILITY` and `TEST_DELIVERY_SEED` choose the publishers'
durability and the random numbers. `TEST_DELIVERY_STALL_S` is the time for which the replica of the
killed primary receives nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.delivery import (
    ClusterSite,
    Run,
    ServersSite,
    Site,
    account,
    cluster_faults,
    server_faults,
)

MOVES = int(os.environ.get("TEST_DELIVERY_MOVES", "3"))
SEED = int(os.environ.get("TEST_DELIVERY_SEED", "16"))
DURABILITY = os.environ.get("TEST_DELIVERY_DURABILITY", "fast")
# WAITAOF is not in docs/redis.md's rules, because Redis 7.0 rejects rules for it.
RIGHTS = "+waitaof" if DURABILITY.startswith("fsynced") else ""
STALL_S = float(os.environ.get("TEST_DELIVERY_STALL_S", "0"))
IS_FULL = MOVES >= 10
EVENTS_PER_S = 10 if IS_FULL else 4

pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(300)]


async def test_a_cluster_moves_slots_and_loses_a_primary(tmp_path: Path) -> None:
    faults = cluster_faults(
        MOVES, seed=SEED, settle_s=5 if IS_FULL else 1, stall_s=STALL_S, adds=IS_FULL
    )
    await _run(ClusterSite(tmp_path / "cluster", RIGHTS), tmp_path, faults)


async def test_several_servers_of_which_one_dies_and_one_freezes(tmp_path: Path) -> None:
    faults = server_faults(seed=SEED, freeze_s=10 if IS_FULL else 2, settle_s=5 if IS_FULL else 1)
    await _run(ServersSite(tmp_path / "servers", RIGHTS), tmp_path, faults)


async def _run(site: Site, folder: Path, faults: Callable[[Run], Any]) -> None:
    report = await account(
        site,
        folder,
        faults,
        durability=DURABILITY,
        events_per_s=EVENTS_PER_S,
        are_all=IS_FULL,
    )
    print("\n".join([*report.details, *report.problems, str(report.figures)]))  # noqa: T201  # for a failure
    assert report.problems == []
    acknowledged = {k: v for k, v in report.figures.items() if k.startswith("acknowledged")}
    assert all(acknowledged.values()), acknowledged
    assert report.figures["deliveries"] > 0
