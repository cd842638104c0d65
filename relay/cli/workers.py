"""`relay workers`, `relay status` and `relay unsubscribe`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from relay.cli.operator_context import OperatorContext, channel_of, user_of
from relay.cli.output import duration, emit, safe, say, table
from relay.core.errors import RedisUnavailable
from relay.core.model import EntryID
from relay.stream.cluster.workers import WorkerInfo, list_workers, live_workers, unwritten_s
from relay.stream.connection import connect
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.upkeep import dead_letter_list, reports
from relay.stream.write import control

if TYPE_CHECKING:
    from relay.stream.connection.connect import RedisClient
    from relay.stream.shards.shard import Shard

_HEAD = (
    "WORKER", "HOST", "PID", "VERSION", "UP", "READY", "CONNECTIONS", "STREAMS", "LAG",
)  # fmt: skip


async def workers(site: OperatorContext, options: argparse.Namespace) -> int:
    """List workers by host, including registered ones without a heartbeat."""
    living, silent = await list_workers(site.client, site.keys)
    living.sort(key=lambda node: (node.host, node.instance))
    now_ms = await connect.time_ms(site.client)
    if options.json:
        for node in living:
            emit(reports.worker(node, now_ms))
        for instance in silent:
            emit(reports.silent_worker(instance))
        return 0
    if not living and not silent:
        say("no worker is registered on this Redis")
        return 0
    rows = [_row(node, now_ms) for node in living]
    rows += [[instance, *["-"] * 4, "silent", *["-"] * 3] for instance in silent]
    table(_HEAD, rows, right=(2, 4, 6, 7, 8))
    hosts = len({node.host for node in living})
    connections = sum(node.connections or 0 for node in living)
    print(
        f"{plural(len(living), 'worker')} on {plural(hosts, 'host')},"
        f" {plural(connections, 'connection')}"
    )
    return 0


def plural(number: int, noun: str) -> str:
    """Return the number with the noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _row(node: WorkerInfo, now_ms: int) -> list[str]:
    ready = {True: "yes", False: "no", None: "-"}[node.ready]
    numbers = ["-" if each is None else str(each) for each in (node.connections, node.streams)]
    return [
        node.instance,
        node.host,
        str(node.pid),
        node.version,
        duration(reports.up_ms(node, now_ms)),
        ready,
        *numbers,
        duration(node.lag_ms),
    ]


async def status(site: OperatorContext, options: argparse.Namespace) -> int:
    """Return 0 if there is no problem, else 1 with one line per problem on standard error."""
    values: dict[str, Any] = {"good": False, "redis": False}
    problems: list[str] = []
    errors = ServerErrors()
    try:
        servers = await site.clients.each()
        with errors.collect(site.clients.shards.home):
            problems += await _site_problems(site, options, values)
    except RedisUnavailable as exc:
        # The servers of the Redis Cluster are not known.
        problems.append(str(exc))
    else:
        refusal = await _write_refusal(site, servers, errors)
        values["servers"] = [
            {"address": shard.name, "answers": shard not in errors} for shard, _ in servers
        ]
        if refusal and not any(refusal in line for line in problems):
            problems.append(f"Redis refuses writes ({refusal}): publishing is rejected")
        problems += errors.lines()
    values["good"] = not problems
    values["wrong"] = problems
    if options.json:
        emit(values)
    else:
        _show(values)
    for line in problems:
        say(line)
    return 1 if problems else 0


async def _site_problems(
    site: OperatorContext, options: argparse.Namespace, values: dict[str, Any]
) -> list[str]:
    """Add what the home server knows to `values`. Return the problems."""
    living, silent = await list_workers(site.client, site.keys)
    dead_letters = await dead_letter_list.count(site.client, site.keys)
    now_ms = await connect.time_ms(site.client)
    lag_ms = max((node.lag_ms or 0 for node in living), default=0)
    values |= {
        "redis": True,
        "workers": len(living),
        "ready": sum(node.ready is not False for node in living),
        "silent": len(silent),
        "connections": sum(node.connections or 0 for node in living),
        "lag_ms": lag_ms,
        "dead_letters": dead_letters,
        "versions": [
            {"version": version, "schema": schema, "workers": count}
            for (version, schema), count in sorted(
                Counter((node.version, node.schema) for node in living).items()
            )
        ],
    }
    problems = []
    if len(living) < options.min_workers:
        problems.append(
            f"{plural(len(living), 'worker')} alive, expected at least {options.min_workers}"
        )
    problems += [f"{node.instance} does not read streams" for node in living if node.ready is False]
    problems += [f"{node.instance}: {node.refused}" for node in living if node.refused]
    problems += [
        f"{node.instance} has not written its heartbeat for {late_s:.0f} s: see its log"
        for node in living
        if (late_s := unwritten_s(node, now_ms))
    ]
    if lag_ms > options.max_lag * 1000:
        problems.append(f"lag {duration(lag_ms)}, expected at most {options.max_lag:g} s")
    limit = options.max_dead_letters
    if limit is not None and dead_letters > limit:
        problems.append(f"{plural(dead_letters, 'dead letter')}, expected at most {limit}")
    return problems


async def _write_refusal(
    site: OperatorContext, servers: Sequence[tuple[Shard, RedisClient]], errors: ServerErrors
) -> str:
    """Return the error with which Redis rejects a small write, '' if it accepts it.

    A Redis that is full rejects heartbeats too, so workers cannot report it.
    """
    refusal = ""
    for shard, client in servers:
        if shard in errors:
            continue
        key = site.keys.canary("status", shard.tag)
        with errors.collect(shard):
            try:
                await connect.command(client, "SET", key, "1", "PX", 1000)
            except (connect.CommandRefused, connect.RefusedForNow) as exc:
                refusal = refusal or exc.reply
    return refusal


def _show(values: dict[str, Any]) -> None:
    rows = [("status", "good" if values["good"] else "NOT GOOD")]
    servers = values.get("servers", [])
    if len(servers) > 1:
        answering = sum(each["answers"] for each in servers)
        rows.append(("redis", f"{answering} of {len(servers)} servers answer"))
    elif values["redis"]:
        rows.append(("redis", "answers"))
    else:
        rows.append(("redis", "unreachable or rejecting commands"))
    if values["redis"]:
        workers = f"{values['workers']} alive, {values['ready']} ready"
        if values["silent"]:
            workers += f", {values['silent']} silent"
        rows += [
            ("workers", workers),
            ("connections", str(values["connections"])),
            ("lag", duration(values["lag_ms"])),
            ("dead letters", str(values["dead_letters"])),
        ]
        if len(values["versions"]) > 1:
            parts = (
                f"{plural(each['workers'], 'worker')} of {safe(each['version'])},"
                f" schema {each['schema']}"
                for each in values["versions"]
            )
            rows.append(("versions", "; ".join(parts)))
    for name, text in rows:
        print(f"{name:<14}{text}")


async def unsubscribe(site: OperatorContext, options: argparse.Namespace) -> int:
    """End the user's subscriptions to one channel through the control stream."""
    channel, user = channel_of(options.channel), user_of(options.user)
    command = control.UnsubscribeUser(channel=channel, user=user)
    entry_id = await control.publish(site.clients, site.keys, command)
    action = f"end all subscriptions of {user} to {channel}"
    await _sent(site, options, entry_id, action, {"channel": channel, "user": user})
    return 0


async def _sent(
    site: OperatorContext,
    options: argparse.Namespace,
    entry_id: EntryID,
    action: str,
    values: dict[str, object],
) -> None:
    """Print the number of workers. It is unknown whether the user was connected."""
    count = len(await live_workers(site.client, site.keys))
    if options.json:
        emit({"id": str(entry_id), "workers": count, **values})
    elif count:
        workers = plural(count, "worker")
        print(f"Sent to {workers}: {action}, if any (control entry {entry_id})")
    else:
        print(f"No worker is running: nothing to do (control entry {entry_id})")
