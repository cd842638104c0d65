"""Queue of PHP's messages on their way to the streams.

PHP neither waits for a confirmation nor sends a message again. The queue therefore keeps messages
in order while Redis is unreachable, and appends each with a uid, so that a repeated attempt cannot
append it twice.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from relay.core.errors import ClientError, NotDurable, RelayError

if TYPE_CHECKING:
    from relay.core.model import EntryID
    from relay.doorkit.contract import Publish
    from relay.protocols.pydio.private_messages import Publication

_log = logging.getLogger(__name__)

LIMIT_BYTES = 16 << 20
HOLD_S = 60.0
_BATCH = 500
_RETRY_S = 0.5


class _QueuedMessage:
    __slots__ = ("publication", "since", "uid")

    def __init__(self, publication: Publication, since: float) -> None:
        self.publication = publication
        self.since = since
        self.uid = uuid.uuid4().hex


class OutboundQueue:
    """The queue of one worker. `run` must be running.

    Messages that wait longer than HOLD_S, or do not fit into LIMIT_BYTES, are dropped and logged.
    """

    def __init__(self, publish: Publish, *, clock: Callable[[], float]) -> None:
        self._publish = publish
        self._clock = clock
        self._waiting: deque[_QueuedMessage] = deque()
        self._bytes = 0
        self._has_messages = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    def add(self, publication: Publication) -> None:
        """Append the message as soon as Redis accepts it."""
        size = len(publication.data)
        if self._bytes + size > LIMIT_BYTES:
            _log.error(
                "Dropped a Pydio message for %s: the queue of messages that wait for Redis exceeds"
                " %d bytes",
                publication.channel,
                LIMIT_BYTES,
            )
            return
        self._bytes += size
        self._waiting.append(_QueuedMessage(publication, self._clock()))
        self._empty.clear()
        self._has_messages.set()

    async def wait_empty(self) -> None:
        """Wait until all messages have been appended or dropped."""
        await self._empty.wait()

    async def run(self) -> None:
        """Append queued messages until cancelled."""
        while True:
            await self._has_messages.wait()
            if not await self._send():
                await asyncio.sleep(_RETRY_S)

    async def _send(self) -> bool:
        """Append the oldest messages in one pipeline. Return False if some must be retried.

        The order is kept: later messages are sent after these have succeeded or been dropped.
        """
        batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
        attempts = [self._begin_append(message) for message in batch]
        again = []
        for message, attempt in zip(batch, attempts, strict=True):
            error = attempt if isinstance(attempt, Exception) else await _error_of(attempt)
            if error is None or isinstance(error, NotDurable):
                self._bytes -= len(message.publication.data)
                if error is not None:
                    _log.warning(
                        "A Pydio message for %s was %s", message.publication.channel, error
                    )
            elif isinstance(error, ClientError | ValueError):
                self._drop(message, str(error))
            elif self._clock() - message.since > HOLD_S:
                self._drop(message, f"not appended within {HOLD_S:g} s ({error})")
            else:
                again.append(message)
        self._waiting.extendleft(reversed(again))
        if not self._waiting:
            self._has_messages.clear()
            self._empty.set()
        return not again

    def _begin_append(self, message: _QueuedMessage) -> asyncio.Future[EntryID] | Exception:
        event = message.publication
        try:
            return self._publish(
                event.channel, event.data, uid=message.uid, to=event.to, extra=event.extra
            )
        except (RelayError, ValueError) as exc:
            return exc

    def _drop(self, message: _QueuedMessage, reason: str) -> None:
        self._bytes -= len(message.publication.data)
        _log.error("Dropped a Pydio message for %s: %s", message.publication.channel, reason)


async def _error_of(attempt: asyncio.Future[EntryID]) -> Exception | None:
    try:
        await attempt
    except RelayError as exc:
        return exc
    return None
