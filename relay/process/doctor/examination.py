"""Run all checks of the doctor, for the command line and the console."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from relay.core.errors import RelayError, StartError
from relay.process import app
from relay.process.addresses import check_addresses
from relay.process.doctor import (
    data_checks,
    host_checks,
    redis_checks,
    settings_checks,
)
from relay.process.doctor.finding import Finding, Level, error, of_server
from relay.process.internal_address import check_internal
from relay.stream.shards.server_errors import ServerErrors
from relay.stream.shards.server_list import compare_list

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.stream.format.keys import Keys
    from relay.stream.shards.clients import ShardClients

_ORDER = list(Level)


async def examine(config: Config, clients: ShardClients, keys: Keys) -> list[Finding]:
    """Return all findings, errors first.

    `config` and `clients` must be those of relay itself: rights are checked for its Redis user.
    """
    found = await asyncio.to_thread(_local, config)
    try:
        shards = await clients.each()
    except RelayError as exc:
        return in_order([*found, redis_checks.unreachable(config, exc)])
    try:
        await compare_list(clients, keys)
    except StartError as exc:
        found.append(not_served(exc))
    errors = ServerErrors()
    for shard, client in shards:
        of_this = await redis_checks.check(config, client, keys, shard, errors)
        if len(shards) > 1:
            of_this = [of_server(each, shard.name) for each in of_this]
        found += of_this
    if not all(shard in errors for shard, _ in shards):
        found += await data_checks.check(config, clients, keys, errors)
    return in_order(found)


def in_order(found: list[Finding]) -> list[Finding]:
    """Return the findings sorted by level."""
    return sorted(found, key=lambda each: _ORDER.index(each.level))


def _local(config: Config) -> list[Finding]:
    """Check everything that needs no connection."""
    found: list[Finding] = []
    try:
        check_addresses(config, app.check(config), accept_running=True)
        check_internal(config.node)
    except* RelayError as group:
        # `check` builds the parts in a TaskGroup.
        found.append(not_served(_first(group)))
    return [*found, *settings_checks.check(config), *host_checks.check(config)]


def _first(group: BaseExceptionGroup[RelayError]) -> BaseException:
    each: BaseException = group
    while isinstance(each, BaseExceptionGroup):
        each = each.exceptions[0]
    return each


def not_served(exc: BaseException) -> Finding:
    """Return the finding for a configuration that `serve` rejects."""
    return error(
        "configuration.rejected",
        str(exc),
        "relay does not start with this configuration.",
        "Correct the setting that the line names; check with: relay checkconfig",
    )
