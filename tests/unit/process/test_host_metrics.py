"""How often scrapes make relay collect its metrics."""

from __future__ import annotations

import time

from typing_extensions import override

from relay.core.metric_families import Family
from relay.core.metrics import Metrics
from relay.process.host_metrics import HostMetrics
from relay.process.site_metrics import SiteMetrics


class Site(SiteMetrics):
    """Counts how often metrics are collected."""

    def __init__(self) -> None:
        self.collections = 0

    @override
    async def collected(self) -> list[Family]:
        self.collections += 1
        return []


async def test_a_flood_of_scrapes_shares_few_collections() -> None:
    metrics, site = Metrics(), Site()
    host = HostMetrics(metrics, None, site)
    # A program sees the difference that its own action makes.
    before = await host.exposition()
    metrics.rejected("native", "unauthorized")
    assert await host.exposition() != before
    began = time.monotonic()
    for _ in range(2_000):
        await host.exposition()
    seconds = time.monotonic() - began
    assert site.collections <= 202 + 20 * seconds
    # The flood ends, and does not make later scrapes old.
    metrics.rejected("native", "forbidden")
    text = ""
    while 'reason="forbidden"' not in text:
        text = (await host.exposition()).decode()
