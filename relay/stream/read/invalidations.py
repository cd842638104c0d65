"""Find streams with new entries by client-side-caching invalidations.

After `CLIENT TRACKING ON`, a read-only command on a key arms it. The next write to the key by any
client sends one invalidation push and disarms it. The reader therefore arms a stream (`XLEN`,
`XINFO`) and reads it in the same pipeline: an entry appended in between is read or announced.
This works with Redis 7.0 to 8 and Valkey 9 without server configuration. FLUSHALL, FLUSHDB and a
reload push one NULL that stands for all keys. Idle streams cost nothing.

The canary is a key that this worker writes periodically. Its invalidation proves that pushes still
arrive. As a further safeguard, a slow sweep reads every stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from relay.core.errors import RedisUnavailable
from relay.stream.connection.connect import CommandRefused
from relay.stream.connection.pipeline_connection import ReplyError
from relay.stream.connection.refusals import WRITES, Refusals
from relay.stream.shards.shard import is_misplaced

if TYPE_CHECKING:
    from relay.core.stream_interface import Followed
    from relay.stream.connection.pipeline_connection import PipelineConnection
    from relay.stream.format.keys import Keys

MISSED_CANARIES = 3
_CANARY_S = 60
# Name of an area in `Refusals`.
CANARY_WRITES = "the canary key"
# Limits the steps of a sweep, because each of them iterates over all streams.
_MOST_STEPS = 300


class Canary:
    """A key that this worker writes periodically, to check that invalidations arrive."""

    def __init__(
        self,
        *,
        keys: Keys,
        instance: str,
        period_s: float,
        refusals: Refusals | None = None,
        tag: Callable[[], str] = lambda: "",
        on_misplaced: Callable[[], None] = lambda: None,
    ) -> None:
        """`tag` returns a hash tag of the server that is checked. `on_misplaced` is called if the
        tag belongs to another one."""
        self._keys = keys
        self._instance = instance
        self._tag = tag
        self._on_misplaced = on_misplaced
        self.key = keys.canary(instance, tag())
        self._refusals = refusals or Refusals()
        self._period_s = period_s
        self._received_at = 0.0
        # Why the server has refused client tracking.
        self.refusal = ""

    def touch(self) -> None:
        """Record that an invalidation has arrived."""
        self._received_at = asyncio.get_running_loop().time()

    def age_s(self) -> float:
        """Return the time since the last invalidation."""
        return asyncio.get_running_loop().time() - self._received_at

    def is_working(self) -> bool:
        """Return whether an invalidation arrived within the last few periods."""
        return self.age_s() < self._period_s * MISSED_CANARIES

    async def start(self, connection: PipelineConnection) -> bool:
        """Turn tracking on. Return False if the server refuses it (an ACL rule, a proxy)."""
        self.refusal = ""
        try:
            await connection.call("CLIENT", "TRACKING", "ON")
        except CommandRefused as exc:
            self.refusal = f"{exc}; the user needs +client|tracking"
            return False
        self.touch()
        return True

    async def verify(self, tracking: PipelineConnection, writer: PipelineConnection) -> None:
        """Write the canary periodically until cancelled.

        A Redis that refuses SET may still accept EXPIRE, which also causes an invalidation. If it
        refuses both, its replies count as proof.

        Redis sends pushes and replies in their order. So an invalidation is missing only if the
        reply to a later command has arrived, however long a large reply before it has taken.

        Raises:
            RedisUnavailable: Invalidations no longer arrive.
        """
        loop = asyncio.get_running_loop()
        count = missed = 0
        sent_at = loop.time()
        while True:
            # The tag changes if its slot has moved to another server.
            self.key = self._keys.canary(self._instance, self._tag())
            (armed,) = await tracking.execute([("GET", self.key)])
            missed = missed + 1 if count and self._received_at < sent_at else 0
            if missed == MISSED_CANARIES:
                raise RedisUnavailable("no invalidation arrived from Redis: connecting again")
            count += 1
            sent_at = loop.time()
            set_, prolonged = await writer.execute(
                [
                    ("SET", self.key, count, "EX", _CANARY_S),
                    ("EXPIRE", self.key, _CANARY_S),
                ]
            )
            if isinstance(set_, ReplyError) and is_misplaced(str(set_)):
                # It proves that the server answers. The next canary has another tag.
                self._on_misplaced()
                self.touch()
            elif isinstance(set_, ReplyError):
                self._refusals.refused(CANARY_WRITES, str(set_), "invalidations cannot be checked")
                if prolonged != 1 or isinstance(armed, ReplyError):
                    self.touch()
            elif isinstance(armed, ReplyError):
                self._refusals.refused(CANARY_WRITES, str(armed), "invalidations cannot be checked")
                self.touch()
            else:
                self._refusals.accepted(CANARY_WRITES)
                self._refusals.accepted(WRITES)
            await asyncio.sleep(self._period_s)


def sweep_steps(sweep_s: float) -> int:
    """Return the number of steps in which all streams are read once: at most one per second."""
    return max(1, min(int(sweep_s), _MOST_STEPS))


def swept_streams(streams: Iterable[Followed], step: int, steps: int) -> list[Followed]:
    """Return the streams that one step of a sweep reads.

    A stream's step depends on its channel only. It is therefore read once per sweep, regardless of
    the number of streams and of changes to the others.
    """
    return [stream for stream in streams if hash(stream.channel) % steps == step]
