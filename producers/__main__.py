"""`python -m producers NAME`: run one producer in its own process, on any host."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from producers.registry import RunningProducer, build, producer_settings
from producers.settings import PRODUCERS
from relay.config.loading import load
from relay.config.settings import RedisSettings
from relay.core.errors import ConfigError, RelayError
from relay.process import logs
from relay.protocols import door_settings
from relay.stream.cluster.workers import new_instance
from relay.stream.connection.failovers import watch_failovers

_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one producer until SIGTERM or SIGINT. Exit codes: 1 configuration error, 2 usage."""
    parser = argparse.ArgumentParser(prog="python -m producers", allow_abbrev=False)
    about = "; ".join(f"{name}: {each.summary}" for name, each in PRODUCERS.items())
    parser.add_argument("name", choices=list(PRODUCERS), help=about)
    parser.add_argument(
        "argument",
        nargs="?",
        help=", ".join(
            f"{name}: [producer:{name}] {each.argument}"
            for name, each in PRODUCERS.items()
            if each.argument
        ),
    )
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
    name = options.name
    if options.argument is not None:
        setting = PRODUCERS[name].argument
        if not setting:
            parser.error(f"{name} has no argument: {options.argument!r}")
        options.overrides.append(f"producer:{name}.{setting}={options.argument}")
    flags = {"redis": options.redis} if options.redis else {}
    try:
        config = load(
            options.config,
            environ=os.environ,
            overrides=options.overrides,
            flags=flags,
            doors=door_settings(),
            producers=producer_settings(),
        )
        if config.redis.url == "embedded":
            raise ConfigError(
                "[redis] url is not set: a separate producer process needs the address of Redis"
            )
        running = build(
            name,
            config,
            redis=config.redis,
            instance=new_instance(config.node.name or f"{socket.gethostname()}_{name}"),
            namespace_of=config.namespace,
            count=lambda _outcome, _number: None,
        )
    except RelayError as exc:
        sys.stderr.write(f"producers: {logs.redact(' '.join(str(exc).split()))}\n")
        return 1
    logs.setup(config.log)
    for note in config.notes:
        _log.warning("%s", note)
    uvloop.run(_until_signal(running, config.redis))
    return 0


async def _until_signal(running: RunningProducer, redis: RedisSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(running.run(), name="producer")
        watching = tasks.create_task(watch_failovers(redis), name="failovers")
        stopping = tasks.create_task(stop.wait(), name="signal")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        watching.cancel()
        stopping.cancel()


if __name__ == "__main__":
    sys.exit(main())
