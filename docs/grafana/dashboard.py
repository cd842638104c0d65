"""Print the Grafana dashboard: `python docs/grafana/dashboard.py > docs/grafana/relay.json`.

Edit this file, not the JSON. A test compares both, and checks that every metric and label exists.
"""

from __future__ import annotations

import json
import sys
from typing import Any

_WIDTH, _HEIGHT = 24, 8
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_OF = 'job="$job",instance=~"$host"'
_RATE = "$__rate_interval"
_REJECTIONS = f"rate(relay_rejections_total{{{_OF}}}[{_RATE}])"

# Each row has a title and panels. A panel has a title, a description, a unit of Grafana, and
# queries with the names of their lines.
_ROWS: list[tuple[str, list[tuple[str, str, str, list[tuple[str, str]]]]]] = [
    (
        "Health",
        [
            (
                "Redis connected",
                "0 while a worker of the host has no connection to Redis.",
                "short",
                [(f"relay_redis_up{{{_OF}}}", "{{instance}} {{server}}")],
            ),
            (
                "Workers that read streams",
                "0 for a worker that is starting, hangs or cannot read streams.",
                "short",
                [(f"relay_worker_ready{{{_OF}}}", "{{instance}} worker {{worker}}")],
            ),
            (
                "Versions",
                "More than one line during an upgrade.",
                "short",
                [(f"count by (version, python) (relay_build_info{{{_OF}}})", "relay {{version}}")],
            ),
        ],
    ),
    (
        "Clients",
        [
            (
                "Connections",
                "Open client connections by protocol.",
                "short",
                [(f"sum by (protocol) (relay_connections{{{_OF}}})", "{{protocol}}")],
            ),
            (
                "Connections by worker",
                "Workers of one host should have about the same number.",
                "short",
                [(f"relay_worker_connections{{{_OF}}}", "{{instance}} worker {{worker}}")],
            ),
            (
                "Waiting handshakes",
                "New connections that wait until the worker has time for them.",
                "short",
                [(f"sum by (instance) (relay_handshakes_waiting{{{_OF}}})", "{{instance}}")],
            ),
            (
                "Rejections",
                "A rise of `unauthorized` after a deployment often means a changed secret.",
                "reqps",
                [
                    (
                        f"sum by (protocol, reason) ({_REJECTIONS})",
                        "{{protocol}} {{reason}}",
                    )
                ],
            ),
        ],
    ),
    (
        "Delivery",
        [
            (
                "Events and deliveries",
                "Entries read from streams, and events offered to clients.",
                "eps",
                [
                    (f"sum(rate(relay_events_total{{{_OF}}}[{_RATE}]))", "read"),
                    (
                        f"sum by (way) (rate(relay_deliveries_total{{{_OF}}}[{_RATE}]))",
                        "delivered {{way}}",
                    ),
                ],
            ),
            (
                "Delivery lag, 99th percentile",
                "Age of an entry when it is offered to live clients, by the clock of Redis.",
                "s",
                [
                    (
                        (
                            "histogram_quantile(0.99, sum by (protocol, le)"
                            f" (rate(relay_delivery_lag_seconds_bucket{{{_OF}}}[{_RATE}])))"
                        ),
                        "{{protocol}}",
                    ),
                    (
                        (
                            "histogram_quantile(0.99, sum by (le)"
                            f" (rate(relay_lag_seconds_bucket{{{_OF}}}[{_RATE}])))"
                        ),
                        "read",
                    ),
                ],
            ),
            (
                "Bytes delivered",
                "Encoded events, before TLS and compression.",
                "Bps",
                [
                    (
                        f"sum by (protocol) (rate(relay_delivered_bytes_total{{{_OF}}}[{_RATE}]))",
                        "{{protocol}}",
                    )
                ],
            ),
            (
                "Subscriptions",
                "All subscriptions, those that are behind, and the streams that they follow.",
                "short",
                [
                    (f"sum(relay_subscriptions{{{_OF}}})", "all"),
                    (f"sum(relay_catch_up_clients{{{_OF}}})", "behind"),
                    (f"sum(relay_followed_streams{{{_OF}}})", "streams"),
                ],
            ),
            (
                "Resumes",
                "Clients that came back with a position: complete, or with a gap or reset notice.",
                "ops",
                [
                    (
                        f"sum by (outcome) (rate(relay_resumes_total{{{_OF}}}[{_RATE}]))",
                        "{{outcome}}",
                    )
                ],
            ),
            (
                "Notices",
                "Notices to clients about missing events and revoked rights.",
                "ops",
                [
                    (
                        f"sum by (kind, reason) (rate(relay_notices_total{{{_OF}}}[{_RATE}]))",
                        "{{kind}} {{reason}}",
                    )
                ],
            ),
        ],
    ),
    (
        "Producers and Redis",
        [
            (
                "Queues",
                "Commands in the API queues, and appends that wait for Redis.",
                "short",
                [
                    (f"max by (queue) (relay_queue_length{{{_OF}}})", "{{queue}}"),
                    (f"sum(relay_pending_appends{{{_OF}}})", "pending appends"),
                ],
            ),
            (
                "Dead letters",
                "Entries that could not be delivered, and how many are stored.",
                "short",
                [
                    (f"sum(increase(relay_dead_letters_total{{{_OF}}}[{_RATE}]))", "new"),
                    (f"max(relay_dead_letter_entries{{{_OF}}})", "stored"),
                ],
            ),
            (
                "Producers",
                "Items that producers in relay read, and those that they could not use.",
                "ops",
                [
                    (
                        (
                            "sum by (producer, result)"
                            f" (rate(relay_producer_items_total{{{_OF}}}[{_RATE}]))"
                        ),
                        "{{producer}} {{result}}",
                    )
                ],
            ),
            (
                "Pipelines to Redis",
                "Round trips by purpose, lost connections, and wake-ups that got lost.",
                "ops",
                [
                    (
                        f"sum by (purpose) (rate(relay_redis_round_trips_total{{{_OF}}}[{_RATE}]))",
                        "{{purpose}}",
                    ),
                    (
                        f"sum(rate(relay_redis_reconnects_total{{{_OF}}}[{_RATE}]))",
                        "lost connections",
                    ),
                    (f"sum(rate(relay_lost_wakeups_total{{{_OF}}}[{_RATE}]))", "lost wake-ups"),
                ],
            ),
        ],
    ),
    (
        "Processes",
        [
            (
                "Processor",
                "Processor cores that the workers of a host use.",
                "short",
                [(f"rate(process_cpu_seconds_total{{{_OF}}}[{_RATE}])", "{{instance}}")],
            ),
            (
                "Memory",
                "Resident memory of the workers of a host.",
                "bytes",
                [(f"process_resident_memory_bytes{{{_OF}}}", "{{instance}}")],
            ),
            (
                "Open files",
                "Each client needs one.",
                "short",
                [
                    (f"process_open_fds{{{_OF}}}", "{{instance}}"),
                    (f"process_max_fds{{{_OF}}}", "{{instance}} limit"),
                ],
            ),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in _ROWS:
        at = {"x": 0, "y": y, "w": _WIDTH, "h": 1}
        panels.append({"type": "row", "title": title, "gridPos": at, "id": len(panels) + 1})
        y += 1
        width = _WIDTH // 3
        for index, panel in enumerate(row):
            x, line = index % 3 * width, index // 3
            at = {"x": x, "y": y + line * _HEIGHT, "w": width, "h": _HEIGHT}
            panels.append(_panel(len(panels) + 1, at, *panel))
        y += -(-len(row) // 3) * _HEIGHT
    return {
        "uid": "relay",
        "title": "relay",
        "tags": ["relay"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _panel(
    number: int,
    at: dict[str, int],
    title: str,
    description: str,
    unit: str,
    queries: list[tuple[str, str]],
) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "id": number,
        "title": title,
        "description": description,
        "datasource": _SOURCE,
        "gridPos": at,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list"}},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(queries)
        ],
    }


def _variables() -> list[dict[str, Any]]:
    def query(name: str, text: str, **more: Any) -> dict[str, Any]:
        asked = {"query": text, "refId": name}
        return {"name": name, "type": "query", "datasource": _SOURCE, "query": asked, **more}

    return [
        {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        query("job", "label_values(relay_build_info, job)", label="Job", refresh=2),
        query(
            "host",
            'label_values(relay_build_info{job="$job"}, instance)',
            label="Host",
            refresh=2,
            multi=True,
            includeAll=True,
            allValue=".*",
        ),
    ]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=2) + "\n")
