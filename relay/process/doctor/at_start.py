"""The checks of the doctor that `serve` makes at its start: what one INFO shows about Redis."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from relay.core.errors import RelayError
from relay.process.doctor import redis_checks
from relay.process.doctor.finding import Level, of_server

if TYPE_CHECKING:
    from relay.config.loading import Config
    from relay.stream.shards.clients import ShardClients

_log = logging.getLogger(__name__)


async def log_faults(config: Config, clients: ShardClients) -> None:
    """Log the errors, and the names of the warnings in one line, for each server.

    The version, rights and the clock are not among them: `serve` checks these itself.
    """
    try:
        servers = await clients.each()
    except RelayError:
        # The reader logs it.
        return
    for shard, client in servers:
        try:
            info = await redis_checks.information(client)
        except (RelayError, OSError):
            # The reader logs it.
            continue
        found = list(redis_checks.of_information(config, info))
        if len(servers) > 1:
            found = [of_server(each, shard.name) for each in found]
        for each in found:
            if each.level is Level.ERROR:
                _log.error("%s: %s Fix: %s", each.what, each.why, " ".join(each.fix.split()))
        if names := [each.name for each in found if each.level is Level.WARNING]:
            _log.info(
                "Redis at %s has weaknesses (%s): run relay doctor", shard.name, ", ".join(names)
            )
