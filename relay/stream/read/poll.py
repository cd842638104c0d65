"""Where tracking is refused: bounded batches of blocking reads tell which streams have news.

`XREAD BLOCK` over one batch of keys after the next. It only rings: the entries themselves are
read by group, like everywhere. The cost grows with the number of streams; that is why this is the
way out and not the way (measured: 43 to 103 ms at 20,000 keys in one blocking read).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import hiredis

from relay.core.model import Channel
from relay.stream.connection.connect import discover
from relay.stream.connection.pipeline_connection import PipelineConnection

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.core.stream_interface import Followed
    from relay.stream.format.keys import Keys

_BATCH = 200
_BLOCK_MS = 200
_RIGHTS_S = 0.8


class Polled(Protocol):
    """The reader, as the poll sees it."""

    def followed(self) -> list[Followed]:
        """All streams with a local client."""

    def news(self, channel: Channel) -> None:
        """This one has entries that were not read yet."""

    def polled(self, *, control: bool, rights: bool) -> None:
        """Redis has answered; and what no blocking read announces is due."""


async def poll(reader: Polled, redis: RedisSettings, keys: Keys) -> None:
    """For ever, on a link of its own; RedisUnavailable when that is lost."""
    link = await PipelineConnection.open(await discover(redis), settings=redis)
    loop = asyncio.get_running_loop()
    checked_at = loop.time()
    try:
        while True:
            streams = [stream for stream in reader.followed() if stream.settled]
            if not streams:
                await asyncio.sleep(_BLOCK_MS / 1000)
            # A round lasts no longer for many streams: rights and the control stream wait for it.
            block_ms = max(1, _BLOCK_MS * _BATCH // max(_BATCH, len(streams)))
            for start in range(0, len(streams), _BATCH):
                batch = streams[start : start + _BATCH]
                names = [keys.stream(stream.channel) for stream in batch]
                after = [str(stream.position) for stream in batch]
                (reply,) = await link.execute(
                    [("XREAD", "COUNT", 1, "BLOCK", block_ms, "STREAMS", *names, *after)]
                )
                if isinstance(reply, hiredis.ReplyError):
                    # One foreign key fails the whole read: let each be read, and judged, alone.
                    reply = dict.fromkeys(names)
                for name in reply if isinstance(reply, dict) else ():
                    channel = keys.channel_of_stream(name)
                    if channel is not None:
                        reader.news(channel)
                # Each answer proves that streams are being read, however long the round takes.
                reader.polled(control=False, rights=False)
            rights = loop.time() - checked_at >= _RIGHTS_S
            if rights:
                checked_at = loop.time()
            reader.polled(control=True, rights=rights)
            # The reads that were asked for move the positions this one blocks on.
            await asyncio.sleep(0.005)
    finally:
        link.close()
