"""A reader of one shard for tests that do not look at what it delivers."""

from __future__ import annotations

from functools import partial

from relay.config.settings import StreamSettings
from relay.core.metrics import Metrics
from relay.stream.format import entry
from relay.stream.format.keys import Keys
from relay.stream.read.reader import StreamReader
from relay.stream.shards.clients import ShardClients
from relay.stream.shards.shard import Shard
from relay.stream.upkeep.unused import UnusedStreams


def stream_reader(
    clients: ShardClients, keys: Keys, settings: StreamSettings, shard: Shard
) -> StreamReader:
    """Return a reader without a control stream, of the worker "one"."""
    return StreamReader(
        keys=keys,
        instance="one",
        shard=shard,
        settings=settings,
        metrics=Metrics(),
        decode=partial(entry.decode, max_bytes=settings.max_entry_bytes),
        on_turn=lambda: None,
        decode_ephemeral=lambda _channel, _payload: None,
        control=None,
        unused=UnusedStreams(clients, keys),
    )
