"""`relay reshard`: move keys after the list of Redis servers was changed."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import AsyncExitStack

from producers.settings import QueueSettings
from relay.cli.operator_context import OperatorContext
from relay.cli.output import Progress, emit, say, table
from relay.core.errors import RelayError
from relay.stream.connection.connect import url_of
from relay.stream.shards.clients import shard_clients
from relay.stream.shards.server_list import store_list
from relay.stream.upkeep.reshard import Reshard, Resharded

_SHOWN = 10


async def reshard(site: OperatorContext, options: argparse.Namespace) -> int:
    """Move the keys of all servers to those of `[redis] url`."""
    async with AsyncExitStack() as stack:
        old = []
        if options.removed:
            settings = site.config.redis.model_copy(update={"url": options.removed})
            with url_of("--removed"):
                old.append(await stack.enter_async_context(shard_clients(settings)))
        work = Reshard(site.clients, old, site.keys)
        await work.connect()
        if not options.dry_run and (living := await work.live()):
            raise RelayError(
                f"{len(living)} workers are running ({', '.join(living[:3])}): stop all workers and"
                " producers first; --dry-run works while they run"
            )
        progress = Progress("keys counted")
        late = 0
        try:
            result = await work.run(dry=True, progress=progress)
            if not options.dry_run:
                progress.end()
                progress = Progress(f"of {result.keys.total():,} keys moved")
                result = await work.run(dry=False, progress=progress)
                # Keys that were written while the others were moved.
                late = await work.count_misplaced(result)
        except asyncio.CancelledError:
            progress.end()
            if not options.dry_run:
                say("interrupted: some keys are not moved yet; start no worker, repeat the command")
            raise
        finally:
            progress.end()
            await work.release()
        queue = site.config.producers["producer:queue"]
        names = queue.names() if isinstance(queue, QueueSettings) else []
        waiting = await work.waiting_queues(names)
        if not options.dry_run and not result.conflicts and not late:
            await store_list(site.clients, site.keys, old)
    _show(result, options)
    for line in waiting:
        say(f"{line}: let a worker of the old list execute them")
    for move in result.conflicts[:_SHOWN]:
        say(
            f"{move.key.decode(errors='replace')} exists on {move.source.name} and, with other"
            f" contents, on {move.target.name}; it was not moved. Delete one of them, then repeat"
        )
    if more := len(result.conflicts[_SHOWN:]):
        say(f"{more} more keys exist twice")
    if late:
        say(
            f"{late} keys were written on another server than their own meanwhile: stop all"
            " producers, then repeat"
        )
    return 1 if result.conflicts or waiting or late else 0


def _show(result: Resharded, options: argparse.Namespace) -> None:
    if options.json:
        for (source, target), count in sorted(result.keys.items()):
            streams = result.streams[source, target]
            emit({"from": source, "to": target, "keys": count, "streams": streams})
        return
    rows = [
        [source, target, str(result.streams[source, target]), str(count)]
        for (source, target), count in sorted(result.keys.items())
    ]
    if rows:
        table(("FROM", "TO", "STREAMS", "KEYS"), rows, right=(2, 3))
    verb = "would move" if options.dry_run else "moved"
    print(f"{sum(result.keys.values())} keys {verb}")
    if result.unproven:
        print(
            f"{result.unproven} streams may have lost entries in an earlier failover: their clients"
            " will be notified of a reset"
        )
