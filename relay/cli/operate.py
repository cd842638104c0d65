"""Run an operator's command in an event loop."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping

from relay.cli import connections, dead_letters, events, journal, reshard, streams, workers
from relay.cli.configured import configuration
from relay.cli.operator_context import OperatorContext, operator_context
from relay.config.loading import Config
from relay.stream.shards.server_list import compare_list

Command = Callable[[OperatorContext, argparse.Namespace], Awaitable[int]]

_COMMANDS: Mapping[str, Command] = {
    "publish": events.publish,
    "tail": events.tail,
    "streams": streams.streams,
    "reshard": reshard.reshard,
    "trim": streams.trim,
    "workers": workers.workers,
    "status": workers.status,
    "connections": connections.connections,
    "connection": connections.connection,
    "events": journal.events,
    "explain": journal.explain,
    "disconnect": connections.disconnect,
    "unsubscribe": workers.unsubscribe,
    "dead-letters": dead_letters.dead_letters,
}


def run(options: argparse.Namespace) -> int:
    """Run the command in an event loop and return its exit code."""
    code = asyncio.run(_run(options, configuration(options)))
    # Flush here, where BrokenPipeError is still handled.
    sys.stdout.flush()
    return code


async def _run(options: argparse.Namespace, config: Config) -> int:
    async with operator_context(config) as site:
        if options.command != "reshard":
            await compare_list(site.clients, site.keys)
        return await _COMMANDS[options.command](site, options)
