"""Fallback if client tracking is refused: find streams with new entries by blocking reads.

`XREAD BLOCK` is called for one batch of streams after another. It only finds the streams; the
entries are read by consumer group, as with tracking. The cost grows with the number of streams
(measured: 43 to 103 ms at 20,000 keys in one blocking read), so tracking is preferred.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from relay.stream.connection.pipeline_connection import ReplyError, connected

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.core.stream_interface import Followed

_BATCH = 200
_BLOCK_MS = 200
_RIGHTS_S = 0.8


class PolledReader(Protocol):
    """The part of the stream reader that `poll` uses."""

    def followed(self) -> list[Followed]:
        """Return all streams that local clients follow."""

    def on_new_entries(self, key: bytes) -> None:
        """Read the stream with this key, which has new entries."""

    def polled(self, *, control: bool, rights: bool) -> None:
        """Record that Redis has replied, and read the control stream or all rights if True."""


async def poll(reader: PolledReader, redis: RedisSettings) -> None:
    """Poll on a connection of its own until cancelled.

    Raises:
        RedisUnavailable: The connection was lost.
    """
    loop = asyncio.get_running_loop()
    checked_at = loop.time()
    async with connected(redis) as connection:
        while True:
            streams = [stream for stream in reader.followed() if stream.settled]
            if not streams:
                await asyncio.sleep(_BLOCK_MS / 1000)
            # Rights and the control stream are read between rounds, so a round must not become
            # longer with the number of streams.
            block_ms = max(1, _BLOCK_MS * _BATCH // max(_BATCH, len(streams)))
            for start in range(0, len(streams), _BATCH):
                batch = streams[start : start + _BATCH]
                names = [stream.key for stream in batch]
                after = [str(stream.position) for stream in batch]
                (reply,) = await connection.execute(
                    [("XREAD", "COUNT", 1, "BLOCK", block_ms, "STREAMS", *names, *after)]
                )
                if isinstance(reply, ReplyError):
                    # One key of another type fails the whole read. Read each stream separately.
                    reply = dict.fromkeys(names)
                for name in reply if isinstance(reply, dict) else ():
                    reader.on_new_entries(name)
                # Each reply proves that streams are being read, even if the round takes long.
                reader.polled(control=False, rights=False)
            due = loop.time() - checked_at >= _RIGHTS_S
            if due:
                checked_at = loop.time()
            reader.polled(control=due, rights=due)
            # Let the requested reads advance the positions that the next XREAD starts from.
            await asyncio.sleep(0.005)
