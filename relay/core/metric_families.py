"""Metrics as plain data, which several workers of one host write and one of them adds up.

A request to the shared port may reach any worker. The worker that receives a scrape therefore
returns the sum over all workers, see `relay.process.host_metrics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import orjson
from prometheus_client import Metric, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

Labels = tuple[tuple[str, str], ...]

# All other metrics of the workers are added up.
_LOWEST = frozenset({"relay_redis_up", "process_start_time_seconds"})
_HIGHEST = frozenset({"relay_build_info", "relay_worker_ready", "relay_worker_connections"})
# Kinds whose values only grow, so that they must survive the worker that has counted them.
_GROWING = frozenset({"counter", "histogram"})


@dataclass(slots=True)
class Family:
    """One metric with its samples, by name and labels."""

    name: str
    kind: str
    documentation: str
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)

    def add(self, other: Family) -> None:
        """Add the samples of another worker."""
        for key, value in other.samples.items():
            known = self.samples.get(key)
            if known is None:
                self.samples[key] = value
            elif self.name in _LOWEST:
                self.samples[key] = min(known, value)
            elif self.name in _HIGHEST:
                self.samples[key] = max(known, value)
            else:
                self.samples[key] = known + value


def collected(*collectors: Collector) -> list[Family]:
    """Return the present values, without the times at which counters were created."""
    families = []
    for collector in collectors:
        for metric in collector.collect():
            family = Family(metric.name, metric.type, metric.documentation)
            for sample in metric.samples:
                if not sample.name.endswith("_created"):
                    family.samples[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
            families.append(family)
    return families


def added_up(sets: Iterable[Iterable[Family]]) -> list[Family]:
    """Return the metrics of all workers together."""
    found: dict[str, Family] = {}
    for families in sets:
        for family in families:
            known = found.get(family.name)
            if known is None:
                found[family.name] = Family(
                    family.name, family.kind, family.documentation, dict(family.samples)
                )
            else:
                known.add(family)
    return list(found.values())


def growing(families: Iterable[Family]) -> list[Family]:
    """Return the counters and histograms."""
    return [each for each in families if each.kind in _GROWING]


def text(families: Iterable[Family]) -> bytes:
    """Return the text format of Prometheus."""
    return generate_latest(_Families(families))


class _Families:
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.documentation, family.kind)
            metric.samples = [
                Sample(name, dict(labels), value, None, None)
                for (name, labels), value in family.samples.items()
            ]
            yield metric


def packed(families: Iterable[Family]) -> bytes:
    """Return the metrics as JSON for another worker."""
    return orjson.dumps(
        [
            (
                each.name,
                each.kind,
                each.documentation,
                [(name, labels, value) for (name, labels), value in each.samples.items()],
            )
            for each in families
        ]
    )


def unpacked(data: bytes) -> list[Family]:
    """Return the metrics that another worker has packed."""
    return [
        Family(
            name,
            kind,
            documentation,
            {
                (sample, tuple((label, text) for label, text in labels)): value
                for sample, labels, value in samples
            },
        )
        for name, kind, documentation, samples in orjson.loads(data)
    ]
