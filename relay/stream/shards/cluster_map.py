"""The shard map of a Redis Cluster: its primaries and their slots, as its nodes report them.

`refresh` asks one node after another until one has a complete view. A node may not have received
the latest change yet. Its view is older if its cluster epoch is lower, and is then used only if no
node has a newer one.
"""

from __future__ import annotations

import asyncio
import math
from binascii import crc_hqx
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

from relay.core.errors import RedisUnavailable, StartError
from relay.stream.connection.connect import (
    CommandRefused,
    cluster_seeds,
    describe,
    with_short_timeouts,
)
from relay.stream.connection.pipeline_connection import PipelineConnection
from relay.stream.shards.shard import SITE_TAG, SLOTS, Shard, slot_of

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.connection.connect import RedisEndpoint

# New connections use slots that were read this long ago.
_LOCATED_S = 0.5


class PrimaryShard:
    """A primary of a Redis Cluster, identified by its address."""

    uses_sharded_pubsub = True

    def __init__(
        self, owner: ClusterMap, settings: RedisSettings, address: tuple[str, int]
    ) -> None:
        self.settings = settings
        self.address = address
        self._owner = owner
        host, port = address
        self.name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def tag(self) -> str:
        """See `Shard`."""
        return self._owner.tag_of(self)

    async def locate(self) -> RedisEndpoint:
        """See `Shard`. RedisUnavailable if the server is no longer a primary with slots."""
        # Many connections to a server that is away are retried at the same time.
        await self._owner.refresh(max_age_s=_LOCATED_S)
        if self not in self._owner.shards:
            raise RedisUnavailable(f"{self.name} is no longer a primary of the Redis Cluster")
        return self.endpoint()

    def endpoint(self) -> RedisEndpoint:
        """Return the address with the present credentials."""
        host, port = self.address
        return replace(cluster_seeds(self.settings)[0], host=host, port=port)


class _View(NamedTuple):
    epoch: int
    ranges: list[list[object]]
    asked: RedisEndpoint


class ClusterMap:
    """Slots and their primaries."""

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings
        # A node that does not answer soon is skipped: it may be the one that has just failed.
        self._timeouts = with_short_timeouts(settings)
        self._nodes: list[tuple[str, int]] = []
        self._primaries: dict[tuple[str, int], PrimaryShard] = {}
        # All that were ever seen: one that returns is the same shard again.
        self._known: dict[tuple[str, int], PrimaryShard] = {}
        self._slots: list[PrimaryShard | None] = [None] * SLOTS
        self._tags: dict[PrimaryShard, str] = {}
        self._epoch = -1
        self._lock = asyncio.Lock()
        # When the slots were last read, and why this has failed.
        self._read_at = -math.inf
        self._problem = ""

    @property
    def shards(self) -> Sequence[PrimaryShard]:
        """See `ShardMap`."""
        return list(self._primaries.values())

    @property
    def home(self) -> Shard:
        """See `ShardMap`."""
        return self.shard_of(SITE_TAG)

    @property
    def slots(self) -> Sequence[Shard | None]:
        """See `ShardMap`."""
        return self._slots

    def shard_of(self, key: bytes) -> Shard:
        """See `ShardMap`."""
        slot = slot_of(key)
        if (shard := self._slots[slot]) is None:
            where = describe(self._settings)
            raise RedisUnavailable(f"slot {slot} has no server in the Redis {where}")
        return shard

    def tag_of(self, shard: PrimaryShard) -> str:
        """Return a tag whose slot this primary has. Empty if it has none."""
        tag = self._tags.get(shard)
        if tag is None or self._slots[crc_hqx(tag.encode(), 0) % SLOTS] is not shard:
            if shard not in self._slots:
                return ""
            # Numbers reach all slots. On average this tries as many as there are primaries.
            tag = next(
                text
                for text in map(str, range(1 << 20))
                if self._slots[crc_hqx(text.encode(), 0) % SLOTS] is shard
            )
            self._tags[shard] = tag
        return tag

    async def refresh(self, max_age_s: float = 0.0) -> None:
        """Read the slots from the first node that has a complete and current view.

        Do nothing if they were read less than `max_age_s` before, and raise the error if this has
        failed.

        Raises:
            RedisUnavailable: No node has a complete view.
            StartError: The server is not part of a Redis Cluster. Only until the first success.
        """
        loop = asyncio.get_running_loop()
        wanted_at = loop.time() - max_age_s
        async with self._lock:
            # Another call may have begun to read after this one was made.
            if self._read_at < wanted_at:
                begun_at = loop.time()
                try:
                    self._apply(await self._read())
                    self._problem = ""
                except RedisUnavailable as exc:
                    self._problem = str(exc)
                self._read_at = begun_at
            if self._problem:
                raise RedisUnavailable(self._problem)

    async def _read(self) -> _View:
        seeds = cluster_seeds(self._settings)
        known = [replace(seeds[0], host=host, port=port) for host, port in self._nodes]
        older: _View | None = None
        problem: Exception = RedisUnavailable("the Redis Cluster has no node")
        for node in dict.fromkeys([*known, *seeds]):
            try:
                view = await self._ask(node)
            except RedisUnavailable as exc:
                problem = exc
                continue
            except StartError as exc:
                if not self._nodes:
                    raise
                # The address of a node that has left belongs to another server now.
                problem = RedisUnavailable(str(exc))
                continue
            if view.epoch >= self._epoch:
                return view
            if older is None or view.epoch > older.epoch:
                older = view
        if older is None:
            raise problem
        return older

    async def _ask(self, node: RedisEndpoint) -> _View:
        connection = await PipelineConnection.open(
            node, settings=self._timeouts, check_primary=False, name="relay-map"
        )
        try:
            ranges = await connection.call("CLUSTER", "SLOTS")
            info = cast(bytes, await connection.call("CLUSTER", "INFO"))
        except CommandRefused as exc:
            if "cluster support disabled" in exc.reply:
                raise StartError(
                    f"[redis] url: {node} is not part of a Redis Cluster; use redis://{node}"
                ) from exc
            raise RedisUnavailable(
                f"{node} does not report the slots of its cluster: {exc}"
            ) from exc
        finally:
            connection.close()
        lines = dict(line.partition(b":")[::2] for line in info.split(b"\r\n"))
        if lines.get(b"cluster_state") != b"ok":
            raise RedisUnavailable(f"{node} reports that the Redis Cluster is not complete")
        epoch = int(lines.get(b"cluster_current_epoch", b"0"))
        return _View(epoch, cast("list[list[object]]", ranges), node)

    def _apply(self, view: _View) -> None:
        slots: list[PrimaryShard | None] = [None] * SLOTS
        primaries: dict[tuple[str, int], PrimaryShard] = {}
        # The node that has answered is asked first next time.
        nodes = {(view.asked.host, view.asked.port): None}
        for begin, end, *servers in cast("Iterable[tuple[int, int, list[object]]]", view.ranges):
            addresses = [_address(server, view.asked.host) for server in servers]
            nodes |= dict.fromkeys(addresses)
            address = addresses[0]
            shard = self._known.get(address) or PrimaryShard(self, self._settings, address)
            self._known[address] = primaries[address] = shard
            slots[begin : end + 1] = [shard] * (end + 1 - begin)
        self._epoch = view.epoch
        self._nodes = list(nodes)
        self._primaries, self._slots = primaries, slots
        self._tags = {shard: tag for shard, tag in self._tags.items() if shard.address in primaries}


def _address(server: Sequence[object], asked: str) -> tuple[str, int]:
    host, port = cast("tuple[bytes | None, int]", (server[0], server[1]))
    # A node without a configured address reports none, or "?", for itself. Then use the address at
    # which it was asked.
    known = host is not None and host not in (b"", b"?")
    return cast(bytes, host).decode() if known else asked, port
