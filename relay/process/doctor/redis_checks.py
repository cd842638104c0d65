"""Check the Redis server: version, persistence, memory, rights, invalidations, replicas, clock.

Most facts come from one INFO, which the user of relay may run. The user has no right to CONFIG, so
what only CONFIG GET shows becomes a note with the command to run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from relay.core.clock import RedisClock
from relay.core.durability import Durability
from relay.core.errors import RelayError, StartError
from relay.process.doctor.finding import Finding, error, note, warning
from relay.stream.connection import connect
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.connection.refusals import needs
from relay.stream.connection.rights import find_rejected
from relay.stream.write.confirmations import check_namespaces

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.stream.connection.connect import RedisClient
    from relay.stream.format.keys import Keys
    from relay.stream.shards.server_errors import ServerErrors
    from relay.stream.shards.shard import Shard

Info = Mapping[str, Any]

_PUSH_S = 2.0
_WAIT_MS = 1000
# Of the limit.
_NEARLY = 0.9
_LUA_FIXED = {
    # CVE-2025-49844. There is no fixed release of the versions in between.
    "redis": {(7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2},
    "valkey": {(7, 2): 11, (8, 0): 6, (8, 1): 4},
}
_NEWEST = {"redis": (8, 2), "valkey": (8, 1)}


async def check(
    config: Config, client: RedisClient, keys: Keys, shard: Shard, errors: ServerErrors
) -> list[Finding]:
    """Return what is wrong with one server.

    If it is unreachable, that is the only finding, and it is added to `errors`.
    """
    try:
        await connect.check_server(client, shard.settings)
        info = await information(client)
    except StartError as exc:
        return [
            error(
                "redis.version",
                str(exc),
                "relay does not start with this server.",
                "Set [redis] url as this line says, or to Redis 7.2 or newer, or Valkey",
            )
        ]
    except (RelayError, OSError) as exc:
        errors.add(shard, exc if isinstance(exc, RelayError) else RelayError(str(exc)))
        return [unreachable(config, exc, shard.name)]
    found = [*of_information(config, info)]
    if config.redis.url != "embedded":
        found += await _fsync(client, info)
    found += await _rights(keys, shard)
    if info.get("role") == "master":
        found += await _invalidations(config, keys, shard)
        found += await _replicas(config, client, info)
    found += await _clock(client)
    return found


async def information(client: RedisClient) -> Info:
    """Return the reply to INFO."""
    reply: Info = await connect.command(client, "INFO")
    return reply


def unreachable(config: Config, exc: Exception, server: str = "") -> Finding:
    """Return the finding for a Redis that does not answer, or for one of several servers."""
    fix = "Start Redis, or correct [redis] url and password; try: redis-cli -u URL PING"
    if config.redis.url == "embedded":
        fix = "Start relay, which runs this server: relay serve; or set [redis] url to your Redis"
    return error(
        "redis.unreachable",
        f"Redis ({server or connect.describe(config.redis)}) cannot be used: {exc}",
        "No event of a channel on this server is delivered or accepted."
        if server
        else "No event is delivered or accepted.",
        fix,
    )


def of_information(config: Config, info: Info) -> Iterator[Finding]:
    """Yield the faults that the reply to INFO shows. `serve` logs them at the start."""
    if info.get("role") != "master":
        yield error(
            "redis.replica",
            "The server of [redis] url is a replica",
            "A replica accepts no events, and relay does not read from one.",
            f"Set [redis] url to the primary ({info.get('master_host')}:{info.get('master_port')}),"
            " or to sentinel://HOST:26379/MASTER-NAME, so that relay follows a failover",
        )
    yield from _version(info)
    if config.redis.url == "embedded":
        # relay configures this server itself.
        return
    yield from _memory(info)
    yield from _persistence(info)
    clients, limit = int(info.get("connected_clients", 0)), int(info.get("maxclients", 0))
    if limit and clients > limit * _NEARLY:
        yield warning(
            "redis.maxclients",
            f"{clients} of {limit} connections of Redis are in use",
            "Above the limit, Redis rejects connections of workers and producers.",
            f"redis-cli CONFIG SET maxclients {2 * limit}; redis-cli CONFIG REWRITE",
        )


def _version(info: Info) -> Iterator[Finding]:
    server = "valkey" if info.get("server_name") == "valkey" else "redis"
    text = str(info.get("valkey_version" if server == "valkey" else "redis_version", ""))
    numbers = [int(part) for part in text.split(".")[:3] if part.isdigit()]
    if len(numbers) < 3 or tuple(numbers[:2]) > _NEWEST[server]:
        return
    fixed = _LUA_FIXED[server].get((numbers[0], numbers[1]))
    if fixed is None or numbers[2] < fixed:
        yield warning(
            "redis.version",
            f"{server.title()} {text} has a known fault, CVE-2025-49844",
            "Any user who may run scripts (EVAL, EVALSHA) can execute code on the server of Redis,"
            " unless your distribution has corrected this version.",
            "Update to the newest release of Redis (7.2.11, 7.4.6, 8.0.4, 8.2.2 or later) or Valkey"
            " (7.2.11, 8.0.6, 8.1.4 or later); meanwhile give EVAL to trusted programs only",
        )


def _memory(info: Info) -> Iterator[Finding]:
    policy, limit = str(info.get("maxmemory_policy", "")), int(info.get("maxmemory", 0))
    used, evicted = int(info.get("used_memory", 0)), int(info.get("evicted_keys", 0))
    keep = "redis-cli CONFIG SET maxmemory-policy noeviction; redis-cli CONFIG REWRITE"
    if policy.startswith("allkeys-"):
        yield error(
            "redis.eviction",
            f"Redis may evict any key (maxmemory-policy {policy})",
            "When the memory is full, whole streams disappear with undelivered events.",
            keep,
        )
    elif policy.startswith("volatile-"):
        yield warning(
            "redis.eviction",
            f"Redis may evict keys with an expiry time (maxmemory-policy {policy})",
            "Heartbeats, leases, presence and the uids for deduplication disappear when the memory"
            " is full: work is done twice, and running workers are treated as dead.",
            keep,
        )
    if evicted and policy != "noeviction":
        yield error(
            "redis.evicted",
            f"Redis has evicted {evicted} keys since its start",
            "Evicted streams have lost their events; clients were notified of a gap.",
            "redis-cli CONFIG SET maxmemory-policy noeviction, then raise maxmemory or lower"
            " [namespace] retention_count",
        )
    if not limit:
        total = int(info.get("total_system_memory", 0))
        example = f"{max(total // 2 // 2**20, 256)}mb"
        yield warning(
            "redis.maxmemory",
            "Redis has no memory limit (maxmemory 0)",
            "If streams grow beyond the memory of the host, the kernel kills Redis. With a limit,"
            " Redis rejects new events and keeps serving.",
            f"redis-cli CONFIG SET maxmemory {example}; redis-cli CONFIG REWRITE",
        )
    elif used > limit * _NEARLY:
        yield error(
            "redis.memory",
            f"Redis uses {used * 100 // limit} % of its memory limit ({limit // 2**20} MB)",
            "At the limit, Redis rejects all events.",
            f"redis-cli CONFIG SET maxmemory {limit * 2 // 2**20}mb, or lower [namespace]"
            " retention_count and retention_age_s",
        )


def _persistence(info: Info) -> Iterator[Finding]:
    aof = int(info.get("aof_enabled", 0))
    if not aof:
        yield warning(
            "redis.aof",
            "The append-only file is off (appendonly no)",
            "A restart of Redis loses all events since its last snapshot, or all of them if there"
            " are no snapshots. Clients are notified, but the events are gone.",
            "redis-cli CONFIG SET appendonly yes; redis-cli CONFIG REWRITE",
        )
    for field, file in (
        ("aof_last_write_status", "append-only file"),
        ("aof_last_bgrewrite_status", "rewrite of the append-only file"),
        ("rdb_last_bgsave_status", "snapshot"),
    ):
        if info.get(field, "ok") != "ok":
            yield error(
                f"redis.{field}",
                f"Redis could not write its {file} ({field}:{info[field]})",
                "Events are not on disk, and Redis may reject all writes until it succeeds.",
                "Free disk space in the data folder of Redis (redis-cli CONFIG GET dir) and read"
                " its log; then run redis-cli BGSAVE",
            )


async def _fsync(client: RedisClient, info: Info) -> list[Finding]:
    if not int(info.get("aof_enabled", 0)):
        return []
    try:
        reply = await connect.command(client, "CONFIG", "GET", "appendfsync")
    except RelayError:
        return [
            note(
                "redis.appendfsync",
                "It is unknown when Redis writes its append-only file to disk",
                "The user in [redis] url may not run CONFIG GET, which is as it should be. With"
                " appendfsync no, a crash of the host loses about 30 s of acknowledged events.",
                "As administrator of Redis, run: redis-cli CONFIG GET appendfsync; it should be"
                " everysec or always",
            )
        ]
    value = str(_text(reply).get("appendfsync", ""))
    if value == "no":
        return [
            error(
                "redis.appendfsync",
                "Redis leaves it to the kernel when events reach the disk (appendfsync no)",
                "A crash of the host loses about 30 s of acknowledged events.",
                "redis-cli CONFIG SET appendfsync everysec; redis-cli CONFIG REWRITE",
            )
        ]
    return []


def _text(reply: Any) -> dict[str, str]:
    def text(each: Any) -> str:
        return each.decode(errors="replace") if isinstance(each, bytes) else str(each)

    if isinstance(reply, Mapping):
        return {text(name): text(value) for name, value in reply.items()}
    pairs = iter(reply)
    return {text(name): text(value) for name, value in zip(pairs, pairs, strict=True)}


async def _rights(keys: Keys, shard: Shard) -> list[Finding]:
    wanted = needs(keys, "relay.doctor", sharded=shard.uses_sharded_pubsub)
    try:
        endpoint = await shard.locate()
        rejected = await find_rejected(endpoint, shard.settings, wanted)
    except RelayError:
        # A replica or a Redis that has just gone: another finding names it.
        return []
    by_loss: dict[str, list[str]] = {}
    for need, _ in rejected:
        names = by_loss.setdefault(need.loss, [])
        name = f"{need.name} on {need.key}" if need.key else need.name
        if name not in names:
            names.append(name)
    user = endpoint.username or "default"
    return [
        error(
            "redis.rights",
            f"Redis rejects commands of user {user}: {', '.join(names)}",
            f"Without them, {loss}.",
            f"As administrator of Redis, compare ACL GETUSER {user} with the user relay in"
            " docs/redis.md, section 'Create Redis users', and add, for example:"
            f" redis-cli ACL SETUSER {user} +{names[0].partition(' ')[0]}",
        )
        for loss, names in by_loss.items()
    ]


async def _invalidations(config: Config, keys: Keys, shard: Shard) -> list[Finding]:
    """Write a canary key, as a worker does, and wait for its invalidation."""
    if config.stream.tracking == "off":
        return []
    key, arrived = keys.canary("doctor", shard.tag), asyncio.Event()

    def on_push(push: list[object]) -> None:
        if push[0] == b"invalidate":
            arrived.set()

    settings = shard.settings
    fix = (
        "Let relay connect to Redis directly, not through a proxy; the user needs +client|tracking;"
        " or set [stream] tracking = off"
    )
    try:
        endpoint = await shard.locate()
        with (
            closing(
                await PipelineConnection.open(endpoint, settings=settings, on_push=on_push)
            ) as listener,
            closing(await PipelineConnection.open(endpoint, settings=settings)) as writer,
        ):
            await listener.call("CLIENT", "TRACKING", "ON")
            await listener.call("GET", key)
            await writer.call("SET", key, "1", "PX", 1000)
            async with asyncio.timeout(_PUSH_S):
                await arrived.wait()
    except TimeoutError:
        return [
            error(
                "redis.tracking",
                f"Redis has sent no invalidation {_PUSH_S:g} s after a tracked key was written",
                "Workers would find new events only by their slow sweep.",
                fix,
            )
        ]
    except connect.CommandRefused as exc:
        if exc.code == "ERR" or "tracking" in str(exc).lower():
            return [
                warning(
                    "redis.tracking",
                    f"Client tracking is not available: {exc}",
                    "Workers poll all streams with blocking reads: more load, and delays that grow"
                    " with the number of streams.",
                    fix,
                )
            ]
        return []
    except RelayError:
        # Writes are refused, or Redis has just gone: other findings name it.
        return []
    return []


async def _replicas(config: Config, client: RedisClient, info: Info) -> list[Finding]:
    online = [
        each
        for name, each in info.items()
        if name.startswith("slave")
        and name[5:].isdigit()
        and isinstance(each, Mapping)
        and each.get("state") == "online"
    ]
    known = int(info.get("connected_slaves", 0))
    wanted = max(Durability.parse(each.durability).replicas for each in config.namespaces.values())
    found = []
    try:
        await check_namespaces(client, config.namespaces)
    except StartError as exc:
        found.append(
            error(
                "redis.durability",
                str(exc),
                "Relay does not start with it.",
                "Change the server as the message says, or lower the durability",
            )
        )
    if known > len(online):
        found.append(
            warning(
                "redis.replica_state",
                f"{known - len(online)} of {known} replicas are not in sync",
                "They cannot take over without losing events.",
                "redis-cli INFO replication, and read the log of the replica",
            )
        )
    if wanted:
        try:
            confirmed = int(await connect.command(client, "WAIT", wanted, _WAIT_MS))
        except RelayError:
            # A missing right is among those of `_rights`, or needs none for reading.
            confirmed = len(online)
        if confirmed < wanted:
            found.append(
                error(
                    "redis.wait",
                    f"A namespace waits for {wanted} replicas, but {confirmed} confirm within"
                    f" {_WAIT_MS} ms",
                    "Every publish through relay to that namespace waits and then fails.",
                    "Start the replicas (redis-cli INFO replication), or lower the replicas"
                    f" in [namespace] durability to {confirmed}",
                )
            )
    elif online:
        found.append(
            warning(
                "redis.wait",
                f"Redis has {len(online)} replicas, but no namespace waits for them",
                "A failover loses the newest acknowledged events if the replica lagged behind.",
                "[namespace]\ndurability = replicated",
            )
        )
    return found


async def _clock(client: RedisClient) -> list[Finding]:
    clock, asked_at = RedisClock(), time.monotonic()
    try:
        clock.measured(await connect.time_ms(client), asked_at)
    except RelayError:
        return []
    if not (problem := clock.problem()):
        return []
    return [
        error(
            "redis.clock",
            problem.partition(". ")[0],
            "Tokens are accepted after they have expired, or rejected before.",
            "On both hosts: timedatectl set-ntp true",
        )
    ]
