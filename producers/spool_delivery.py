"""Deliver the events of a spool in order and once, even if processes die meanwhile.

Used by the publisher, and by the producer `spool` for programs that only append to the spool or end
before Redis is reachable again.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

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
from producers.registry import RunningProducer
from producers.settings import SpoolSettings
from producers.spool import Spool
from relay.core.errors import ConfigError
from relay.stream.connection.reconnecting import Backoff

if TYPE_CHECKING:
    from producers.registry import ProducerContext

_log = logging.getLogger(__name__)

# Interval between checks of an empty file.
_POLL_S = 0.2
_FIRST_PAUSE_S = 0.1
# Maximum wait for the lock, which other processes hold while they write a line.
_LOCK_S = 5.0


async def deliver(spool: Spool, sender: Sender, deadline: float) -> int:
    """Send the oldest events of the spool until `deadline` (time of the event loop).

    Returns:
        The number of lines that were removed from the spool, at most one batch. 0 if it is empty.

    Raises:
        DestinationUnavailable: An event could not be sent. It and the following ones remain.
        PublishFailed: The file could not be read or written.
    """
    batch = await asyncio.to_thread(spool.batch)
    readable = [line.event for line in batch.lines if line.event is not None]
    outcomes = iter(await send_until(deadline, sender, readable) if readable else [])
    for count, line in enumerate(batch.lines):
        outcome = RejectedEvent(line.reason) if line.event is None else next(outcomes)
        if isinstance(outcome, PostponedEvent):
            await asyncio.to_thread(spool.mark_delivered, batch, count)
            raise DestinationUnavailable(outcome.reason)
        if isinstance(outcome, RejectedEvent):
            await asyncio.to_thread(spool.reject, line, outcome.reason)
            _log.error(
                "Event of the spool %s rejected: %s; saved to %s.refused",
                spool.path,
                outcome.reason,
                spool.path,
            )
    await asyncio.to_thread(spool.mark_delivered, batch, len(batch.lines))
    return len(batch.lines)


class SpoolDelivery(RunningProducer):
    """Watches a spool and delivers its events."""

    def __init__(self, context: ProducerContext, path: Path) -> None:
        self._count = context.count
        self._spool = Spool(path, limit_s=_LOCK_S, limit_bytes=SPOOL_BYTES)
        self._sender = DirectSender(context.redis, window_s=WINDOW_S, load_script=True)
        self._limit_s = context.redis.connect_timeout_s + context.redis.command_timeout_s

    @override
    async def run(self) -> None:
        # An event that was sent before a cancellation, but not yet marked as delivered, is sent
        # again later. Its uid prevents a second entry.
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
                            _log.warning("Delivering events from the spool %s", self._spool.path)
                            failing = False
                    await asyncio.sleep(_POLL_S)
                except (DestinationUnavailable, PublishFailed) as exc:
                    if not failing:
                        _log.warning(
                            "Could not deliver the spool %s: %s; retrying", self._spool.path, exc
                        )
                        failing = True
                    await self._sender.close()
                    await backoff.pause()
        finally:
            await self._sender.close()


def build(context: ProducerContext, settings: SpoolSettings) -> SpoolDelivery:
    """Create the producer. Raise ConfigError if its settings are incomplete."""
    path = Path(settings.path)
    if not settings.path or not path.parent.is_dir():
        raise ConfigError("[producer:spool] path must be a file in an existing folder")
    return SpoolDelivery(context, path)
