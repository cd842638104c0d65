"""Context of operators' commands: configuration, Redis client and key names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relay.cli.output import say
from relay.core.errors import RelayError
from relay.core.model import Channel, parse_channel
from relay.stream.connection.connect import redis_client
from relay.stream.format.keys import Keys

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.stream.connection.connect import RedisClient


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorContext:
    """Configuration, Redis client and key names of one installation."""

    config: Config
    client: RedisClient
    keys: Keys


@asynccontextmanager
async def operator_context(config: Config) -> AsyncIterator[OperatorContext]:
    """Create the context. The client connects with its first command."""
    async with redis_client(config.redis) as client:
        yield OperatorContext(config=config, client=client, keys=Keys(config.redis.prefix))


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
