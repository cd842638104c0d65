"""Build producers, and describe what each one must implement.

`producers.settings` lists them. Each relay process runs a producer if its section [producer:NAME]
enables it. `python -m producers NAME` runs it in a process of its own, on any host.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from producers.settings import PRODUCERS

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.config.settings import NamespaceSettings, PublishSettings, RedisSettings, Section
    from relay.core.model import Channel
    from relay.core.tracing import AppendTracer
    from relay.stream.format.keys import Keys
    from relay.stream.shards.shard import ShardMap


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerContext:
    """Settings and services for producers.

    `redis` are the servers with relay's streams, `shards` maps keys to them, and `keys` builds the
    names of keys. `instance` is the
    unique name of this process in leases. `count(outcome, n)` increments
    `relay_producer_items_total`. `protocols` has the protocols' sections by name, `protocol:NAME`.
    """

    keys: Keys
    shards: ShardMap
    redis: RedisSettings
    publish: PublishSettings
    instance: str
    namespace_of: Callable[[Channel], NamespaceSettings]
    max_entry_bytes: int
    count: Callable[[str, int], None]
    protocols: Mapping[str, Section]
    # None if traces are disabled.
    tracer: AppendTracer | None


class RunningProducer(Protocol):
    """A configured producer."""

    async def run(self) -> None:
        """Publish until cancelled. Errors of Redis are logged and retried."""


def build(
    name: str,
    config: Config,
    *,
    redis: RedisSettings,
    instance: str,
    namespace_of: Callable[[Channel], NamespaceSettings],
    count: Callable[[str, int], None],
    tracer: AppendTracer | None = None,
) -> RunningProducer:
    """Import and create a producer. Raise ConfigError if its settings are incomplete."""
    # Only here: `relay genconfig` imports this module, and needs no client library.
    from relay.stream.shards.making import keys_of, shard_map

    context = ProducerContext(
        keys=keys_of(redis),
        shards=shard_map(redis),
        redis=redis,
        publish=config.publish,
        instance=instance,
        namespace_of=namespace_of,
        max_entry_bytes=config.stream.max_entry_bytes,
        count=count,
        protocols=config.doors,
        tracer=tracer,
    )
    module = importlib.import_module(f"producers.{PRODUCERS[name].module}")
    running: RunningProducer = module.build(context, config.producers[f"producer:{name}"])
    return running


def producer_settings() -> dict[str, type[Section]]:
    """Return the settings class of each section `producer:<name>`."""
    return {f"producer:{name}": section for name, section in PRODUCERS.items()}
