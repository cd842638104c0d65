"""One append on its way to Redis."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from relay.core.errors import RedisUnavailable, RelayError
from relay.core.model import EntryID

if TYPE_CHECKING:
    from relay.core.durability import Durability
    from relay.core.model import Channel
    from relay.stream.write.append import Append

# The most appends that wait for one server, on one connection or on all that confirm.
MAX_WAITING = 100_000
TOO_MANY = "too many appends are waiting for Redis"
STOPPING = "the relay is stopping"


class PendingAppend:
    """One append. `usual` is the durability of the channel's namespace."""

    __slots__ = ("append", "channel", "future", "may_repeat", "since", "usual")

    def __init__(self, channel: Channel, append: Append, usual: Durability) -> None:
        loop = asyncio.get_running_loop()
        self.channel = channel
        self.append = append
        self.usual = usual
        self.future: asyncio.Future[EntryID] = loop.create_future()
        self.may_repeat = append.script is not None
        self.since = loop.time()

    def end(self, result: EntryID | RelayError) -> None:
        """Give the caller the ID of the entry, or the error."""
        if self.future.done():
            return
        if isinstance(result, EntryID):
            self.future.set_result(result)
        else:
            self.future.set_exception(result)

    def fail(self, exc: BaseException) -> None:
        """Give the caller this error, as one of relay's."""
        self.end(exc if isinstance(exc, RelayError) else RedisUnavailable(str(exc)))
