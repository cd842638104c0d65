"""Shard maps: find the Redis server of a key, for one server, several servers or a Redis Cluster.

Everything in `relay.stream` that sends commands for keys uses a `ShardMap`:

* `shard_map(settings)` creates it; `keys_of(settings)` creates the key names that fit it. A single
  server or a primary behind Sentinel is a map with one shard, so that there is one code path.
* `await shards.refresh()` must have succeeded once before the others are used. It raises
  RedisUnavailable if no server of a Cluster answers; for other maps it does nothing.
* `shards.shard_of(key)` returns the shard that has `key` now, and `shards.home` the shard of the
  keys that belong to no channel. These have the tag `{site}` if there is more than one shard. Both
  raise RedisUnavailable if the slot is unassigned.
* `shards.shards` are all shards. A Cluster's change with every failover, so do not store them:
  store the key, and ask again for each connection.
* `await shard.locate()` returns the endpoint for the next connection (use it instead of
  `discover`). `shard.name` is for logs. `shard.tag` makes a key one of the shard's:
  `{tag}` hashes to one of its slots. `shard.uses_sharded_pubsub`: use SSUBSCRIBE and SPUBLISH.

After a reply for which `is_misplaced(reply)` is true (MOVED, ASK, TRYAGAIN), call
`await shards.refresh()`, ask `shard_of` again, and repeat the command after a pause. Never send
ASKING for a command that creates keys: it would create a second, empty key on the new server, and
the move of the real one would fail (BUSYKEY).

`ShardClients` has redis-py clients for commands outside the pipelines: `for_key(key)`, `home`, and
`each()` for commands to every server (SCAN, TIME, INFO). In a Cluster, `for_key` and `home` are
redis-py's RedisCluster, which follows redirections by itself.
"""
