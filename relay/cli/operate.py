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
from relay.core.errors import RelayError
from relay.stream.connection.connect import CommandRefused

# redis-py's class for the error NOPERM.
_NO_RIGHTS = "NoPermissionError"

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
    try:
        async with operator_context(config) as site:
            return await _COMMANDS[options.command](site, options)
    except CommandRefused as exc:
        if exc.code != _NO_RIGHTS and "NOPERM" not in str(exc):
            raise
        raise RelayError(f"{exc}; docs/redis.md has an ACL user for maintenance") from exc
