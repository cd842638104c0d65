"""`relay token`, `relay revoke` and `relay grant`: access to channels."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from relay.cli.configured import configuration
from relay.core.errors import RelayError

if TYPE_CHECKING:
    from relay.config.loading import Config


def _token(options: argparse.Namespace) -> int:
    from relay.cli.local_key import with_local_key
    from relay.rights.token import TokenReader

    config = with_local_key(configuration(options))
    reader = TokenReader(config.jwt)
    print(reader.sign(options.user, options.channel, options.group, options.ttl or None))
    return 0


def _revoke(options: argparse.Namespace) -> int:
    from relay.cli.operator_context import channel_of, user_of
    from relay.process.app import revoke

    config = configuration(options)
    channel, user = channel_of(options.channel), user_of(options.user)
    entry_id = asyncio.run(revoke(config.redis, channel, user))
    print(f"{user} reads nothing of {channel} after {entry_id} (Redis: {_where(config)})")
    return 0


def _grant(options: argparse.Namespace) -> int:
    from relay.cli.operator_context import channel_of, user_of
    from relay.process.app import grant

    config = configuration(options)
    channel, user = channel_of(options.channel), user_of(options.user)
    entry_id = asyncio.run(grant(config.redis, channel, user))
    where = f"(Redis: {_where(config)})"
    if entry_id is None:
        raise RelayError(f"{user} is not revoked on {channel} {where}: nothing changed")
    print(
        f"the revocation of {user} on {channel} ended at {entry_id} {where};"
        f" {user} reads it again as far as token, protocol, application or rights hash allow"
    )
    return 0


def _where(config: Config) -> str:
    from relay.stream.connection.connect import describe

    return describe(config.redis)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "token": _token,
    "revoke": _revoke,
    "grant": _grant,
}
