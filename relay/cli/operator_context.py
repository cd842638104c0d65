"""What every operator's command works on: the configuration, a client of its Redis, the keys."""

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
    """One Redis with its relays."""

    config: Config
    client: RedisClient
    keys: Keys


@asynccontextmanager
async def operator_context(config: Config) -> AsyncIterator[OperatorContext]:
    """The site that is configured; nothing is connected before the first command."""
    async with redis_client(config.redis) as client:
        yield OperatorContext(config=config, client=client, keys=Keys(config.redis.prefix))


def channel_of(text: str) -> Channel:
    """Return CHANNEL of the command line; RelayError if no channel can have this name."""
    try:
        channel = parse_channel(text)
    except ValueError as exc:
        raise RelayError(f"CHANNEL: {exc}") from exc
    if "*" in text:
        say(f"note: * is no pattern here; this concerns one channel, named {text}")
    return channel


def user_of(text: str) -> str:
    """USER on the command line; RelayError where none can have this name."""
    try:
        if text.encode():
            return text
    except UnicodeEncodeError:
        raise RelayError("USER: is not UTF-8") from None
    raise RelayError("USER: is empty")
