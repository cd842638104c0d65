"""How producers that the relay runs itself are built and run.

`producers.settings` lists them. The relay runs a producer in its own process if its section
[producer:NAME] enables it. `python -m producers NAME` runs it alone, on any host.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from producers.settings import PRODUCERS
from relay.stream.format.keys import Keys

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.config.settings import NamespaceSettings, PublishSettings, RedisSettings, Section
    from relay.core.model import Channel


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerContext:
    """The services that a producer receives from the relay.

    The streams are in `redis`, under `keys`. `instance` is the name of this process in leases, and
    is unique. `count(outcome, n)` increments `relay_producer_items_total`. `protocols` are the
    sections of the protocols by name, `protocol:NAME`.
    """

    keys: Keys
    redis: RedisSettings
    publish: PublishSettings
    instance: str
    namespace_of: Callable[[Channel], NamespaceSettings]
    max_entry_bytes: int
    count: Callable[[str, int], None]
    protocols: Mapping[str, Section]


class Running(Protocol):
    """A producer that can be run."""

    async def run(self) -> None:
        """Run until cancelled. Errors of Redis do not end it."""


def build(
    name: str,
    config: Config,
    *,
    redis: RedisSettings,
    instance: str,
    namespace_of: Callable[[Channel], NamespaceSettings],
    count: Callable[[str, int], None],
) -> Running:
    """Import a producer and return it. Raise ConfigError if its settings cannot work."""
    context = ProducerContext(
        keys=Keys(redis.prefix),
        redis=redis,
        publish=config.publish,
        instance=instance,
        namespace_of=namespace_of,
        max_entry_bytes=config.stream.max_entry_bytes,
        count=count,
        protocols=config.doors,
    )
    module = importlib.import_module(f"producers.{PRODUCERS[name].module}")
    running: Running = module.build(context, config.producers[f"producer:{name}"])
    return running


def producer_settings() -> dict[str, type[Section]]:
    """Return the class of each producer's section by the section's name, `producer:<name>`."""
    return {f"producer:{name}": section for name, section in PRODUCERS.items()}
