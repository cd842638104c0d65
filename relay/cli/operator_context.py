"""Context of operators' commands: configuration, Redis client and key names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relay.cli.output import say
from relay.core.errors import RelayError
from relay.core.model import Channel, parse_channel
from relay.stream.shards.clients import shard_clients
from relay.stream.shards.making import keys_of

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.stream.connection.connect import RedisClient
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorContext:
    """Configuration, Redis clients and key names of one installation."""

    config: Config
    clients: ShardClients
    keys: Keys

    @property
    def client(self) -> RedisClient:
        """The client for keys that belong to no channel."""
        return self.clients.home


@asynccontextmanager
async def operator_context(config: Config) -> AsyncIterator[OperatorContext]:
    """Create the context. The clients connect with their first commands."""
    async with shard_clients(config.redis) as clients:
        yield OperatorContext(config=config, clients=clients, keys=keys_of(config.redis))


def channel_of(text: str) -> Channel:
    """Return CHANNEL of the command line. Raise RelayError if the name is not valid."""
    try:
        channel = parse_channel(text)
    except ValueError as exc:
        raise RelayError(f"CHANNEL: {exc}") from exc
    if "*" in text:
        say(f"CHANNEL is a name, not a pattern: this applies to one channel, named {text}")
    return channel


def user_of(text: str) -> str:
    """Return USER of the command line. Raise RelayError if the name is not valid."""
    try:
        if text.encode():
            return text
    except UnicodeEncodeError:
        raise RelayError("USER: is not UTF-8") from None
    raise RelayError("USER: is empty")
