"""`relay token`, `relay revoke` and `relay grant`: access to channels."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from relay.cli.configured import configuration
from relay.core.errors import RelayError

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.config.settings import RedisSettings
    from relay.core.model import Channel, EntryID
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients


def _token(options: argparse.Namespace) -> int:
    from relay.cli.local_key import with_local_key
    from relay.rights.token import TokenReader

    config = with_local_key(configuration(options))
    reader = TokenReader(config.jwt)
    print(reader.sign(options.user, options.channel, options.group, options.ttl or None))
    return 0


def _revoke(options: argparse.Namespace) -> int:
    from relay.cli.operator_context import channel_of, user_of

    config = configuration(options)
    channel, user = channel_of(options.channel), user_of(options.user)
    entry_id = asyncio.run(revoke(config.redis, channel, user))
    if options.json:
        _emit(channel, user, entry_id)
        return 0
    where = f"(Redis: {_where(config)})"
    print(f"Revoked: {user} receives no event of {channel} after {entry_id} {where}")
    return 0


def _grant(options: argparse.Namespace) -> int:
    from relay.cli.operator_context import channel_of, user_of

    config = configuration(options)
    channel, user = channel_of(options.channel), user_of(options.user)
    entry_id = asyncio.run(grant(config.redis, channel, user))
    where = f"(Redis: {_where(config)})"
    if entry_id is None:
        raise RelayError(f"nothing changed: {user} is not revoked on {channel} {where}")
    if options.json:
        _emit(channel, user, entry_id)
        return 0
    print(
        f"Ended the revocation of {user} on {channel} at {entry_id} {where}."
        " Token, protocol, application and rights hash decide again."
    )
    return 0


def _emit(channel: Channel, user: str, entry_id: EntryID) -> None:
    from relay.cli.output import emit

    emit({"channel": channel, "user": user, "id": str(entry_id)})


@asynccontextmanager
async def _clients(redis: RedisSettings) -> AsyncIterator[tuple[ShardClients, Keys]]:
    """Open clients of the servers. Raise StartError if the site uses another list of servers."""
    from relay.stream.shards.clients import shard_clients
    from relay.stream.shards.making import keys_of
    from relay.stream.shards.server_list import compare_list

    keys = keys_of(redis)
    async with shard_clients(redis) as clients:
        await compare_list(clients, keys)
        yield clients, keys


async def revoke(redis: RedisSettings, channel: Channel, user: str) -> EntryID:
    """Revoke the right to read a channel; return the ID of the last entry that is delivered."""
    from relay.stream.write import revoke as revocations

    async with _clients(redis) as (clients, keys):
        return await revocations.revoke(clients, keys, channel, user)


async def grant(redis: RedisSettings, channel: Channel, user: str) -> EntryID | None:
    """Undo a revocation; return the ID of its entry, or None if the user was not revoked."""
    from relay.stream.write import revoke as revocations

    async with _clients(redis) as (clients, keys):
        return await revocations.grant(clients, keys, channel, user)


def _where(config: Config) -> str:
    from relay.stream.connection.connect import describe

    return describe(config.redis)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "token": _token,
    "revoke": _revoke,
    "grant": _grant,
}
