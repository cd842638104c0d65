"""Delivers what waits in a spool: in order, each event once, whoever appended it and whoever dies.

The publisher's part of it, and a producer that does nothing else: for programs that only append,
or that end before Redis is back.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from producers.direct import DirectSender
from producers.outgoing import (
    SPOOL_BYTES,
    WINDOW_S,
    DestinationUnavailable,
    PostponedEvent,
    PublishFailed,
    RejectedEvent,
    Sender,
    send_until,
)
from producers.settings import SpoolSettings
from producers.spool import Spool
from relay.core.errors import ConfigError
from relay.stream.connection.reconnecting import Backoff

if TYPE_CHECKING:
    from producers.registry import ProducerContext

_log = logging.getLogger(__name__)

# Between two looks at a file with nothing in it.
_LOOK_S = 0.2
_FIRST_PAUSE_S = 0.1
# For the lock, which others hold while they write a line.
_LOCK_S = 5.0


async def deliver(spool: Spool, sender: Sender, deadline: float) -> int:
    """Send the oldest lines, up to a limit; how many are off the spool now, 0: nothing waits.

    `deadline` by the loop's clock. Away where one cannot be sent now: it and all behind it stay.
    PublishFailed where the disk fails.
    """
    batch = await asyncio.to_thread(spool.batch)
    readable = [line.event for line in batch.lines if line.event is not None]
    outcomes = iter(await send_until(deadline, sender, readable) if readable else [])
    for count, line in enumerate(batch.lines):
        outcome = RejectedEvent(line.reason) if line.event is None else next(outcomes)
        if isinstance(outcome, PostponedEvent):
            await asyncio.to_thread(spool.done, batch, count)
            raise DestinationUnavailable(outcome.reason)
        if isinstance(outcome, RejectedEvent):
            await asyncio.to_thread(spool.refuse, line, outcome.reason)
            _log.error("refused, see %s.refused: %s", spool.path, outcome.reason)
    await asyncio.to_thread(spool.done, batch, len(batch.lines))
    return len(batch.lines)


class SpoolDelivery:
    """See `producers.registry.Running`."""

    def __init__(self, context: ProducerContext, path: Path) -> None:
        self._count = context.count
        self._spool = Spool(path, limit_s=_LOCK_S, limit_bytes=SPOOL_BYTES)
        self._sender = DirectSender(context.redis, window_s=WINDOW_S, load_script=True)
        self._limit_s = context.redis.connect_timeout_s + context.redis.command_timeout_s

    async def run(self) -> None:
        """Until cancelled. What is sent and not yet noted then is known by its uid to the next."""
        loop = asyncio.get_running_loop()
        backoff, failing = Backoff(_FIRST_PAUSE_S), False
        try:
            while True:
                try:
                    while await asyncio.to_thread(self._spool.pending):
                        taken = await deliver(
                            self._spool, self._sender, loop.time() + self._limit_s
                        )
                        self._count("taken", taken)
                        backoff.reset()
                        if failing:
                            _log.warning("the spool %s is being delivered", self._spool.path)
                            failing = False
                    await asyncio.sleep(_LOOK_S)
                except (DestinationUnavailable, PublishFailed) as exc:
                    if not failing:
                        _log.warning("the spool %s waits: %s", self._spool.path, exc)
                        failing = True
                    await self._sender.close()
                    await backoff.pause()
        finally:
            await self._sender.close()


def build(context: ProducerContext, settings: SpoolSettings) -> SpoolDelivery:
    """Return the producer. Raise ConfigError if its settings cannot work."""
    path = Path(settings.path)
    if not settings.path or not path.parent.is_dir():
        raise ConfigError("[producer:spool] path: needs a file in a folder that exists")
    return SpoolDelivery(context, path)
