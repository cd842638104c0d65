"""Check whether Redis accepts the commands that relay needs, without executing them.

The commands are sent on a separate connection, most of them in a transaction that is never
executed: Redis checks rights when it queues a command.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from relay.stream.connection.pipeline_connection import PipelineConnection, ReplyError
from relay.stream.connection.refusals import Effect, Need, cause_of, rule_of

if TYPE_CHECKING:
    from relay.config.settings import RedisSettings
    from relay.stream.connection.connect import RedisEndpoint


async def find_rejected(
    endpoint: RedisEndpoint, settings: RedisSettings, needs: Sequence[Need]
) -> list[tuple[Need, str]]:
    """Return the needed commands that the user may not run or that do not exist, with the replies.

    Raises:
        RedisUnavailable: The connection failed.
    """
    connection = await PipelineConnection.open(endpoint, settings=settings, name="relay-rights")
    try:
        start = next(i for i, need in enumerate(needs, 1) if need.opens_transaction)
        rejected = await _try(connection, needs[:start])
        # Without a transaction, the other commands would be executed.
        if not any(need.opens_transaction for need, _ in rejected):
            rejected += await _try(connection, needs[start:])
    finally:
        connection.close()
    return rejected


async def _try(connection: PipelineConnection, needs: Sequence[Need]) -> list[tuple[Need, str]]:
    replies = await connection.execute([need.command for need in needs])
    errors = (
        (need, cause_of(str(reply)))
        for need, reply in zip(needs, replies, strict=True)
        if isinstance(reply, ReplyError)
    )
    # Other errors, such as a full memory, are reported where they occur.
    return [(need, error) for need, error in errors if rule_of(error).effect is Effect.NO_RIGHT]
