"""What PHP has sent, on its way into the streams: in its order, and kept while Redis is away.

PHP does not wait for an answer and would not look at one, so nothing could be sent again from
there. Each event gets a uid, so that it is appended once however often it is tried.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from relay.core.errors import ClientError, NotReplicated, RelayError

if TYPE_CHECKING:
    from relay.core.model import EntryID
    from relay.doorkit.contract import Publish
    from relay.protocols.pydio.private_messages import Publication

_log = logging.getLogger(__name__)

LIMIT_BYTES = 16 << 20
HOLD_S = 60.0
_BATCH = 500
_PAUSE_S = (0.1, 2.0)


class _QueuedMessage:
    __slots__ = ("publication", "since", "uid")

    def __init__(self, publication: Publication, since: float) -> None:
        self.publication = publication
        self.since = since
        self.uid = uuid.uuid4().hex


class Outbound:
    """Of one worker; `run` must be running. What waits longer than HOLD_S, or beyond LIMIT_BYTES,
    is given up, and the log says how many."""

    def __init__(self, publish: Publish, *, clock: Callable[[], float]) -> None:
        self._publish = publish
        self._clock = clock
        self._waiting: deque[_QueuedMessage] = deque()
        self._bytes = 0
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, publication: Publication) -> None:
        """Append it as soon as Redis takes it."""
        size = len(publication.data)
        if self._bytes + size > LIMIT_BYTES:
            _log.error("lost for %s: too many wait for Redis", publication.channel)
            return
        self._bytes += size
        self._waiting.append(_QueuedMessage(publication, self._clock()))
        self._idle.clear()
        self._work.set()

    async def settled(self) -> None:
        """Returns once nothing waits."""
        await self._idle.wait()

    async def run(self) -> None:
        """For ever."""
        pause_s = _PAUSE_S[0]
        while True:
            await self._work.wait()
            if await self._send():
                pause_s = _PAUSE_S[0]
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_S[1])

    async def _send(self) -> bool:
        """The oldest, together; whether Redis took them. None is overtaken by a later one: those
        of one batch leave in one pipeline, and the next waits for them."""
        batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
        attempts = [self._begin(each) for each in batch]
        again = []
        for each, attempt in zip(batch, attempts, strict=True):
            error = attempt if isinstance(attempt, Exception) else await _outcome(attempt)
            if error is None or isinstance(error, NotReplicated):
                self._bytes -= len(each.publication.data)
            elif isinstance(error, ClientError | ValueError):
                self._give_up(each, str(error))
            elif self._clock() - each.since > HOLD_S:
                self._give_up(each, f"not taken within {HOLD_S:g} s: {error}")
            else:
                again.append(each)
        self._waiting.extendleft(reversed(again))
        if not self._waiting:
            self._work.clear()
            self._idle.set()
        return not again

    def _begin(self, each: _QueuedMessage) -> asyncio.Future[EntryID] | Exception:
        event = each.publication
        try:
            return self._publish(
                event.channel, event.data, uid=each.uid, to=event.to, extra=event.extra
            )
        except (RelayError, ValueError) as exc:
            return exc

    def _give_up(self, each: _QueuedMessage, reason: str) -> None:
        self._bytes -= len(each.publication.data)
        _log.error("lost for %s: %s", each.publication.channel, reason)


async def _outcome(attempt: asyncio.Future[EntryID]) -> Exception | None:
    try:
        await attempt
    except RelayError as exc:
        return exc
    return None
