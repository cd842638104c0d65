"""Dashboard, alert rules and documentation name metrics and labels that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector

from relay.core.metric_families import Family, added_up, collected, growing, packed, unpacked
from relay.core.metrics import Metrics
from relay.core.reasons import Reason
from relay.core.worker_memory import WorkerMemory, shared_memory
from relay.hub.recovery import Notice

ROOT = Path(__file__).parents[3]
GRAFANA = ROOT / "docs/grafana"
# Labels that Prometheus adds, and that of histograms.
_ADDED = {"job", "instance", "le"}
_LABELLED = re.compile(r"((?:relay|process)_\w+)(?:\{([^}]*)\})?")
# Metrics of `SiteMetrics`, which asks Redis.
_OF_SITE = {"relay_dead_letter_entries": set(), "relay_queue_length": {"queue"}}


@pytest.fixture(scope="module")
def existing() -> dict[str, set[str]]:
    """Return the labels of each sample after each metric has been used once."""
    metrics = Metrics(WorkerMemory(shared_memory(2)))
    metrics.read_live(1, 1, 0, {"native": 5})
    metrics.resumed(None)
    metrics.resumed(Notice("gap", Reason.TRIMMED))
    metrics.rejected("native", Reason.UNAUTHORIZED)
    metrics.notified(Notice("gap", Reason.TRIMMED), 1)
    metrics.connections.labels("native").set(1)
    metrics.producer_items.labels("queue", "read").inc()
    metrics.round_trips.labels("read").inc()
    metrics.redis.connected = lambda: {"127.0.0.1:6379": True}
    found: dict[str, set[str]] = dict(_OF_SITE)
    for family in collected(metrics.registry, ProcessCollector(registry=CollectorRegistry())):
        for name, labels in family.samples:
            found.setdefault(name, set()).update(label for label, _ in labels)
    return found


def named(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each metric of an expression with the labels that it is asked for."""
    for name, labels in _LABELLED.findall(expression):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", labels))


def check(expression: str, existing: dict[str, set[str]]) -> None:
    grouped = {
        label.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(",")
    }
    names = list(named(expression))
    for name, labels in names:
        assert name in existing, name
        assert labels <= existing[name] | _ADDED, (name, labels)
    if names:
        assert grouped <= set().union(*(existing[name] for name, _ in names)) | _ADDED, expression


def test_the_dashboard_is_generated() -> None:
    words = [sys.executable, str(GRAFANA / "dashboard.py")]
    text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert text == (GRAFANA / "relay.json").read_text()


def test_the_dashboard_shows_every_metric_and_no_other(existing: dict[str, set[str]]) -> None:
    board: dict[str, Any] = json.loads((GRAFANA / "relay.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    shown = set()
    for panel in panels:
        assert panel["description"]
        for target in panel["targets"]:
            check(target["expr"], existing)
            shown |= {name for name, _ in named(target["expr"])}
    sums = {
        f"{name}{end}"
        for name in ("relay_lag_seconds", "relay_delivery_lag_seconds")
        for end in ("_sum", "_count")
    }
    unseen = {"process_virtual_memory_bytes", "process_start_time_seconds"}
    assert {name for name in existing if not name.startswith("python")} - sums - unseen == shown


def test_alert_rules(existing: dict[str, set[str]]) -> None:
    text = (GRAFANA / "alerts.yml").read_text()
    (group,) = yaml.safe_load(text)["groups"]
    for rule in group["rules"]:
        check(rule["expr"], existing)
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        start = text.index(f"alert: {rule['alert']}\n")
        # Its reason is the comment after its name.
        assert text[start:].splitlines()[1].strip().startswith("# ")


def test_every_metric_is_documented(existing: dict[str, set[str]]) -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    documented: dict[str, set[str]] = {}
    for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE):
        for name, labels in _LABELLED.findall(row):
            documented[name] = set(filter(None, labels.split(",")))
    wanted: dict[str, set[str]] = {}
    for name, labels in existing.items():
        wanted[re.sub(r"_(bucket|sum|count)$", "", name)] = labels - {"le"}
    assert documented == wanted


def _counter(value: float, kind: str = "counter") -> Family:
    return Family("relay_events", kind, "Entries", {("relay_events_total", ()): value})


def test_workers_are_added_up() -> None:
    up = [Family("relay_redis_up", "gauge", "", {("relay_redis_up", ()): each}) for each in (1, 0)]
    first, second = unpacked(packed([_counter(3), up[0]])), unpacked(packed([_counter(4), up[1]]))
    events, redis_up = added_up([first, second])
    assert events.samples == {("relay_events_total", ()): 7}
    assert redis_up.samples == {("relay_redis_up", ()): 0}
    assert [each.name for each in growing(first)] == ["relay_events"]


def test_the_memory_keeps_the_last_metrics_of_each_worker() -> None:
    memory = WorkerMemory(shared_memory(3))
    assert memory.count == 3
    assert memory.metrics(2) == b""
    for number in range(5):
        assert memory.set_metrics(2, b"x" * number * 1000)
        assert memory.metrics(2) == b"x" * number * 1000
        assert memory.metrics_count(2) == number + 1
    assert memory.set_metrics(3, b"last")
    memory.register(2, "web1-2:0000002a")
    assert memory.is_running(2)
    memory.mark_dead(2)
    assert not memory.is_running(2)
    assert memory.metrics(2) == b"x" * 4000
    assert memory.metrics(3) == b"last"
    assert not memory.set_metrics(1, bytes(1 << 20))
