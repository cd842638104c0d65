"""How producers that the relay runs itself are found, configured and run.

A producer is a module of this folder that has a `PRODUCER`. Nothing outside it names it: the
configuration learns its section `[producer:<name>]` from here, the relay runs it in its own
process where its settings want that, and `python -m producers <name>` runs it alone, on any host.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import producers

if TYPE_CHECKING:
    from relay.config.settings import NamespaceSettings, PublishSettings, RedisSettings, Section
    from relay.core.model import Channel
    from relay.stream.format.keys import Keys


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerContext:
    """What every producer works with.

    `redis` is where the streams are, under `keys`. `instance` is this process's name in leases; no
    other process has it. `count(outcome, n)` feeds `relay_producer_items_total`.
    """

    keys: Keys
    redis: RedisSettings
    publish: PublishSettings
    instance: str
    namespace_of: Callable[[Channel], NamespaceSettings]
    max_entry_bytes: int
    count: Callable[[str, int], None]


class Running(Protocol):
    """A producer at work."""

    async def run(self) -> None:
        """Until cancelled; survives everything that Redis does."""


class Producer(Protocol):
    """A module's `PRODUCER`."""

    name: str
    summary: str  # one line for --help
    argument: str  # the setting that a word behind the name is for; '': it takes none
    settings: type[Section]

    def wanted(self, settings: Any) -> bool:  # of its own section's class
        """Whether the relay is to run it in its own process."""

    def build(self, context: ProducerContext, settings: Any) -> Running:
        """Ready to run; ConfigError where its settings cannot work."""


def find_producers() -> dict[str, Producer]:
    """Every producer by name."""
    found: dict[str, Producer] = {}
    for module in pkgutil.iter_modules(producers.__path__):
        if module.name.startswith("_"):
            continue
        producer = getattr(importlib.import_module(f"producers.{module.name}"), "PRODUCER", None)
        if producer is not None:
            found[producer.name] = producer
    return found


def producer_settings() -> dict[str, type[Section]]:
    """Every producer's section of the configuration: `producer:<name>`."""
    return {f"producer:{name}": each.settings for name, each in find_producers().items()}
