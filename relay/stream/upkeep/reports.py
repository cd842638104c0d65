"""JSON objects about workers, streams, entries, dead letters and Redis.

The command line prints them with `--json`, and the console's API returns them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any, cast

import orjson

from relay.config.settings import NamespaceSettings
from relay.core.errors import RelayError
from relay.core.model import Broken, EntryID, Event, Grant, Record, Revocation
from relay.stream.cluster.workers import WorkerInfo
from relay.stream.connection import connect
from relay.stream.connection.connect import RedisClient
from relay.stream.format.keys import Keys
from relay.stream.shards.clients import ShardClients
from relay.stream.shards.shard import Shard
from relay.stream.upkeep.dead_letter_list import DeadLetter
from relay.stream.upkeep.overview import StreamOverview


def up_ms(node: WorkerInfo, now_ms: int) -> int | None:
    """Return the time since the worker's start, or None if its heartbeat does not contain it."""
    try:
        started = datetime.fromisoformat(node.started)
    except ValueError:
        return None
    if started.tzinfo is None:
        started = started.replace(tzinfo=UTC)
    return max(0, now_ms - int(started.timestamp() * 1000))


def worker(node: WorkerInfo, now_ms: int) -> dict[str, object]:
    """Return a worker with a heartbeat."""
    age_ms = up_ms(node, now_ms)
    return {
        "instance": node.instance,
        "alive": True,
        "name": node.name,
        "host": node.host,
        "pid": node.pid,
        "version": node.version,
        "schema": node.schema,
        "started": node.started,
        "up_s": None if age_ms is None else age_ms // 1000,
        "ready": node.ready,
        "connections": node.connections,
        "connections_by_protocol": node.protocols,
        "streams": node.streams,
        "lag_ms": node.lag_ms,
        "cpu_s": node.cpu_s,
        "memory_bytes": node.memory_bytes,
        "events": node.events,
        "deliveries": node.deliveries,
        "written_ms": node.written_ms,
        "refused": node.refused,
    }


def silent_worker(instance: str) -> dict[str, object]:
    """Return a registered worker without a heartbeat."""
    return {"instance": instance, "alive": False}


def stream(
    keys: Keys, namespace: NamespaceSettings, found: StreamOverview, alive: Collection[str] | None
) -> dict[str, object]:
    """Return a channel's stream. `alive` are the instances of the live workers, if known."""
    state = found.state
    return {
        "channel": found.channel,
        "key": keys.stream(found.channel).decode(),
        "server": found.server,
        "entries": state.length,
        "added": state.added,
        "first": optional(state.first),
        "last": optional(state.last) if state.added else None,
        "age_ms": found.age_ms,
        "retention_count": namespace.retention_count or None,
        "retention_age_s": namespace.retention_age_s or None,
        "groups": [
            {
                "name": each.name,
                "worker": each.worker,
                "alive": None if alive is None else each.worker in alive,
                "last": optional(each.last),
                "behind": each.behind,
                "behind_at_least": each.at_least,
                "lag_ms": each.lag_ms,
            }
            for each in found.followers
        ],
    }


def record(each: Record) -> dict[str, object]:
    """Return an entry of a stream."""
    values: dict[str, object] = {"id": str(each.id)}
    match each.body:
        case Event() as event:
            data = orjson.Fragment(event.data) if event.is_json else event.data.decode()
            values |= {"type": event.type, "client": event.client, "data": data}
            if event.uid is not None:
                values["uid"] = event.uid
            if event.to is not None:
                values["to"] = sorted(event.to)
            if event.info is not None:
                values["info"] = orjson.Fragment(event.info)
        case Revocation() as revocation:
            values |= {"revoke": revocation.user}
        case Grant() as grant:
            values |= {"grant": grant.user}
        case Broken() as broken:
            values |= {"broken": broken.reason}
    return values


def dead_letter(letter: DeadLetter) -> dict[str, object]:
    """Return a dead letter without the fields of its entry."""
    return {
        "id": str(letter.id),
        "channel": letter.channel,
        "entry": optional(letter.entry_id),
        "reason": letter.reason,
        "node": letter.values.get("node"),
        "at": letter.values.get("at"),
        "truncated": letter.truncated,
    }


def optional(entry_id: EntryID | None) -> str | None:
    """Return the ID as text, or None."""
    return None if entry_id is None else str(entry_id)


async def servers(clients: ShardClients) -> list[dict[str, object]]:
    """Return all Redis servers with their addresses. One without an answer has an `error`.

    Raises:
        RedisUnavailable: The servers of the Cluster are not known.
    """

    async def report(shard: Shard, client: RedisClient) -> dict[str, object]:
        try:
            return {"address": shard.name, **await server(client)}
        except RelayError as exc:
            return {"address": shard.name, "error": str(exc)}

    present = await clients.each()
    async with asyncio.TaskGroup() as tasks:
        reporting = [tasks.create_task(report(*each)) for each in present]
    return [each.result() for each in reporting]


async def server(client: RedisClient) -> dict[str, object]:
    """Return the product, version, role and memory of a Redis server."""
    info = cast("dict[str, Any]", await connect.command(client, "INFO"))
    is_valkey = "valkey_version" in info
    return {
        "product": "Valkey" if is_valkey else "Redis",
        "version": str(info.get("valkey_version") or info.get("redis_version") or ""),
        "port": info.get("tcp_port"),
        "role": info.get("role"),
        "replicas": info.get("connected_slaves"),
        "up_s": info.get("uptime_in_seconds"),
        "clients": info.get("connected_clients"),
        "memory_bytes": info.get("used_memory"),
        "memory_limit_bytes": info.get("maxmemory") or None,
        "eviction": info.get("maxmemory_policy"),
        "evicted_keys": info.get("evicted_keys"),
        "aof": bool(info.get("aof_enabled")),
        "aof_last_write": info.get("aof_last_write_status"),
        "commands_per_s": info.get("instantaneous_ops_per_sec"),
    }
