"""Create the shard map and the key names that `[redis] url` describes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.stream.connection.connect import cluster_seeds, servers_of
from relay.stream.connection.refusals import Refusals
from relay.stream.format.keys import Keys
from relay.stream.shards.cluster_map import ClusterMap
from relay.stream.shards.hash_map import HashMap

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.config.settings import RedisSettings
    from relay.stream.shards.shard import Shard, ShardMap


def shard_map(settings: RedisSettings) -> ShardMap:
    """Create the map. Raise ConfigError if the URL is invalid."""
    return ClusterMap(settings) if cluster_seeds(settings) else HashMap(servers_of(settings))


def keys_of(settings: RedisSettings) -> Keys:
    """Return the key names. Keys of no channel have a tag if there may be several shards."""
    several = bool(cluster_seeds(settings)) or len(servers_of(settings)) > 1
    return Keys(settings.prefix, has_site_tag=several)


def refusals_of(shards: ShardMap) -> Callable[[Shard], Refusals]:
    """Return the function that returns what each server refuses. Several servers are named."""
    if is_single(shards):
        of_all = Refusals()
        return lambda _: of_all
    found: dict[Shard, Refusals] = {}
    return lambda shard: found.setdefault(shard, Refusals(shard.name))


def is_single(shards: ShardMap) -> bool:
    """Return True if there is one server, so that messages need not name it."""
    return isinstance(shards, HashMap) and len(shards.shards) == 1
