"""`relay streams` and `relay trim`: list streams, remove old entries."""

from __future__ import annotations

import argparse

from relay.cli.operator_context import OperatorContext, channel_of
from relay.cli.output import Progress, duration, emit, say, table
from relay.config.settings import NamespaceSettings
from relay.core.errors import RelayError
from relay.stream.cluster.workers import live_workers
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.upkeep import overview, reports, retention
from relay.stream.upkeep.overview import Follower, StreamOverview

_HEAD = ("CHANNEL", "ENTRIES", "FIRST", "LAST", "AGE", "RETENTION", "WORKERS", "BEHIND")


async def streams(site: OperatorContext, options: argparse.Namespace) -> int:
    """List streams sorted by channel. Raise RelayError if the pattern matches none.

    Return 1 if the streams of some servers are missing, with a line for each of them.
    """
    progress = Progress("streams")
    found: list[StreamOverview] = []
    errors = ServerErrors()
    try:
        async for batch in overview.walk(
            site.clients, site.keys, options.pattern, progress, errors
        ):
            found += batch
    finally:
        progress.end()
    alive: set[str] | None = None
    home = site.clients.shards.home
    if home not in errors:
        with errors.collect(home):
            alive = {worker.instance for worker in await live_workers(site.client, site.keys)}
    found.sort(key=lambda stream: stream.channel)
    if options.json:
        for stream in found:
            namespace = site.config.namespace(stream.channel)
            emit(reports.stream(site.keys, namespace, stream, alive))
    elif found:
        _show(site, found, alive)
    async for line in overview.misnamed(site.clients, site.keys, options.pattern, errors):
        say(line)
    errors.raise_of_single(site.clients.shards)
    if errors:
        for line in errors.lines():
            say(f"the list is not complete: {line}")
        return 1
    if not found:
        if options.pattern != "*":
            raise RelayError(f"no stream of a channel that matches {options.pattern}")
        say("no streams yet")
    return 0


def _show(site: OperatorContext, found: list[StreamOverview], alive: set[str] | None) -> None:
    """Print a table. `alive`: the instances of the live workers, or None if they are not known."""
    rows: list[list[str]] = []
    has_servers = len(site.clients.shards.shards) > 1
    for stream in found:
        state, followers = stream.state, stream.followers
        worst = max(followers, key=lambda each: each.lag_ms, default=None)
        rows.append(
            [
                stream.channel,
                str(state.length),
                str(state.first or "-"),
                str(state.last) if state.added else "-",
                duration(stream.age_ms),
                _retention(site.config.namespace(stream.channel)),
                "-" if alive is None else str(sum(each.worker in alive for each in followers)),
                _behind(worst) if worst else "-",
                *([stream.server] if has_servers else []),
            ]
        )
        key = site.keys.stream(stream.channel).decode()
        if f"{{{stream.channel}}}" not in key:
            # Show the key only if it differs from the channel's name.
            rows.append([f"  key: {key}"])
        # One remark for each consumer group that is behind or has no live worker.
        rows += [
            [f"  {follower.name}: {_behind(follower)}{_state(follower, alive)}"]
            for follower in followers
            if follower.behind or (alive is not None and follower.worker not in alive)
        ]
    table((*_HEAD, "SERVER") if has_servers else _HEAD, rows, right=(1, 4, 6))


def _behind(follower: Follower) -> str:
    if not follower.behind:
        return "0"
    count = f"{follower.behind}{' or more' if follower.at_least else ''}"
    return f"{count}, {duration(follower.lag_ms)}"


def _state(follower: Follower, alive: set[str] | None) -> str:
    if follower.worker is None:
        return " (not a worker's group)"
    return "" if alive is None or follower.worker in alive else " (no heartbeat)"


def _retention(namespace: NamespaceSettings) -> str:
    limits = []
    if namespace.retention_count:
        limits.append(str(namespace.retention_count))
    if namespace.retention_age_s:
        limits.append(duration(namespace.retention_age_s * 1000))
    return ", ".join(limits) or "none"


async def trim(site: OperatorContext, options: argparse.Namespace) -> int:
    """Trim exactly, unlike the retention job, which trims approximately."""
    channel = channel_of(options.channel)
    max_entries, max_age_s = options.max_entries, options.max_age
    if max_entries is None and max_age_s is None:
        namespace = site.config.namespace(channel)
        max_entries = namespace.retention_count or None
        max_age_s = namespace.retention_age_s or None
    removed = await retention.trim_one(
        site.clients, site.keys, channel, max_entries=max_entries, max_age_s=max_age_s
    )
    if removed is None:
        raise RelayError(f"{channel} has no stream; run `relay streams` for a list")
    if options.json:
        emit({"channel": channel, "removed": removed})
    else:
        print(f"{removed} {'entry' if removed == 1 else 'entries'} removed from {channel}")
    return 0
