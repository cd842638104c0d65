"""`python -m producers NAME`: one producer as a process of its own, on any host."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from producers.api_queue import QueueProducer
from relay import logs
from relay.config import Config, load
from relay.errors import ConfigError, RelayError
from relay.frontdoor import door_settings
from relay.stream.keys import Keys
from relay.stream.nodes import new_instance

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one producer until a signal; the exit code (1: configuration, 2: usage)."""
    parser = argparse.ArgumentParser(prog="python -m producers", allow_abbrev=False)
    parser.add_argument("name", choices=["queue"], help="queue: commands from [producer:queue]")
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="the relay's INI file")
    parser.add_argument("--redis", metavar="URL", help="[redis] url")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any setting; may be repeated",
    )
    options = parser.parse_args(arguments)
    flags = {"redis": options.redis} if options.redis else {}
    try:
        config = load(
            options.config,
            environ=os.environ,
            overrides=options.overrides,
            flags=flags,
            doors=door_settings(),
        )
        if config.redis.url == "embedded":
            raise ConfigError("[redis] url: a producer by itself needs the address of a Redis")
    except RelayError as exc:
        sys.stderr.write(f"producers: {logs.redact(' '.join(str(exc).split()))}\n")
        return 1
    logs.setup(config.log)
    uvloop.run(_until_signal(_queue(config)))
    return 0


def _queue(config: Config) -> Coroutine[Any, Any, None]:
    # Whether the relay takes commands itself is [producer:queue] enabled; this one was asked to.
    return QueueProducer(
        keys=Keys(config.redis.prefix),
        redis=config.redis,
        settings=config.queue,
        publish=config.publish,
        instance=new_instance(config.node.name or f"{socket.gethostname()}_queue"),
        namespace_of=config.namespace,
        max_entry_bytes=config.stream.max_entry_bytes,
    ).run()


async def _until_signal(work: Coroutine[Any, Any, None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(work, name="producer")
        stopping = tasks.create_task(stop.wait(), name="signal")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        stopping.cancel()


if __name__ == "__main__":
    sys.exit(main())
